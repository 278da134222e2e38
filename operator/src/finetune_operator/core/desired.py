"""desired_state: what has to be recorded, deleted and applied so that the cluster is as the pipeline wants it.

Called by reconcile.py, which does it in this order: records, deletions, manifests, late records. Pure and
deterministic; whatever is there already is not asked for again, so a settled job costs no write.

An attempt that has to end while its Job runs gets its outcome and a deadline of one second in one patch: the Job
controller then stops every pod with its grace period, and the Job stays as the attempt's memory. A Job that a queue has
not let start yet has nothing to remember, and is deleted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from finetune_operator.api import constants
from finetune_operator.api.constants import Reason, StageState
from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.api.status import MAX_ATTEMPTS
from finetune_operator.core import names
from finetune_operator.core.history import derive_history
from finetune_operator.core.inputs import GANGS, Start
from finetune_operator.core.nodes import find_fault
from finetune_operator.core.observed import Attempt, AttemptKey, Observed, Pod
from finetune_operator.core.pods import Placement, pod_template
from finetune_operator.core.preemptions import (
    checkpoint_annotations,
    find_preemption,
    noted_preemptions,
    preemption_annotations,
    with_preemption,
)
from finetune_operator.core.queueing import queue_labels
from finetune_operator.core.records import (
    ANNOTATION_DEFAULT_IMAGE,
    Outcome,
    Result,
    before_annotation,
    outcome_annotations,
)
from finetune_operator.core.settings import Settings
from finetune_operator.core.stages import Pipeline, StagePlan
from finetune_trainer import contract

JOB = "Job"
POD = "Pod"
SERVICE = "Service"
STOP_SECONDS = 1
"""Deadline that is put on a Job to end it: the least that the API takes."""
FORCE_AFTER_SECONDS = 5
"""A pod on a faulty node that is still there so long after its grace period is not waited for. With the default grace
the next attempt's pods are there within 30 seconds of the fault, whatever the node does."""

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """A merge patch of one child's annotations. `stop` ends a Job that runs; `outcome` is what is being recorded."""

    kind: str
    name: str
    annotations: Mapping[str, str]
    stop: bool = False
    outcome: Outcome | None = None
    log_of: str | None = None
    """Name of the pod whose last log lines belong to the outcome."""
    attempt: AttemptKey = ("", "", 0)
    """Whose end the outcome is."""

    @property
    def may_wait(self) -> bool:
        """True where nothing that is done next may destroy what the record says: a success ends nothing."""
        return self.outcome is not None and self.outcome.result is Result.SUCCEEDED


@dataclass(frozen=True)
class Deletion:
    """One child to delete, with its own grace period unless `grace_seconds` says another; 0 waits for no node."""

    kind: str
    name: str
    grace_seconds: int | None = None


@dataclass(frozen=True)
class Desired:
    """What to do, in order. `manifests` of one attempt stand together, its Job last.

    `late_records` are of attempts that succeeded: their pods tell the same until they are removed, so the next stage
    need not wait for that write. `carried` are those that a Job of `manifests` remembers: they are written late only
    where that Job cannot be made. `wake_at` is when a pod that is being stopped will have had its time.
    """

    records: tuple[Record, ...] = ()
    deletions: tuple[Deletion, ...] = ()
    manifests: tuple[Manifest, ...] = ()
    late_records: tuple[Record, ...] = ()
    carried: tuple[Record, ...] = ()
    wake_at: datetime | None = None


