"""FineTuneClient: FineTuneJobs from Python, in the style of Kubeflow's TrainerClient.

The commands of commands.py are made of these calls, so whatever a terminal can do a notebook can too. Everything goes
through the user's own kubeconfig and rights. Waiting is watching, and always bounded.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune_client.cluster import Cluster, Raw, connect
from finetune_client.errors import (
    ClientError,
    ClusterUnreachable,
    JobExists,
    JobFailed,
    JobNotFound,
    ManifestError,
    NothingToRetry,
    Refused,
    WaitTimeout,
)
from finetune_client.job import Job, JobList, JobReport, duration_text
from finetune_client.manifests import Source, check_manifest, read_manifest
from finetune_operator.api.conditions import find_condition
from finetune_operator.api.constants import (
    API_VERSION,
    CONTAINER_NAME,
    LABEL_ATTEMPT,
    LABEL_JOB_NAME,
    LABEL_STAGE,
    PLURAL,
    ConditionType,
    Reason,
    StageState,
)
from finetune_operator.api.status import Artifact
from finetune_trainer import contract

MANAGER = "finetune-client"
"""Field manager of what is written."""
_MERGE = "application/merge-patch+json"
REPORT_PAGE = "report/report.html"
"""Where the trainer's report/reporting.py leaves the page, below the job's folder; a test holds the two equal, for that
module needs more than is installed here."""
_STAGE_ENDED = frozenset(
    {StageState.SUCCEEDED, StageState.REUSED, StageState.SKIPPED, StageState.FAILED, StageState.SUSPENDED}
)
_LOG_SECONDS = 60.0
"""Longest silence of a log that is not followed; one that is may be silent for as long as its stage is."""
_Pods = list[Raw]
_STATUS_SECONDS = 30.0
"""How long the operator may take to tell of a stage's end after its pods are gone, before a log ends without it."""


