"""Kueue: what its Workload says of a stage that waits for quota or holds it, and what a queued stage carries.

Called by desired.py (labels), stages.py and status.py (state), cache.py (parsing). Kueue alone admits: the operator
makes a queued stage's Job suspended and never lifts that itself. The words for people are Kueue's own, taken from the
Workload's conditions; their meanings are those of Kueue 0.12 (apis/kueue/v1beta1/workload_types.go), and v1beta2
differs in none that is read here. Pure: `now` is an argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol

from finetune_operator.api import constants
from finetune_operator.api.constants import Reason
from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.api.spec import Queue
from finetune_operator.api.status import ConditionStatus
from finetune_operator.core.times import parse_time

Raw = Mapping[str, Any]

GROUP = "kueue.x-k8s.io"
VERSIONS = ("v1beta1", "v1beta2")
"""Versions of Kueue's API that are understood, the one that the tests run first."""
NO_WORKLOAD_SECONDS = 10
"""Kueue makes a suspended Job's Workload within a second; none after so long will not come by itself."""
_CHECKS_REASON = "UnsatisfiedChecks"
"""Kueue's own word for a Workload that has quota and waits for an admission check."""


@dataclass(frozen=True)
class Eviction:
    """That Kueue took a Workload's admission back. `at` is when it decided so; the pods end after that."""

    reason: str
    message: str
    at: datetime | None