def desired_state(
    job: FineTuneJob, observed: Observed, pipeline: Pipeline, settings: Settings, now: datetime
) -> Desired:
    """The writes that bring the job's children from what is observed to what the pipeline says."""
    forced, wake_at = _drained_pods(observed, pipeline, settings, now)
    records = tuple(_records(job, observed, pipeline, now))
    late = tuple(each for each in records if each.may_wait)
    before = before_annotation({each.attempt: each.outcome for each in late if each.outcome is not None})
    manifests = tuple(
        manifest for stage in pipeline.stages for manifest in _manifests(job, stage, pipeline, settings, before, now)
    )
    carries = any(manifest["kind"] == JOB for manifest in manifests)
    # What a dry run's spec has no use for may be wanted again: it starts nothing and removes nothing.
    deletions = (*(() if job.spec.dry_run else _deletions(job, observed, pipeline)), *forced)
    return Desired(
        records=(
            *(each for each in records if not each.may_wait),
            *_forgotten(observed, pipeline, deletions),
            *_notes(observed, pipeline, now),
        ),
        deletions=deletions,
        manifests=manifests,
        late_records=() if carries else late,
        carried=late if carries else (),
        wake_at=wake_at,
    )


def _records(job: FineTuneJob, observed: Observed, pipeline: Pipeline, now: datetime) -> Iterator[Record]:
    for attempt in observed.attempts:
        stage_job = attempt.job
        if stage_job is None or _is_unwanted(attempt, pipeline):
            continue
        outcome = pipeline.outcome_of(attempt)
        if attempt.recorded is not None:
            if outcome is not None and outcome != attempt.recorded:
                yield Record(JOB, stage_job.name, outcome_annotations(outcome))
        elif outcome is not None:
            ended = replace(outcome, finished_at=outcome.finished_at or now, generation=job.generation)
            stop = outcome.result is not Result.SUCCEEDED and not stage_job.is_over
            log_of = outcome.pod if outcome.result is not Result.SUCCEEDED else None
            yield Record(JOB, stage_job.name, outcome_annotations(ended), stop, ended, log_of, attempt.key)
        elif not stage_job.deleting and not _never_started(attempt):
            stopped = _stopped(job, pipeline)
            if stopped is not None:
                begun = stage_job.created_at if any(pod.running or pod.has_ended for pod in attempt.pods) else None
                ended = replace(stopped, started_at=begun, finished_at=now, pod_seconds=attempt.pod_seconds(now))
                yield Record(JOB, stage_job.name, outcome_annotations(ended), True, ended, attempt=attempt.key)


def _forgotten(observed: Observed, pipeline: Pipeline, deletions: Iterable[Deletion]) -> Iterator[Record]:
    """What Jobs that go remember for others: it moves to those others' own Jobs first."""
    going = {deletion.name for deletion in deletions if deletion.kind == JOB}
    for attempt in observed.attempts:
        if attempt.remembered_by not in going or attempt.job is None or attempt.recorded is None:
            continue
        if attempt.job.name not in going and not _is_unwanted(attempt, pipeline):
            annotations = outcome_annotations(attempt.recorded)
            yield Record(JOB, attempt.job.name, annotations, outcome=attempt.recorded, attempt=attempt.key)


def _stopped(job: FineTuneJob, pipeline: Pipeline) -> Outcome | None:
    """The outcome of an attempt that is ended although nothing is wrong with it, or None while it may go on."""
    if job.spec.suspend:
        return Outcome(Result.SUSPENDED, Reason.SUSPENDED, "Stopped by spec.suspend.")
    if pipeline.deadline_passed:
        return Outcome(Result.SUSPENDED, Reason.DEADLINE_EXCEEDED, "Stopped by spec.activeDeadlineSeconds.")
    if pipeline.reservation_lost:
        return Outcome(Result.RETRY, Reason.PREEMPTED, pipeline.reservation_lost)
    return None


def _never_started(attempt: Attempt) -> bool:
    """True for a Job that a queue holds back and of which no pod is left."""
    return attempt.job is not None and attempt.job.suspended and not attempt.live_pods


