"""Observed: a frozen snapshot of one FineTuneJob's children, parsed from what the API server returned.

core/cache.py parses each object once, when a watch delivers it, and hands out an Observed for each reconcile.
stages.py, desired.py and status.py decide from it alone. Everything is grouped by attempt: one (stage, digest, number)
with its Job, Service and pods.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from finetune_operator.api import constants
from finetune_operator.core.records import (
    ANNOTATION_BEFORE,
    ANNOTATION_DEFAULT_IMAGE,
    ANNOTATION_OUTCOME,
    Outcome,
    find_before,
    find_outcome,
)
from finetune_operator.core.times import parse_time

if TYPE_CHECKING:
    from finetune_operator.core.nodes import NodeState
    from finetune_operator.core.queueing import Workload

Raw = Mapping[str, Any]
"""One object as the API server's JSON."""

AttemptKey = tuple[str, str, int]
"""Stage, the 16 hexadecimal digits of its digest's label, number of the attempt."""

INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True)
class Terminated:
    """How the stage's container ended. `signal` is None unless the kubelet reported one."""

    exit_code: int
    reason: str
    message: str
    signal: int | None
    finished_at: datetime | None


@dataclass(frozen=True)
class Note:
    """A reason and message in the words of Kubernetes (kubelet, scheduler, Job controller)."""

    reason: str
    message: str


@dataclass(frozen=True)
class Pod:
    """One pod of a stage. `deletion_requested_at` is when somebody asked for its deletion, before its grace period.

    `started_at` is when the stage's container began to run, `scheduled_at` when the pod was given its node.
    """

    name: str
    index: int
    phase: str
    node: str | None = None
    deletion_requested_at: datetime | None = None
    unschedulable: Note | None = None
    disruption: Note | None = None
    status: Note | None = None
    waiting: Note | None = None
    running: bool = False
    terminated: Terminated | None = None
    uid: str = ""
    started_at: datetime | None = None
    created_at: datetime | None = None
    scheduled_at: datetime | None = None

    @property
    def has_ended(self) -> bool:
        """True when nothing of it runs any more."""
        return self.terminated is not None or self.phase in ("Succeeded", "Failed")

    @property
    def has_failed(self) -> bool:
        return self.phase == "Failed" or (self.terminated is not None and self.terminated.exit_code != 0)

    @property
    def has_succeeded(self) -> bool:
        return not self.has_failed and self.has_ended


@dataclass(frozen=True)
class StageJob:
    """The batch/v1 Job of one attempt. `completions` is the number of pods it runs.

    `suspended` is spec.suspend: a queued Job that waits for Kueue, or one that Kueue took its quota from.
    """

    name: str
    completions: int = 1
    created_at: datetime | None = None
    deleting: bool = False
    failed: Note | None = None
    complete: bool = False
    uid: str = ""
    suspended: bool = False
    started_at: datetime | None = None
    recorded: Outcome | None = None
    before: Mapping[AttemptKey, Outcome] = field(default_factory=dict)
    """Successes of other attempts that this Job remembers, because their own Jobs need not be written to then."""
    default_image: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    """The operator's own annotations that are not parsed here: preemptions, checkpoint."""
    queued: bool = False
    """True when the Job carries a queue's label."""

    @property
    def is_over(self) -> bool:
        """True when the Job controller has ended it, or is about to."""
        return self.complete or self.failed is not None


@dataclass(frozen=True)
class Attempt:
    """All that exists of one attempt of one stage. `digest` is the 16 hexadecimal digits of the label.

    `default_image` is the operator's default when the attempt was made, "" where its Job is gone. `remembered_by` names
    another stage's Job that has what is `recorded`; None where the attempt's own has it, or none.
    """

    stage: str
    digest: str
    number: int
    name: str = ""
    job: StageJob | None = None
    service: bool = False
    pods: tuple[Pod, ...] = ()
    recorded: Outcome | None = None
    default_image: str = ""
    remembered_by: str | None = None

    @property
    def key(self) -> AttemptKey:
        return (self.stage, self.digest, self.number)

    @property
    def live_pods(self) -> tuple[Pod, ...]:
        """The pods of which something may still run."""
        return tuple(pod for pod in self.pods if not pod.has_ended)

    def pod_seconds(self, until: datetime) -> int:
        """Seconds for which the pods had a node, all together; those that have not ended are counted up to `until`."""
        total = timedelta()
        for pod in self.pods:
            begun = pod.scheduled_at or pod.started_at
            ended = (pod.terminated.finished_at if pod.terminated is not None else None) or until
            if begun is not None and begun < ended:
                total += ended - begun
        return round(total / timedelta(seconds=1))


