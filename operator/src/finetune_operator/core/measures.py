"""What happened to a job, as numbers for the metrics: from the change of its status, like its events.

derive_observations is called by reconcile.py after a status write, with the status before and after, so that a
reconcile that changes nothing measures nothing, and a restarted operator measures nothing twice. derive_goodput is
called by figures.py. Neither names a job: what they give ends in counters over all jobs. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

from finetune_operator.api.constants import StageState
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus, StageStatus

if TYPE_CHECKING:
    from finetune_operator.core.stages import StagePlan

RESULT_FAILED = "Failed"
"""Result of an attempt that ended without its artifact; the others are the stage's state, Succeeded or Reused."""


class Measure(StrEnum):
    """What an observation's value is."""

    STAGE_SECONDS = "stage_duration_seconds"
    """Life of one attempt, in seconds. Labels: stage, result."""
    QUEUE_SECONDS = "queue_wait_seconds"
    """Time that one attempt waited for its queue's quota, in seconds."""
    RESTARTS = "restarts"
    """Attempts that followed a failed one, and those that went on after a preemption. Label: the reason."""
    LOST_STEPS = "lost_steps"
    """Steps that a failed attempt had done since its last checkpoint."""
    RECOVERY_SECONDS = "time_to_recover_seconds"
    """From the fault until the next attempt ran, in seconds."""
    GOODPUT = "goodput_ratio"
    """Share, 0 to 1, of a training's time that went into steps which were kept."""


@dataclass(frozen=True)
class Observation:
    """One number. `labels` are the values that belong to the measure, in the order of its docstring."""

    measure: Measure
    value: float
    labels: tuple[str, ...] = ()


def derive_observations(before: FineTuneJobStatus, after: FineTuneJobStatus) -> tuple[Observation, ...]:
    """The observations of one status write. Equal statuses give none."""
    return tuple(_observations(before, after))


def _observations(before: FineTuneJobStatus, after: FineTuneJobStatus) -> Iterator[Observation]:
    were = {stage.name: stage for stage in before.stages}
    stages = {stage.name: stage for stage in after.stages}
    known = {_key(attempt): attempt for attempt in before.attempts}
    for attempt in after.attempts:
        stage, was = stages.get(attempt.stage), were.get(attempt.stage)
        yield from _of_attempt(was, stage, known.get(_key(attempt)), attempt)
    for stage in after.stages:
        yield from _of_stage(were.get(stage.name), stage, known, after)
    had = before.training.goodput if before.training is not None else None
    has = after.training.goodput if after.training is not None else None
    if has is not None and had is None:
        yield Observation(Measure.GOODPUT, has)


_Key = tuple[str, int, str | None, str, datetime | None]


def _key(attempt: AttemptStatus) -> _Key:
    """One entry of status.attempts. An attempt has several when it was preempted, went on, and ended later."""
    return (attempt.stage, attempt.attempt, attempt.job_name, attempt.reason, attempt.end_time)


def _of_attempt(
    was: StageStatus | None, stage: StageStatus | None, before: AttemptStatus | None, after: AttemptStatus
) -> Iterator[Observation]:
    """Of an attempt that was interrupted or ended. What that cost may be known later than that it happened."""
    goes_on = stage is not None and _is_its_stage(stage, after) and stage.state not in _ENDED
    begun = was.start_time if was is not None and _is_its_stage(was, after) else None
    if before is None and not goes_on and begun is not None and after.end_time is not None:
        seconds = max(0.0, (after.end_time - begun) / timedelta(seconds=1))
        yield Observation(Measure.STAGE_SECONDS, seconds, (after.stage, RESULT_FAILED))
    if after.lost_steps is not None and (before is None or before.lost_steps is None):
        yield Observation(Measure.LOST_STEPS, after.lost_steps)
    if after.recovery_seconds is not None and (before is None or before.recovery_seconds is None):
        yield Observation(Measure.RECOVERY_SECONDS, after.recovery_seconds)
        if goes_on:
            yield Observation(Measure.RESTARTS, 1, (after.reason,))


_ENDED = (StageState.RETRYING, StageState.FAILED)


def _is_its_stage(stage: StageStatus, attempt: AttemptStatus) -> bool:
    return (stage.attempt, stage.job_name) == (attempt.attempt, attempt.job_name)


def _of_stage(
    before: StageStatus | None, after: StageStatus, known: Mapping[_Key, AttemptStatus], status: FineTuneJobStatus
) -> Iterator[Observation]:
    same_inputs = before is not None and before.input_digest == after.input_digest
    state, attempt = (before.state, before.attempt) if before is not None and same_inputs else ("", 0)
    waited = before.queue_seconds if before is not None and same_inputs and attempt == after.attempt else None
    if after.queue_seconds is not None and waited is None:
        yield Observation(Measure.QUEUE_SECONDS, after.queue_seconds)
    for number in range(attempt, after.attempt) if attempt > 0 else ():
        ends = [entry for entry in status.attempts if (entry.stage, entry.attempt) == (after.name, number)]
        outlived = known.get(_key(ends[-1])) if ends else None
        # Without an end, or with none but preemptions that it outlived, spec.suspend ended it: no restart.
        if ends and (outlived is None or outlived.recovery_seconds is None):
            yield Observation(Measure.RESTARTS, 1, (ends[-1].reason,))
    is_done = after.state in (StageState.SUCCEEDED, StageState.REUSED)
    if is_done and after.state != state and after.duration_seconds is not None:
        yield Observation(Measure.STAGE_SECONDS, after.duration_seconds, (after.name, after.state))


def derive_goodput(train: StagePlan) -> float | None:
    """Share of a finished training's time, 0 to 1, that went into steps which were kept; None before its end.

    Every kept step is taken to last as long as those of the last attempt did. The time is that from the first attempt's
    start to the end, so restarts, repeated steps, checkpoints, loading and waiting in between all count against it. The
    term and the quotient are those of Google's ML Goodput Measurement (productive time over total time).
    """
    success, first = train.success, train.attempts[0] if train.attempts else None
    if success is None or success.report is None or success.finished_at is None or first is None:
        return None
    metrics = success.report.metrics
    numbers = [metrics.get(name) for name in ("totalSteps", "resumedFromStep", "stepSeconds")]
    if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers):
        return None
    total, resumed, seconds = (float(number or 0) for number in numbers)
    outcome = train.outcomes[0] if train.outcomes else None
    begun = outcome.started_at if outcome is not None else None
    if begun is None and first.job is not None:
        begun = first.job.created_at
    if begun is None or total <= resumed or first.number != 1:
        return None  # the first attempts' objects are gone, or nothing was left to do
    elapsed = (success.finished_at - begun) / timedelta(seconds=1)
    if elapsed <= 0:
        return None
    return round(min(1.0, total * seconds / (total - resumed) / elapsed), 4)