def _notes(observed: Observed, pipeline: Pipeline, now: datetime) -> Iterator[Record]:
    """What is kept on the Jobs beside their outcomes: preemptions, and of the attempt under way its checkpoint."""
    current, progress = pipeline.current, pipeline.progress
    latest = current.latest.key if current is not None and current.latest is not None else None
    for attempt in observed.attempts:
        stage_job, annotations = attempt.job, dict[str, str]()
        if stage_job is None or stage_job.deleting or _is_unwanted(attempt, pipeline):
            continue
        ended = pipeline.outcome_of(attempt) is not None
        posted = progress if attempt.key == latest and not ended else None
        noted = noted_preemptions(stage_job.annotations)
        preemption = find_preemption(
            observed.workloads.get(stage_job.uid), noted, step=posted.step if posted is not None else None, ended=ended
        )
        if preemption is not None:
            annotations.update(preemption_annotations(with_preemption(noted, preemption)))
        if posted is not None and posted.checkpoint_step is not None:
            newest = checkpoint_annotations(
                stage_job.annotations, posted.checkpoint_step, posted.checkpoint_time or now, now
            )
            annotations.update(newest)
            if newest:
                yield from (Record(POD, pod.name, newest) for pod in attempt.live_pods)
        if annotations:
            yield Record(JOB, stage_job.name, annotations)


def _deletions(job: FineTuneJob, observed: Observed, pipeline: Pipeline) -> Iterator[Deletion]:
    for attempt in observed.attempts:
        if _is_unwanted(attempt, pipeline) or _is_long_past(attempt, pipeline):
            yield from _whole(attempt)
            continue
        stage_job = attempt.job
        if stage_job is None or stage_job.deleting or not _never_started(attempt) or stage_job.is_over:
            continue
        ended = attempt.recorded is not None and attempt.recorded.result is not Result.SUCCEEDED
        if ended or _stopped(job, pipeline) is not None:
            yield Deletion(JOB, stage_job.name)


def _drained_pods(
    observed: Observed, pipeline: Pipeline, settings: Settings, now: datetime
) -> tuple[tuple[Deletion, ...], datetime | None]:
    """Pods of attempts that ended by a node's fault or a hang: they get a short grace period, or none on a dead node.

    Also when the next such pod will have had its time.
    """
    deletions: list[Deletion] = []
    moments: list[datetime] = []
    for attempt in observed.attempts:
        outcome = pipeline.outcome_of(attempt)
        if outcome is None or outcome.reason not in _DRAINED:
            continue
        for pod in attempt.live_pods:
            if _is_on_dead_node(pod, observed):
                deletions.append(Deletion(POD, pod.name, 0))
                continue
            if pod.deletion_requested_at is None:
                deletions.append(Deletion(POD, pod.name, int(settings.nodes.drain_seconds)))
            due = (pod.deletion_requested_at or now) + timedelta(
                seconds=settings.nodes.drain_seconds + FORCE_AFTER_SECONDS
            )
            if now >= due:
                deletions.append(Deletion(POD, pod.name, 0))
            else:
                moments.append(due)
    return tuple(deletions), min(moments, default=None)


_DRAINED = frozenset({Reason.NODE_FAULT, Reason.NODE_LOST, Reason.HANGING})


def _is_on_dead_node(pod: Pod, observed: Observed) -> bool:
    if pod.node is None:
        return False
    fault = find_fault(observed.nodes.get(pod.node), deleted=pod.node in observed.deleted_nodes)
    return fault is not None and fault.is_dead


def _plan_of(attempt: Attempt, pipeline: Pipeline) -> StagePlan | None:
    return next((stage for stage in pipeline.stages if stage.name == attempt.stage), None)


def _is_unwanted(attempt: Attempt, pipeline: Pipeline) -> bool:
    """True for an attempt of a stage that the job has no more, or of inputs that it has no more.

    A stage whose inputs are not known yet has no digest: what it did before may turn out to be right.
    """
    plan = _plan_of(attempt, pipeline)
    if plan is None or plan.state is StageState.SKIPPED:
        return True
    return plan.digest is not None and attempt.digest != plan.digest[:16]


