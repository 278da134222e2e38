"""A simulated namespace for tests of the pure core: it holds what desired_state asked for and plays API server, Job
controller, kubelet and garbage collector on it, without I/O and with its own clock."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import Any

from builders import job_body

from finetune_operator.api import constants
from finetune_operator.api.finetunejob import FineTuneJob, parse_job
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.core.desired import Desired, desired_state
from finetune_operator.core.figures import Progress
from finetune_operator.core.nodes import parse_node
from finetune_operator.core.observed import INDEX_ANNOTATION, Claim, Observed, parse_observed
from finetune_operator.core.queueing import parse_workload
from finetune_operator.core.settings import RetryTiming, Settings
from finetune_operator.core.stages import Pipeline, derive_pipeline, is_finished
from finetune_operator.core.status import derive_status
from finetune_operator.core.times import format_time
from finetune_trainer import contract

SETTINGS = Settings(trainer_image="registry.example/finetune-trainer:0123abc", retry=RetryTiming(counted_first=10))
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)

Raw = dict[str, Any]


def successful_report(stage: str, output: str = "", *, reused: bool = False, **metrics: Any) -> str:
    """The termination message of a stage that did its work, or found it done."""
    folder = output or f"finetune/jobs/team-a/tiny/{stage}"
    artifacts = {stage: contract.ArtifactRef(folder, contract.digest_of([stage, folder]))}
    if stage == contract.PREPARE:
        artifacts["model"] = contract.ArtifactRef("finetune/models/tiny", contract.digest_of("model"))
    return contract.encode_report(
        contract.Report(stage, 0, artifacts=artifacts, metrics=metrics, reused=reused)
    ).decode()


@dataclass
class Simulation:
    """One FineTuneJob and its children. step() is one reconcile, without any I/O."""

    body: Raw = field(default_factory=job_body)
    now: datetime = START
    settings: Settings = SETTINGS
    jobs: dict[str, Raw] = field(default_factory=dict)
    services: dict[str, Raw] = field(default_factory=dict)
    pods: dict[str, Raw] = field(default_factory=dict)
    nodes: dict[str, Raw] = field(default_factory=dict)
    deleted_nodes: set[str] = field(default_factory=set)
    created_jobs: list[str] = field(default_factory=list)
    progress: Progress | None = None
    workloads: dict[str, Raw] = field(default_factory=dict)
    """Kueue's, by the uid of their owner."""
    kueue_installed: bool = False

    @property
    def job(self) -> FineTuneJob:
        return parse_job(self.body)

    def change(self, **spec: Any) -> None:
        """A new generation of the spec, as a user's edit makes."""
        changed = job_body(generation=self.body["metadata"]["generation"] + 1, **spec)
        self.body["spec"], self.body["metadata"] = changed["spec"], changed["metadata"]

    def state(self) -> Raw:
        """A copy of everything in the namespace."""
        kinds = ("body", "jobs", "services", "pods", "nodes")
        return copy.deepcopy({kind: getattr(self, kind) for kind in kinds})

    def observe(self) -> Observed:
        return parse_observed(
            jobs=self.jobs.values(),
            services=self.services.values(),
            pods=self.pods.values(),
            claim=Claim("workspace", "Bound"),
            nodes={name: parse_node(raw) for name, raw in self.nodes.items()},
            deleted_nodes=frozenset(self.deleted_nodes),
            workloads={owner: parse_workload(raw) for owner, raw in self.workloads.items()},
            kueue_installed=self.kueue_installed,
        )

    def decide(self) -> tuple[Pipeline, Desired]:
        job, observed = self.job, self.observe()
        pipeline = derive_pipeline(job, observed, self.settings, self.now, progress=self.progress)
        return pipeline, desired_state(job, observed, pipeline, self.settings, self.now)

    def step(self, upto: int | None = None) -> FineTuneJobStatus:
        """Reconcile once; with `upto`, die after that many writes, before the status is written."""
        job, observed = self.job, self.observe()
        if is_finished(job):
            return job.status
        pipeline, desired = self.decide()
        writes = [
            *((self._record, record) for record in desired.records),
            *((self._delete, deletion) for deletion in desired.deletions),
            *((self._create, manifest) for manifest in desired.manifests),
            *((self._record, record) for record in desired.late_records),
        ]
        for write, what in writes[:upto]:
            write(what)  # type: ignore[operator]
        status = derive_status(job, observed, pipeline, self.now)
        if upto is None:
            self.body["status"] = status.as_json()
        return status

    def settle(self, seconds: float = 0) -> FineTuneJobStatus:
        """Let time pass, then reconcile until nothing is left to write."""
        self.now += timedelta(seconds=seconds)
        for _ in range(50):
            before = copy.deepcopy(self.body.get("status"))
            status = self.step()
            if before == self.body.get("status") and (
                is_finished(self.job) or replace(self.decide()[1], wake_at=None) == Desired()
            ):
                return status
        raise AssertionError("the reconcile does not settle")

    def pods_of(self, stage: str) -> list[Raw]:
        """Pods of the stage's newest attempt, by index."""
        found = [pod for pod in self.pods.values() if pod["metadata"]["labels"][constants.LABEL_STAGE] == stage]
        newest = max((int(pod["metadata"]["labels"][constants.LABEL_ATTEMPT]) for pod in found), default=0)
        return [pod for pod in found if pod["metadata"]["labels"][constants.LABEL_ATTEMPT] == str(newest)]

    def end_pod(self, pod: Raw, code: int, message: str = "", reason: str = "") -> None:
        pod["status"]["phase"] = "Succeeded" if code == 0 else "Failed"
        terminated = {"exitCode": code, "reason": reason, "message": message, "finishedAt": format_time(self.now)}
        pod["status"]["containerStatuses"] = [{"name": "stage", "state": {"terminated": terminated}}]

    def run_stage(self, stage: str, **metrics: Any) -> None:
        """The stage's pods run to a good end."""
        for pod in self.pods_of(stage):
            self.pods[pod["metadata"]["name"]]["spec"]["nodeName"] = "node-1"
            self.end_pod(pod, 0, successful_report(stage, **metrics))

    def fail_stage(self, stage: str, code: int, message: str = "", index: int = 0) -> None:
        """One pod fails by itself; the Job controller stops the others, and all are gone but the first."""
        for pod in self.pods_of(stage):
            if int(pod["metadata"]["annotations"][INDEX_ANNOTATION]) == index:
                self.end_pod(pod, code, message)
            else:
                del self.pods[pod["metadata"]["name"]]

    def delete_job(self, name: str) -> None:
        """Deleted by hand: the garbage collector takes its pods."""
        del self.jobs[name]
        for pod in [p for p in self.pods.values() if p["metadata"]["labels"]["job-name"] == name]:
            del self.pods[pod["metadata"]["name"]]

    def _record(self, record: Any) -> None:
        there = {"Job": self.jobs, "Pod": self.pods}[record.kind].get(record.name)
        if there is None:
            return
        there["metadata"].setdefault("annotations", {}).update(record.annotations)
        if record.stop:
            # The Job controller's answer to a deadline: the pods get their grace period, here none, and the Job fails.
            self._end_job(record.name, "DeadlineExceeded")

    def _end_job(self, name: str, reason: str) -> None:
        for pod in [p for p in self.pods.values() if p["metadata"]["labels"]["job-name"] == name]:
            if pod["status"]["phase"] in ("Pending", "Running") and not pod["metadata"].get("deletionTimestamp"):
                del self.pods[pod["metadata"]["name"]]
        condition = {"type": "Failed", "status": "True", "reason": reason, "message": reason}
        self.jobs[name]["status"] = {"conditions": [condition]}

    def _delete(self, deletion: Any) -> None:
        if deletion.kind == "Job":
            self.delete_job(deletion.name)
        else:
            {"Service": self.services, "Pod": self.pods}[deletion.kind].pop(deletion.name, None)

    def _create(self, manifest: Raw) -> None:
        name, raw = manifest["metadata"]["name"], copy.deepcopy(manifest)
        raw["metadata"]["creationTimestamp"] = format_time(self.now)
        raw["metadata"]["uid"] = f"uid-of-{name}"
        kept = {"Job": self.jobs, "Service": self.services}[manifest["kind"]]
        assert name not in kept, f"{manifest['kind']} {name} was asked for twice"
        kept[name] = raw
        if manifest["kind"] == "Job":
            self.created_jobs.append(name)
            for index in range(manifest["spec"]["completions"]):
                self._create_pod(raw, index)

    def _create_pod(self, job: Raw, index: int) -> None:
        template = copy.deepcopy(job["spec"]["template"])
        name = f"{job['metadata']['name']}-{index}"
        labels = {**template["metadata"]["labels"], "job-name": job["metadata"]["name"]}
        self.pods[name] = {
            "metadata": {
                "name": name,
                "uid": f"uid-of-{name}",
                "labels": labels,
                "annotations": {**template["metadata"].get("annotations", {}), INDEX_ANNOTATION: str(index)},
            },
            "spec": template["spec"],
            "status": {"phase": "Pending"},
        }