class FineTuneClient:
    """FineTuneJobs of one cluster, as the user that the kubeconfig names.

    `namespace`, `context` and `kubeconfig` are as for kubectl: without them the current context and its namespace.
    Inside a cluster the pod's own service account. Every call but `list` means a job by its name in that namespace.
    ClusterUnreachable and Forbidden can come from each of them.
    """

    def __init__(
        self,
        *,
        namespace: str | None = None,
        context: str | None = None,
        kubeconfig: str | Path | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        file = None if kubeconfig is None else str(kubeconfig)
        self._cluster = cluster or connect(context=context, kubeconfig=file, namespace=namespace)
        self._asked_namespace = namespace

    @property
    def namespace(self) -> str:
        return self._cluster.namespace

    # ---- make and look

    def submit(self, job: Source, *, name: str | None = None, dry_run: bool = False) -> Job:
        """Make a FineTuneJob of a file, a manifest or a spec; as it was made.

        Everything that is wrong with it is told before the API server is asked (SpecError). With `dry_run` the API
        server checks it too, and nothing is made. JobExists when the name is taken.
        """
        manifest = read_manifest(job, name=name)
        check_manifest(manifest)
        namespace = manifest["metadata"].get("namespace") or self.namespace
        if self._asked_namespace not in (None, namespace):
            raise ManifestError(
                f"metadata.namespace is {namespace} and --namespace {self._asked_namespace}: change one of them"
            )
        query = {"fieldManager": MANAGER, **({"dryRun": "All"} if dry_run else {})}
        body = {**manifest, "metadata": {**manifest["metadata"], "namespace": namespace}}
        body.pop("status", None)
        try:
            return Job(self._cluster.call("POST", _path(namespace), query=query, body=body))
        except JobExists as error:
            taken = manifest["metadata"]["name"]
            raise JobExists(
                f"FineTuneJob {namespace}/{taken} exists: delete it, choose another name, or change its spec with "
                "`kubectl apply` (suspend it first where stages have begun)"
            ) from error

    def get(self, name: str) -> Job:
        """The job as it is now. JobNotFound when there is none."""
        try:
            return Job(self._cluster.call("GET", _path(self.namespace, name)))
        except JobNotFound as error:
            raise self._not_found(name) from error

    def list(self, *, all_namespaces: bool = False) -> JobList:
        """The jobs of the namespace, or of all of them, by name."""
        path = _path(None if all_namespaces else self.namespace)
        return JobList([Job(item) for item in self._cluster.call("GET", path).get("items") or ()])

    def watch(self, name: str, *, timeout: float = 86400) -> Iterator[Job]:
        """The job now and after each change, until it is finished or `timeout` seconds are over.

        JobNotFound when there is none, or when it is deleted.
        """
        for job in self._follow(name, timeout):
            yield job
            if job.is_finished:
                return

    def wait(self, name: str, *, timeout: float = 86400) -> Job:
        """The job at its end.

        JobFailed when it ended without its result: the message says why and what to do, `.job` is how it stands.
        WaitTimeout when it is not at its end after `timeout` seconds; it goes on.
        """
        last: Job | None = None
        for last in self.watch(name, timeout=timeout):
            if last.is_finished:
                break
        if last is None or not last.is_finished:
            how = "" if last is None else f"; it is {last.phase} ({last.status.reason}): {last.status.message}"
            raise WaitTimeout(f"{name} is not finished after {duration_text(timeout)}{how}")
        if last.failed:
            raise JobFailed(f"{name} failed: {last.status.reason}: {last.status.message}", last)
        return last

    # ---- logs

    def logs(
        self, name: str, *, stage: str | None = None, follow: bool = False, tail: int | None = None
    ) -> Iterator[str]:
        """Lines of the logs of a stage's newest attempt; of the current stage, or the last one, where none is named.

        Lines of several pods begin with the pod's name in brackets. With `follow` until the stage ends, over all its
        attempts, or the job does where no stage is named. Where no pod is left the last lines that the status keeps.
        """
        job = self.get(name)
        if stage is not None and job.status.stages and job.stage(stage) is None:
            names = ", ".join(each.name for each in job.status.stages)
            raise ClientError(f"--stage: {name} has no stage {stage!r}; it has {names}")
        if not follow:
            yield from self._logs_now(job, stage, tail)
            return
        yield from self._logs_followed(job, stage, tail)

    def _logs_now(self, job: Job, stage: str | None, tail: int | None) -> Iterator[str]:
        wanted = stage or _stage_with_logs(job)
        pods = _newest_attempt(self._pods(job.name, wanted))
        said = False
        for pod in pods:
            for line in self._log(pod, follow=False, tail=tail, prefix=len(pods) > 1):
                said = True
                yield line
        kept = job.stage(wanted) if wanted is not None else None
        if not said and kept is not None:
            yield from kept.log

    def _logs_followed(self, job: Job, stage: str | None, tail: int | None) -> Iterator[str]:
        seen: set[str] = set()
        while True:
            wanted = stage or (job.current_stage.name if job.current_stage is not None else None)
            fresh = [
                pod
                for pod in _newest_attempt(self._pods(job.name, wanted))
                if pod["metadata"]["uid"] not in seen and _has_log(pod)
            ]
            if fresh:
                seen |= {pod["metadata"]["uid"] for pod in fresh}
                yield from self._interleaved(fresh, tail)
                job = self._after_pods(job, wanted)
                continue
            shown = job.stage(stage) if stage is not None else None
            if job.is_finished or (shown is not None and shown.state in _STAGE_ENDED):
                return
            self._await_pod(job.name, seen)
            job = self.get(job.name)

    def _interleaved(self, pods: _Pods, tail: int | None) -> Iterator[str]:
        """The lines of all pods as they come, each pod read by a thread of its own, until all of them ended."""
        lines: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()

        def read(pod: Raw) -> None:
            try:
                for line in self._log(pod, follow=True, tail=tail, prefix=len(pods) > 1):
                    lines.put(line)
                lines.put(None)
            except ClientError as error:
                lines.put(error)

        for pod in pods:
            threading.Thread(target=read, args=(pod,), daemon=True).start()
        open_pods = len(pods)
        while open_pods:
            line = lines.get()
            if isinstance(line, JobNotFound) or line is None:
                open_pods -= 1
            elif isinstance(line, Exception):
                raise line
            else:
                yield line

    def _log(self, pod: Raw, *, follow: bool, tail: int | None, prefix: bool) -> Iterator[str]:
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        query = {"container": CONTAINER_NAME, **({"tailLines": str(tail)} if tail is not None else {})}
        if follow:
            query["follow"] = "true"
        mark = f"[{name}] " if prefix else ""
        path = f"/api/v1/namespaces/{namespace}/pods/{name}/log"
        silence = None if follow else _LOG_SECONDS
        try:
            for line in self._cluster.lines(path, query, silence_seconds=silence):
                yield f"{mark}{line}"
        except Refused:
            return  # the container has not started: it has no log yet

    def _pods(self, name: str, stage: str | None) -> _Pods:
        selector = f"{LABEL_JOB_NAME}={name}" + (f",{LABEL_STAGE}={stage}" if stage is not None else "")
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        pods: _Pods = self._cluster.call("GET", path, query={"labelSelector": selector}).get("items") or []
        return sorted(pods, key=lambda pod: str(pod["metadata"]["name"]))

    def _await_pod(self, name: str, seen: set[str]) -> None:
        """Until a pod of the job whose log was not read yet has one, or the job's status may have changed."""
        path, query = f"/api/v1/namespaces/{self.namespace}/pods", {"labelSelector": f"{LABEL_JOB_NAME}={name}"}
        for event, pod in self._cluster.follow(path, query, seconds=_STATUS_SECONDS):
            if event in ("LISTED", "ADDED", "MODIFIED") and pod["metadata"]["uid"] not in seen and _has_log(pod):
                return

    def _after_pods(self, job: Job, stage: str | None) -> Job:
        """The job once the operator has told what the pods' end means, or after a while as it is then."""
        before = job.stage(stage) if stage is not None else None
        for now in self._follow(job.name, _STATUS_SECONDS):
            job = now
            shown = job.stage(stage) if stage is not None else None
            moved = shown != before if stage is not None else True
            if job.is_finished or (moved and shown is not None and shown.state != StageState.RUNNING):
                return job
        return job

    # ---- results

    def report(self, name: str, *, workspace: str | Path | None = None) -> JobReport:
        """Where the job's results lie. `workspace`: the folder at which the claim's volume can be read here, if any."""
        job = self.get(name)
        results = job.status.artifacts
        found: dict[str, Artifact] = {}
        if results is not None:
            kinds = {"adapter": results.adapter, "model": results.model, "evaluation": results.evaluation}
            found.update({kind: artifact for kind, artifact in kinds.items() if artifact is not None})
        for stage in job.status.stages:
            if stage.artifact is not None and stage.artifact not in found.values():
                found[stage.name] = stage.artifact
        folder = contract.stage_output(job.namespace, job.name, "stage", "0" * 64).rpartition("/")[0]
        ended = {stage.name for stage in job.status.stages if stage.state in (StageState.SUCCEEDED, StageState.REUSED)}
        page_path = f"{folder}/{REPORT_PAGE}" if ended & contract.REPORTING else None
        page = None if workspace is None or page_path is None else Path(workspace) / page_path
        return JobReport(
            job=job.name,
            namespace=job.namespace,
            claim=(job.plain_spec.get("workspace") or {}).get("claimName"),
            folder=folder,
            artifacts=found,
            evaluation=job.status.evaluation,
            page_path=page_path,
            page=page if page is not None and page.is_file() else None,
        )

    # ---- change

    def suspend(self, name: str, *, wait: float | None = None) -> Job:
        """Hold the job: what runs gets time for a checkpoint and stops. With `wait` until no pod of it is left, at most
        so many seconds (WaitTimeout)."""
        job = self._patch(name, {"suspend": True})
        if wait is None:
            return job
        return self._until(name, _is_held, job.generation, wait, "suspended")

    def resume(self, name: str) -> Job:
        """Let a held job go on: stages that have their artifact are not run again, training goes on from its last
        checkpoint."""
        return self._patch(name, {"suspend": False})

    def retry(self, name: str, *, from_stage: str | None = None, timeout: float = 300) -> Job:
        """Try a failed job again as it is: suspended and resumed, which gives every stage its retries back.

        It goes on with the stage that failed; `from_stage` may name that one, for scripts that want to be sure.
        NothingToRetry when the job has not failed, or for a stage that is complete: its artifact is named by the digest
        of everything that it reads, so running it again with the same inputs would find it done. WaitTimeout when the
        operator does not take the job up within `timeout` seconds; it stays suspended then.
        """
        job = self.get(name)
        failed = next((stage.name for stage in job.status.stages if stage.state == StageState.FAILED), None)
        if not job.failed:
            if job.is_suspended:
                raise NothingToRetry(f"{name} is suspended, it did not fail: resume it")
            raise NothingToRetry(f"{name} has not failed, it is {job.phase}: {job.status.message or 'just submitted'}")
        if from_stage is not None and from_stage != failed:
            raise NothingToRetry(_why_not(job, from_stage, failed))
        held = self._patch(name, {"suspend": True})
        try:
            after = self._until(name, _is_taken_up, held.generation, timeout, "taken up by the operator")
        except WaitTimeout as error:
            raise WaitTimeout(f"{error}; it stays suspended: `finetune resume {name}` lets it go on") from error
        resumed = self._patch(name, {"suspend": False})
        if after.failed:
            raise JobFailed(f"{name} is refused as it is: {after.status.reason}: {after.status.message}", after)
        return resumed

    def delete(self, name: str, *, wait: float | None = None) -> None:
        """Delete the job; Kubernetes deletes what it owns. Its artifacts stay on the workspace.

        With `wait` until it is gone, at most so many seconds (WaitTimeout). JobNotFound when there is none.
        """
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        try:
            self._cluster.call("DELETE", _path(self.namespace, name), body=body)
        except JobNotFound as error:
            raise self._not_found(name) from error
        if wait is None:
            return
        try:
            for _ in self._follow(name, wait):
                pass
        except JobNotFound:
            return
        raise WaitTimeout(f"{name} is being deleted and still there after {duration_text(wait)}")

    def plan(self, job: Source, *, name: str | None = None, timeout: float = 60) -> Job:
        """What the cluster would do with a job: its status.plan, by a dry run that is deleted again.

        The dry run has a name of its own, so nothing of a job that is there is touched. SpecError as for submit;
        WaitTimeout when no operator answers within `timeout` seconds.
        """
        manifest = read_manifest(job, name=name)
        check_manifest(manifest)
        own = f"{manifest['metadata']['name'][:44].rstrip('-.')}-plan-{secrets.token_hex(4)}"
        spec = {**manifest["spec"], "dryRun": True}
        made = self.submit({**manifest, "metadata": {"name": own, "namespace": self.namespace}, "spec": spec})
        try:
            return self._until(own, lambda each: each.status.plan is not None, made.generation, timeout, "planned")
        except WaitTimeout as error:
            raise WaitTimeout(f"{error}: does the operator run? `finetune plan --offline` needs none") from error
        finally:
            with suppress(JobNotFound, ClusterUnreachable):
                self.delete(own)

    # ---- underneath

    def _patch(self, name: str, spec: Mapping[str, Any]) -> Job:
        query = {"fieldManager": MANAGER}
        path = _path(self.namespace, name)
        try:
            return Job(self._cluster.call("PATCH", path, query=query, body={"spec": spec}, content_type=_MERGE))
        except JobNotFound as error:
            raise self._not_found(name) from error

    def _follow(self, name: str, seconds: float) -> Iterator[Job]:
        """The job now and after each change, for so many seconds. JobNotFound when it is not or no more there."""
        there = False
        query = {"fieldSelector": f"metadata.name={name}"}
        for event, raw in self._cluster.follow(_path(self.namespace), query, seconds=seconds):
            if event == "SYNCED":
                if not there:
                    raise self._not_found(name)
                there = False  # by the next list it has to be there again
                continue
            if event == "DELETED":
                raise JobNotFound(f"{name} was deleted")
            there = event == "LISTED" or there
            yield Job(raw)

    def _until(self, name: str, holds: Callable[[Job], bool], generation: int, seconds: float, what: str) -> Job:
        """The job once the operator has seen this generation of it and `holds` is true."""
        begun = time.monotonic()
        for job in self._follow(name, seconds):
            if (job.status.observed_generation or 0) >= generation and holds(job):
                return job
        raise WaitTimeout(f"{name} was not {what} within {duration_text(time.monotonic() - begun)}")

    def _not_found(self, name: str) -> JobNotFound:
        return JobNotFound(
            f"there is no FineTuneJob {name} in namespace {self.namespace}; `finetune list -A` shows those there are"
        )


def _path(namespace: str | None, name: str = "") -> str:
    inside = "" if namespace is None else f"/namespaces/{namespace}"
    return f"/apis/{API_VERSION}{inside}/{PLURAL}" + (f"/{name}" if name else "")


def _is_held(job: Job) -> bool:
    held = find_condition(job.status.conditions, ConditionType.SUSPENDED)
    return held is not None and held.status == "True"


def _is_taken_up(job: Job) -> bool:
    """Held, or refused before it could be: then nothing of it runs either."""
    return _is_held(job) or job.failed


def _why_not(job: Job, wanted: str, failed: str | None) -> str:
    stage = job.stage(wanted)
    if stage is None:
        names = ", ".join(each.name for each in job.status.stages) or "none yet"
        return f"--from: {job.name} has no stage {wanted!r}; it has {names}"
    if stage.state in (StageState.SUCCEEDED, StageState.REUSED):
        return (
            f"--from: stage {wanted} is complete and is not run again with the same inputs: its artifact is named by "
            f"their digest. Change what it reads (suspend {job.name} first), or leave --from out to go on with {failed}"
        )
    return f"--from: stage {wanted} did not fail (it is {stage.state}); {failed or Reason.INVALID_SPEC} did"


def _stage_with_logs(job: Job) -> str | None:
    """The current stage if it has begun, else the last one that has."""
    begun = [stage.name for stage in job.status.stages if stage.attempt > 0]
    current = job.current_stage
    if current is not None and current.attempt > 0:
        return current.name
    return begun[-1] if begun else None


def _newest_attempt(pods: _Pods) -> _Pods:
    numbers = {_attempt(pod) for pod in pods}
    return [pod for pod in pods if _attempt(pod) == max(numbers)]


def _attempt(pod: Raw) -> tuple[str, int]:
    """(when the pod was made where stages differ, attempt): the newest of all comes last."""
    labels = pod["metadata"].get("labels") or {}
    number = str(labels.get(LABEL_ATTEMPT) or "0")
    order = labels.get(LABEL_STAGE)
    position = contract.STAGES.index(order) if order in contract.STAGES else -1
    return f"{position:02d}", int(number) if number.isdigit() else 0


def _has_log(pod: Raw) -> bool:
    """True when the stage's container runs or has ended."""
    for container in (pod.get("status") or {}).get("containerStatuses") or ():
        if container.get("name") == CONTAINER_NAME:
            return bool({"running", "terminated"} & set(container.get("state") or {}))
    return False
