"""Observed: a frozen snapshot of one FineTuneJob's children, parsed from what the API server returned.

kube/observe.py reads the raw objects, parse_observed turns them into this. stages.py, desired.py and status.py decide
from it alone. Everything is grouped by attempt: one (stage, digest, number) with its Job, ConfigMap, Service and pods.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from finetune_operator.api import constants
from finetune_operator.core.records import ANNOTATION_DEFAULT_IMAGE, Outcome, find_outcome
from finetune_operator.core.times import parse_time

Raw = Mapping[str, Any]
"""One object as the API server's JSON."""

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
    """One pod of a stage. `deletion_requested_at` is when somebody asked for its deletion, before its grace period."""

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
    """The batch/v1 Job of one attempt. `completions` is the number of pods it runs."""

    name: str
    completions: int = 1
    created_at: datetime | None = None
    deleting: bool = False
    failed: Note | None = None
    complete: bool = False


@dataclass(frozen=True)
class Attempt:
    """All that exists of one attempt of one stage. `digest` is the 16 hexadecimal digits of the label.

    `default_image` is the operator's default when the attempt was made, "" where neither Job nor ConfigMap says it.
    """

    stage: str
    digest: str
    number: int
    name: str = ""
    job: StageJob | None = None
    config_map: bool = False
    service: bool = False
    pods: tuple[Pod, ...] = ()
    recorded: Outcome | None = None
    default_image: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.stage, self.digest, self.number)

    @property
    def live_pods(self) -> tuple[Pod, ...]:
        """The pods of which something may still run."""
        return tuple(pod for pod in self.pods if not pod.has_ended)


@dataclass(frozen=True)
class Claim:
    """The workspace's PersistentVolumeClaim; `phase` is None when it does not exist."""

    name: str
    phase: str | None


@dataclass(frozen=True)
class Observed:
    """Everything of one FineTuneJob that exists now. `secrets` maps a Secret's name to its keys, or None if missing."""

    attempts: tuple[Attempt, ...] = ()
    claim: Claim | None = None
    secrets: Mapping[str, frozenset[str] | None] = field(default_factory=dict)

    def of_stage(self, stage: str) -> tuple[Attempt, ...]:
        """The attempts of a stage, of whatever digest, by number."""
        return tuple(attempt for attempt in self.attempts if attempt.stage == stage)

    def of_digest(self, stage: str, digest: str) -> tuple[Attempt, ...]:
        """The attempts of a stage with that digest, by number."""
        return tuple(attempt for attempt in self.of_stage(stage) if attempt.digest == digest[:16])

    def is_anything_live(self) -> bool:
        """True while any pod of the job may run, of whatever stage or attempt."""
        return any(attempt.live_pods for attempt in self.attempts)


def parse_observed(
    *,
    jobs: Iterable[Raw] = (),
    config_maps: Iterable[Raw] = (),
    services: Iterable[Raw] = (),
    pods: Iterable[Raw] = (),
    claim: Claim | None = None,
    secrets: Mapping[str, frozenset[str] | None] | None = None,
) -> Observed:
    """Observed from lists that were selected by the job's uid. Objects without our labels are left out."""
    found: dict[tuple[str, str, int], Attempt] = {}

    def at(raw: Raw) -> Attempt | None:
        labels = raw["metadata"].get("labels") or {}
        stage, digest = labels.get(constants.LABEL_STAGE), labels.get(constants.LABEL_STAGE_DIGEST)
        number = labels.get(constants.LABEL_ATTEMPT, "")
        if not stage or not digest or not number.isdigit():
            return None
        key = (stage, digest, int(number))
        return found.get(key) or Attempt(*key)

    def keep(attempt: Attempt) -> None:
        found[attempt.key] = attempt

    for raw in config_maps:
        attempt = at(raw)
        if attempt is not None:
            name, annotations = raw["metadata"]["name"], raw["metadata"].get("annotations") or {}
            default, recorded = annotations.get(ANNOTATION_DEFAULT_IMAGE, ""), find_outcome(annotations)
            keep(replace(attempt, name=name, config_map=True, recorded=recorded, default_image=default))
    for raw in services:
        attempt = at(raw)
        if attempt is not None:
            keep(replace(attempt, name=raw["metadata"]["name"], service=True))
    for raw in jobs:
        attempt = at(raw)
        if attempt is not None:
            name, annotations = raw["metadata"]["name"], raw["metadata"].get("annotations") or {}
            default = annotations.get(ANNOTATION_DEFAULT_IMAGE) or attempt.default_image
            recorded = find_outcome(annotations) or attempt.recorded
            keep(replace(attempt, name=name, job=_parse_job(raw), recorded=recorded, default_image=default))
    for raw in pods:
        attempt = at(raw)
        if attempt is not None:
            keep(replace(attempt, pods=(*attempt.pods, _parse_pod(raw))))
    ordered = [
        replace(attempt, pods=tuple(sorted(attempt.pods, key=lambda pod: (pod.index, pod.name))))
        for attempt in found.values()
    ]
    ordered.sort(key=lambda attempt: attempt.key)
    return Observed(attempts=tuple(ordered), claim=claim, secrets=dict(secrets or {}))


def _conditions(raw: Raw) -> Iterable[Raw]:
    conditions: Iterable[Raw] = (raw.get("status") or {}).get("conditions") or ()
    return conditions


def _parse_job(raw: Raw) -> StageJob:
    metadata, spec = raw["metadata"], raw.get("spec") or {}
    failed = None
    complete = False
    for condition in _conditions(raw):
        if condition.get("status") != "True":
            continue
        if condition["type"] in ("Failed", "FailureTarget"):
            failed = Note(condition.get("reason") or "", condition.get("message") or "")
        elif condition["type"] == "Complete":
            complete = True
    return StageJob(
        name=metadata["name"],
        completions=int(spec.get("completions") or 1),
        created_at=parse_time(metadata.get("creationTimestamp")),
        deleting=bool(metadata.get("deletionTimestamp")),
        failed=failed,
        complete=complete,
    )


def _parse_pod(raw: Raw) -> Pod:
    metadata, status = raw["metadata"], raw.get("status") or {}
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    index = annotations.get(INDEX_ANNOTATION) or labels.get(INDEX_ANNOTATION) or "0"
    unschedulable = disruption = None
    for condition in _conditions(raw):
        note = Note(condition.get("reason") or "", condition.get("message") or "")
        if condition["type"] == "PodScheduled" and condition.get("status") == "False":
            unschedulable = note
        elif condition["type"] == "DisruptionTarget" and condition.get("status") == "True":
            disruption = note
    deleted = parse_time(metadata.get("deletionTimestamp"))
    if deleted is not None:
        deleted -= timedelta(seconds=int(metadata.get("deletionGracePeriodSeconds") or 0))
    state: Raw = {}
    for container in status.get("containerStatuses") or ():
        if container.get("name") == constants.CONTAINER_NAME:
            state = container.get("state") or {}
    waiting, ended = state.get("waiting"), state.get("terminated")
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
        running=state.get("running") is not None,
        terminated=_parse_terminated(ended) if ended else None,
    )


def _parse_terminated(raw: Raw) -> Terminated:
    return Terminated(
        exit_code=int(raw.get("exitCode") or 0),
        reason=raw.get("reason") or "",
        message=raw.get("message") or "",
        signal=raw.get("signal"),
        finished_at=parse_time(raw.get("finishedAt")),
    )