@dataclass(frozen=True)
class Claim:
    """The workspace's PersistentVolumeClaim. `phase` is None when it does not exist."""

    name: str
    phase: str | None
    access_modes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Observed:
    """One job's children, and what its pods would mount as far as it was looked up.

    `nodes` are those of the cluster by name (empty where nodes are not watched), `deleted_nodes` the names of those
    that went away while the operator watched, `workloads` Kueue's by the uid of their owner.
    """

    attempts: tuple[Attempt, ...] = ()
    claim: Claim | None = None
    secrets: Mapping[str, frozenset[str] | None] = field(default_factory=dict)
    """Keys of each Secret that was looked up, None for one that does not exist."""
    nodes: Mapping[str, NodeState] = field(default_factory=dict)
    deleted_nodes: frozenset[str] = frozenset()
    workloads: Mapping[str, Workload] = field(default_factory=dict)
    kueue_installed: bool = False
    events: Mapping[str, Note] = field(default_factory=dict)
    """Newest warning by the name of the pod or Job that it is about, of those that do not start (silence.py)."""

    def of_stage(self, stage: str) -> tuple[Attempt, ...]:
        """Every attempt of a stage, of whatever digest."""
        return tuple(attempt for attempt in self.attempts if attempt.stage == stage)

    def of_digest(self, stage: str, digest: str) -> tuple[Attempt, ...]:
        """The attempts of a stage with that digest, by number."""
        return tuple(attempt for attempt in self.of_stage(stage) if attempt.digest == digest[:16])

    def is_anything_live(self) -> bool:
        """True while any pod of the job may run, of whatever stage or attempt."""
        return any(attempt.live_pods for attempt in self.attempts)

    def is_behind(self) -> bool:
        """True when a Job's end is known and its pods' end is not: two watches race, so the pods have to be read."""
        for attempt in self.attempts:
            job = attempt.job
            if job is None or job.deleting or attempt.recorded is not None or not job.is_over:
                continue
            if any(pod.has_failed for pod in attempt.pods):
                continue
            if len({pod.index for pod in attempt.pods if pod.has_succeeded}) < job.completions:
                return True
        return False


def find_attempt_key(raw: Raw) -> AttemptKey | None:
    """Stage, digest and number from an object's labels; None for an object that is no child of ours."""
    labels = raw["metadata"].get("labels") or {}
    stage, digest = labels.get(constants.LABEL_STAGE), labels.get(constants.LABEL_STAGE_DIGEST)
    number = labels.get(constants.LABEL_ATTEMPT, "")
    if not stage or not digest or not number.isdigit():
        return None
    return (stage, digest, int(number))


def group_attempts(
    jobs: Iterable[tuple[AttemptKey, StageJob]],
    pods: Iterable[tuple[AttemptKey, Pod]],
    services: Iterable[tuple[AttemptKey, str]] = (),
) -> tuple[Attempt, ...]:
    """The attempts that these parsed children make up, in the order of their keys."""
    found: dict[AttemptKey, Attempt] = {}
    jobs = list(jobs)

    def at(key: AttemptKey) -> Attempt:
        return found.get(key) or Attempt(*key)

    for key, name in services:
        found[key] = replace(at(key), name=name, service=True)
    for key, job in jobs:
        found[key] = replace(at(key), name=job.name, job=job, recorded=job.recorded, default_image=job.default_image)
    of_attempt: dict[AttemptKey, list[Pod]] = {}
    for key, pod in pods:
        of_attempt.setdefault(key, []).append(pod)
    for key, members in of_attempt.items():
        found[key] = replace(at(key), pods=tuple(sorted(members, key=lambda pod: (pod.index, pod.name))))
    for _, job in jobs:
        for key, outcome in job.before.items():
            attempt = found.get(key)
            if attempt is not None and attempt.job is not None and attempt.recorded is None:
                found[key] = replace(attempt, recorded=outcome, remembered_by=job.name)
    return tuple(found[key] for key in sorted(found))


def parse_observed(
    *,
    jobs: Iterable[Raw] = (),
    services: Iterable[Raw] = (),
    pods: Iterable[Raw] = (),
    claim: Claim | None = None,
    secrets: Mapping[str, frozenset[str] | None] | None = None,
    nodes: Mapping[str, NodeState] | None = None,
    deleted_nodes: frozenset[str] = frozenset(),
    workloads: Mapping[str, Workload] | None = None,
    kueue_installed: bool = False,
) -> Observed:
    """Observed from lists that were selected by the job's uid. Objects without our labels are left out."""

    def keyed(raws: Iterable[Raw]) -> Iterable[tuple[AttemptKey, Raw]]:
        for raw in raws:
            key = find_attempt_key(raw)
            if key is not None:
                yield key, raw

    return Observed(
        attempts=group_attempts(
            [(key, parse_stage_job(raw)) for key, raw in keyed(jobs)],
            [(key, parse_pod(raw)) for key, raw in keyed(pods)],
            [(key, raw["metadata"]["name"]) for key, raw in keyed(services)],
        ),
        claim=claim,
        secrets=dict(secrets or {}),
        nodes=dict(nodes or {}),
        deleted_nodes=deleted_nodes,
        workloads=dict(workloads or {}),
        kueue_installed=kueue_installed,
    )