@dataclass(frozen=True)
class PodSetUpdate:
    """What an admission check adds to the pods."""

    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Workload:
    """One Workload. `owner_kind` is Job for a stage's, FineTuneJob for a reservation that the operator made."""

    name: str
    uid: str = ""
    owner_kind: str = ""
    owner_uid: str = ""
    queue: str = ""
    cluster_queue: str = ""
    active: bool = True
    deleting: bool = False
    quota_reserved: bool = False
    admitted: bool = False
    admitted_at: datetime | None = None
    """When the present admission began; None while there is none."""
    was_admitted: bool = False
    """True once it was ever admitted, so that pods may have run."""
    pods_ready: bool = False
    finished: bool = False
    evicted: Eviction | None = None
    """Set until Kueue reserves quota for it again."""
    readmitted: Eviction | None = None
    """The last eviction, once quota is reserved again; `at` is when that was."""
    requeued: bool = False
    evictions: Mapping[str, int] = field(default_factory=dict)
    """Kueue's own count of evictions by reason."""
    waiting_reason: str = ""
    """Why it is not admitted, Kueue's word; "" when it is, or when Kueue has said nothing yet."""
    waiting_message: str = ""
    flavors: Mapping[str, str] = field(default_factory=dict)
    """ResourceFlavor by resource."""
    updates: tuple[PodSetUpdate, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    """The operator's own labels, on a reservation."""


@dataclass(frozen=True)
class QueueState:
    """How the job stands with its queue: the QuotaReserved condition, and whether it `waits` for an admission."""

    status: ConditionStatus
    reason: str
    message: str
    waits: bool = False


class QueuedJob(Protocol):
    """What is read of a stage's Job; core/observed.py's StageJob has it."""

    @property
    def name(self) -> str: ...
    @property
    def created_at(self) -> datetime | None: ...
    @property
    def suspended(self) -> bool: ...
    @property
    def started_at(self) -> datetime | None: ...


def queue_labels(queue: Queue | None) -> dict[str, str]:
    """Labels of a queued stage's Job and of its pod template; none where the job's reservation holds the quota."""
    if queue is None or queue.policy == "wholePipeline":
        return {}
    labels = {constants.LABEL_QUEUE: queue.name}
    if queue.priority_class is not None:
        labels[constants.LABEL_QUEUE_PRIORITY] = queue.priority_class
    return labels


def find_api_version(group: Raw | None) -> str | None:
    """The `apiVersion` to read Workloads by, from the API server's answer to /apis/kueue.x-k8s.io (None: a 404).

    None where there is no Kueue, or only a version that is not understood.
    """
    served = {version.get("version") for version in (group or {}).get("versions") or ()}
    return next((f"{GROUP}/{version}" for version in VERSIONS if version in served), None)


def parse_workload(raw: Raw) -> Workload:
    """The Workload of an object of v1beta1 or v1beta2."""
    metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    conditions = {condition["type"]: condition for condition in status.get("conditions") or ()}
    owner = _controller(metadata.get("ownerReferences") or ())
    admission = status.get("admission") or {}
    reserved, admitted = _is_true(conditions, "QuotaReserved"), _is_true(conditions, "Admitted")
    evicted = conditions.get("Evicted")
    checks = status.get("admissionChecks") or ()
    reason, message = ("", "") if admitted else _waiting(conditions, checks, reserved=reserved)
    return Workload(
        name=metadata["name"],
        uid=metadata.get("uid") or "",
        owner_kind=owner.get("kind") or "",
        owner_uid=owner.get("uid") or "",
        queue=spec.get("queueName") or "",
        cluster_queue=admission.get("clusterQueue") or "",
        active=spec.get("active") is not False,
        deleting=bool(metadata.get("deletionTimestamp")),
        quota_reserved=reserved,
        admitted=admitted,
        admitted_at=parse_time(conditions["Admitted"].get("lastTransitionTime")) if admitted else None,
        was_admitted="Admitted" in conditions,
        pods_ready=_is_true(conditions, "PodsReady"),
        finished=_is_true(conditions, "Finished"),
        evicted=_eviction(evicted) if evicted is not None and evicted.get("status") == "True" else None,
        readmitted=_readmitted(evicted, status),
        requeued=_is_true(conditions, "Requeued"),
        evictions=_evictions(status),
        waiting_reason=reason,
        waiting_message=message,
        flavors=_flavors(admission),
        updates=tuple(_update(update) for check in checks for update in check.get("podSetUpdates") or ()),
        labels={
            name: value for name, value in (metadata.get("labels") or {}).items() if name.startswith(constants.PREFIX)
        },
    )


def _controller(owners: Iterable[Raw]) -> Raw:
    return next((owner for owner in owners if owner.get("controller")), {})


def _is_true(conditions: Mapping[str, Raw], kind: str) -> bool:
    return conditions.get(kind, {}).get("status") == "True"


def _waiting(conditions: Mapping[str, Raw], checks: Iterable[Raw], *, reserved: bool) -> tuple[str, str]:
    if not reserved:
        condition = conditions.get("QuotaReserved", {})
        return condition.get("reason") or "", condition.get("message") or ""
    words = [f"{check['name']}: {check.get('state')}. {check.get('message') or ''}".strip() for check in checks]
    return conditions.get("Admitted", {}).get("reason") or _CHECKS_REASON, "; ".join(words)


def _eviction(condition: Raw) -> Eviction:
    at = parse_time(condition.get("lastTransitionTime"))
    return Eviction(condition.get("reason") or "", condition.get("message") or "", at)


def _readmitted(condition: Raw | None, status: Raw) -> Eviction | None:
    """With new quota Kueue turns Evicted to False and keeps the old message behind a word (SetQuotaReservation)."""
    ran = any(status.get(name) is not None for name in _PAST_EXECUTION)
    if condition is None or condition.get("status") != "False" or condition.get("reason") != "QuotaReserved" or not ran:
        return None
    before = _eviction(condition)
    return Eviction("", before.message.removeprefix("Previously: "), before.at)


_PAST_EXECUTION = ("accumulatedPastExexcutionTimeSeconds", "accumulatedPastExecutionTimeSeconds")
"""Time admitted before, in seconds: v1beta1 spells it so. Kueue sets it only when an admission ends."""


def _evictions(status: Raw) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in (status.get("schedulingStats") or {}).get("evictions") or ():
        counts[entry["reason"]] = counts.get(entry["reason"], 0) + int(entry.get("count") or 0)
    return counts


def _flavors(admission: Raw) -> dict[str, str]:
    return {
        resource: flavor
        for assignment in admission.get("podSetAssignments") or ()
        for resource, flavor in sorted((assignment.get("flavors") or {}).items())
    }


def _update(raw: Raw) -> PodSetUpdate:
    return PodSetUpdate(
        node_selector=dict(raw.get("nodeSelector") or {}),
        tolerations=tuple(dict(toleration) for toleration in raw.get("tolerations") or ()),
        labels=dict(raw.get("labels") or {}),
        annotations=dict(raw.get("annotations") or {}),
    )


def derive_queue_state(
    job: FineTuneJob,
    stage_job: QueuedJob | None,
    workload: Workload | None,
    *,
    kueue_installed: bool,
    now: datetime,
) -> QueueState | None:
    """How the job stands with its queue; None for a job without spec.queue.

    `stage_job` is the current attempt's Job and `workload` that Job's; with the policy wholePipeline `workload` is the
    job's reservation, and `stage_job` is what runs where there is no Kueue any more.
    """
    queue = job.spec.queue
    if queue is None:
        return None
    what = "The whole pipeline"
    if queue.policy == "perStage":
        if stage_job is None:
            return QueueState("Unknown", Reason.PENDING, "No stage waits for quota or holds any.")
        what = f"Job {stage_job.name}"
    if not kueue_installed:
        if stage_job is not None and not stage_job.suspended:
            message = f"Job {stage_job.name} runs, and the cluster has no Kueue any more."
            return QueueState("Unknown", Reason.RUNNING, message)
        message = (
            f"{what} waits for LocalQueue {queue.name}, and this cluster has no Kueue: no understood version of "
            f"{GROUP} is served. Install Kueue, or remove spec.queue; nothing starts before."
        )
        return QueueState("False", Reason.QUEUE_UNAVAILABLE, message, waits=True)
    if workload is None:
        return _no_workload(job, queue, stage_job if queue.policy == "perStage" else None, now)
    if workload.finished:
        return QueueState("Unknown", Reason.COMPLETED, f"The quota of Workload {workload.name} is given back.")
    if workload.evicted is not None and (workload.quota_reserved or not workload.active):
        return _evicted(job, workload, workload.evicted)
    if workload.admitted:
        message = f"{what} was admitted by ClusterQueue {workload.cluster_queue}."
        return QueueState("True", "Admitted", message)
    if not workload.waiting_reason:
        message = f"Kueue has not considered Workload {workload.name} of LocalQueue {queue.name} yet."
        return QueueState("False", Reason.QUEUED, message, waits=True)
    message = workload.waiting_message or f"Workload {workload.name} waits in LocalQueue {queue.name}."
    return QueueState("False", workload.waiting_reason, message, waits=True)


def _no_workload(job: FineTuneJob, queue: Queue, stage_job: QueuedJob | None, now: datetime) -> QueueState:
    if stage_job is None:
        message = f"The reservation for LocalQueue {queue.name} is being made."
        return QueueState("False", Reason.QUEUED, message, waits=True)
    if not stage_job.suspended:
        return QueueState("Unknown", Reason.RUNNING, f"Job {stage_job.name} runs without a Workload of Kueue.")
    due = no_workload_at(stage_job)
    if due is None or now < due:
        return QueueState("False", Reason.QUEUED, f"Kueue has not seen Job {stage_job.name} yet.", waits=True)
    causes = "its controller does not run, or it does not manage Jobs in this namespace"
    if queue.priority_class is not None:
        causes = f"there is no WorkloadPriorityClass {queue.priority_class}, {causes}"
    message = (
        f"Kueue has made no Workload for Job {stage_job.name} in {NO_WORKLOAD_SECONDS} seconds: {causes}. "
        f"`kubectl describe job {stage_job.name} -n {job.namespace}` and the log of kueue-controller-manager have the "
        "cause."
    )
    return QueueState("False", Reason.QUEUE_UNAVAILABLE, message, waits=True)


def no_workload_at(stage_job: QueuedJob) -> datetime | None:
    """When a suspended Job without a Workload is to be looked at again."""
    return None if stage_job.created_at is None else stage_job.created_at + timedelta(seconds=NO_WORKLOAD_SECONDS)


_ACTIVATE = '{"spec":{"active":true}}'


def _evicted(job: FineTuneJob, workload: Workload, eviction: Eviction) -> QueueState:
    reason, message = eviction.reason or "Evicted", eviction.message
    if not workload.active:
        command = f"kubectl patch workload {workload.name} -n {job.namespace} --type=merge -p"
        message = (
            f"{message.rstrip('.')}. Kueue does not admit it again by itself: once the cause is gone, "
            f"`{command} '{_ACTIVATE}'`."
        )
    return QueueState("False", reason, message, waits=True)


def queue_wait_seconds(since: datetime | None, workload: Workload | None, now: datetime) -> float | None:
    """Seconds from `since` (the Job's creation, or the last preemption) to the admission, or to now before it.

    None while either end is unknown.
    """
    if since is None:
        return None
    until = now if workload is None or not workload.admitted else workload.admitted_at
    return None if until is None else max(0.0, (until - since) / timedelta(seconds=1))