def _is_long_past(attempt: Attempt, pipeline: Pipeline) -> bool:
    """True for an attempt that the status shows no more and that no retry is counted by.

    Faults of the infrastructure may go on for days; the objects of their attempts must not heap up.
    """
    plan = _plan_of(attempt, pipeline)
    if plan is None or plan.latest is None or plan.latest.number - attempt.number < MAX_ATTEMPTS:
        return False
    outcome = attempt.recorded
    return outcome is None or (outcome.result is Result.RETRY and not outcome.counts)


def _whole(attempt: Attempt) -> Iterator[Deletion]:
    if attempt.job is not None and not attempt.job.deleting:
        yield Deletion(JOB, attempt.job.name)
    if attempt.service:
        yield Deletion(SERVICE, attempt.name)


def _manifests(
    job: FineTuneJob,
    stage: StagePlan,
    pipeline: Pipeline,
    settings: Settings,
    before: Mapping[str, str],
    now: datetime,
) -> Iterator[Manifest]:
    start = stage.start
    if start is None:
        return
    there = next((attempt for attempt in stage.attempts if attempt.number == start.number), None)
    if start.completions > 1 and (there is None or not there.service):
        yield service(job, start)
    if there is None or there.job is None:
        if stage.name in contract.REPORTING:
            history = derive_history(job, pipeline, settings, now)
            start = replace(start, config=replace(start.config, history=history))
        made = stage_job(job, start, settings, pipeline.placement)
        made["metadata"]["annotations"] = {**made["metadata"].get("annotations", {}), **before}
        yield made


def _metadata(job: FineTuneJob, start: Start, annotations: Mapping[str, str] | None = None) -> dict[str, Any]:
    return {
        "name": start.name,
        "namespace": job.namespace,
        "labels": _labels(job, start),
        **({"annotations": dict(annotations)} if annotations else {}),
        "ownerReferences": [
            {
                "apiVersion": constants.API_VERSION,
                "kind": constants.KIND,
                "name": job.name,
                "uid": job.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }


def _labels(job: FineTuneJob, start: Start) -> dict[str, str]:
    return names.attempt_labels(job.name, job.uid, start.config.stage, start.digest, start.number)


def service(job: FineTuneJob, start: Start) -> Manifest:
    """The headless Service by which the pods of a distributed stage find rank 0."""
    return {
        "apiVersion": "v1",
        "kind": SERVICE,
        "metadata": _metadata(job, start),
        "spec": {
            "clusterIP": "None",
            # Ranks look each other up before any of them can be ready.
            "publishNotReadyAddresses": True,
            "selector": _labels(job, start),
            "ports": [{"name": "rendezvous", "port": contract.RENDEZVOUS_PORT, "protocol": "TCP"}],
        },
    }


def stage_job(job: FineTuneJob, start: Start, settings: Settings, placement: Placement) -> Manifest:
    """The batch/v1 Job of the attempt. It never retries by itself: attempts are the operator's.

    A queued Job is made suspended. Kueue's webhook would see to that too, but a Job must not slip past the queue in a
    cluster where Kueue is being installed or has been removed.
    """
    stage = start.config.stage
    queued = queue_labels(job.spec.queue)
    metadata = _metadata(job, start, {ANNOTATION_DEFAULT_IMAGE: start.default_image})
    metadata["labels"] = {**metadata["labels"], **queued}
    labels = {**_labels(job, start), **queued}
    deadline = job.spec.stages.of(stage).active_deadline_seconds
    return {
        "apiVersion": "batch/v1",
        "kind": JOB,
        "metadata": metadata,
        "spec": {
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "completionMode": "Indexed" if stage in GANGS else "NonIndexed",
            "completions": start.completions,
            "parallelism": start.completions,
            **({"activeDeadlineSeconds": deadline} if deadline is not None else {}),
            **({"suspend": True} if queued else {}),
            "template": pod_template(job, start, settings, labels, placement),
        },
    }