def _conditions(raw: Raw) -> Iterable[Raw]:
    conditions: Iterable[Raw] = (raw.get("status") or {}).get("conditions") or ()
    return conditions


_PARSED_ANNOTATIONS = frozenset(
    {ANNOTATION_BEFORE, ANNOTATION_DEFAULT_IMAGE, ANNOTATION_OUTCOME, constants.ANNOTATION_REPORT}
)


def parse_stage_job(raw: Raw) -> StageJob:
    """The StageJob of a batch/v1 Job with our labels."""
    metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    annotations = metadata.get("annotations") or {}
    failed = None
    complete = False
    for condition in _conditions(raw):
        if condition.get("status") != "True":
            continue
        if condition["type"] in ("Failed", "FailureTarget"):
            failed = Note(condition.get("reason") or "", condition.get("message") or "")
        elif condition["type"] in ("Complete", "SuccessCriteriaMet"):
            complete = True
    return StageJob(
        name=metadata["name"],
        completions=int(spec.get("completions") or 1),
        created_at=parse_time(metadata.get("creationTimestamp")),
        deleting=bool(metadata.get("deletionTimestamp")),
        failed=failed,
        complete=complete,
        uid=metadata.get("uid") or "",
        suspended=bool(spec.get("suspend")),
        started_at=parse_time(status.get("startTime")),
        recorded=find_outcome(annotations),
        before=find_before(annotations),
        default_image=annotations.get(ANNOTATION_DEFAULT_IMAGE, ""),
        annotations={
            name: value
            for name, value in annotations.items()
            if name.startswith(constants.PREFIX) and name not in _PARSED_ANNOTATIONS
        },
        queued=constants.LABEL_QUEUE in (metadata.get("labels") or {}),
    )


def parse_pod(raw: Raw) -> Pod:
    """The Pod of a core/v1 Pod with our labels."""
    metadata, status = raw["metadata"], raw.get("status") or {}
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    index = annotations.get(INDEX_ANNOTATION) or labels.get(INDEX_ANNOTATION) or "0"
    unschedulable = disruption = scheduled_at = None
    for condition in _conditions(raw):
        note = Note(condition.get("reason") or "", condition.get("message") or "")
        if condition["type"] == "PodScheduled" and condition.get("status") == "False":
            unschedulable = note
        elif condition["type"] == "PodScheduled" and condition.get("status") == "True":
            scheduled_at = parse_time(condition.get("lastTransitionTime"))
        elif condition["type"] == "DisruptionTarget" and condition.get("status") == "True":
            disruption = note
    deleted = parse_time(metadata.get("deletionTimestamp"))
    if deleted is not None:
        deleted -= timedelta(seconds=int(metadata.get("deletionGracePeriodSeconds") or 0))
    state: Raw = {}
    for container in status.get("containerStatuses") or ():
        if container.get("name") == constants.CONTAINER_NAME:
            state = container.get("state") or {}
    waiting, running, ended = state.get("waiting"), state.get("running"), state.get("terminated")
    has_note = status.get("reason") or status.get("message")
    return Pod(
        name=metadata["name"],
        index=int(index) if index.isdigit() else 0,
        phase=status.get("phase") or "Pending",
        node=(raw.get("spec") or {}).get("nodeName"),
        deletion_requested_at=deleted,
        unschedulable=unschedulable,
        disruption=disruption,
        status=Note(status.get("reason") or "", status.get("message") or "") if has_note else None,
        waiting=Note(waiting.get("reason") or "", waiting.get("message") or "") if waiting else None,
        running=running is not None,
        terminated=_parse_terminated(ended) if ended else None,
        uid=metadata.get("uid") or "",
        started_at=parse_time((running or ended or {}).get("startedAt")),
        created_at=parse_time(metadata.get("creationTimestamp")),
        scheduled_at=scheduled_at,
    )


def _parse_terminated(raw: Raw) -> Terminated:
    return Terminated(
        exit_code=int(raw.get("exitCode") or 0),
        reason=raw.get("reason") or "",
        message=raw.get("message") or "",
        signal=raw.get("signal"),
        finished_at=parse_time(raw.get("finishedAt")),
    )
