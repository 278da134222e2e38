"""derive_events: what to tell of the change from one status to the next, as Kubernetes events of the FineTuneJob.

Called by reconcile.py after the status is written, with the status before and after: an event marks a transition, so a
reconcile that changes nothing posts nothing, and a restarted operator repeats none. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetune_operator.api.conditions import find_condition, is_true
from finetune_operator.api.constants import ConditionType, EventReason, StageState
from finetune_operator.api.status import FineTuneJobStatus, StageStatus

MESSAGE_MAX_BYTES = 1024
"""Longest note that the API server takes: it counts bytes of UTF-8."""

_BEGUN = (StageState.STARTING, StageState.RUNNING)


@dataclass(frozen=True)
class Event:
    """One event to post. `warning` is its type."""

    reason: EventReason
    message: str
    warning: bool = False


def derive_events(before: FineTuneJobStatus, after: FineTuneJobStatus) -> tuple[Event, ...]:
    """The events of one status write, in the order in which things happened."""
    return tuple(Event(event.reason, _cut(event.message), event.warning) for event in _events(before, after))


def _cut(message: str) -> str:
    return message.encode()[:MESSAGE_MAX_BYTES].decode(errors="ignore")


def _events(before: FineTuneJobStatus, after: FineTuneJobStatus) -> Iterator[Event]:
    if _turned(before, after, ConditionType.VALIDATED, "False"):
        yield Event(EventReason.VALIDATION_FAILED, after.message or "", warning=True)
    known = {stage.name: stage for stage in before.stages}
    seen = {(attempt.stage, attempt.attempt, attempt.job_name) for attempt in before.attempts}
    for attempt in after.attempts:
        if (attempt.stage, attempt.attempt, attempt.job_name) not in seen:
            words = f"{attempt.stage}, attempt {attempt.attempt} ({attempt.reason}): {attempt.message}"
            yield Event(EventReason.STAGE_FAILED, words, warning=True)
    for stage in after.stages:
        yield from _stage_events(known.get(stage.name), stage)
    if _turned(before, after, ConditionType.SUSPENDED, "True"):
        yield Event(EventReason.SUSPENDED, "No pod of the job is left.")
    if is_true(before.conditions, ConditionType.SUSPENDED) and not is_true(after.conditions, ConditionType.SUSPENDED):
        yield Event(EventReason.RESUMED, "The job goes on with what is done already.")
    if _turned(before, after, ConditionType.SUCCEEDED, "True"):
        yield Event(EventReason.SUCCEEDED, after.message or "")
    elif _turned(before, after, ConditionType.SUCCEEDED, "False"):
        yield Event(EventReason.FAILED, f"{after.reason}: {after.message}", warning=True)


def _stage_events(before: StageStatus | None, after: StageStatus) -> Iterator[Event]:
    state, attempt = (before.state, before.attempt) if before is not None else (str(StageState.WAITING), 0)
    same_inputs = before is not None and before.input_digest == after.input_digest
    begun = after.attempt > 0 and after.state not in (StageState.WAITING, StageState.SKIPPED, StageState.SUSPENDED)
    if begun and (not same_inputs or after.attempt > attempt) and after.state != StageState.RETRYING:
        if after.attempt > 1:
            yield Event(EventReason.ATTEMPT_RESTARTED, f"{after.name}, attempt {after.attempt}: {after.message or ''}")
        else:
            yield Event(EventReason.STAGE_STARTED, f"{after.name}: Job {after.job_name}")
    if after.state == state and same_inputs:
        return
    if after.state == StageState.SUCCEEDED:
        path = after.artifact.path if after.artifact is not None else ""
        yield Event(EventReason.STAGE_SUCCEEDED, f"{after.name}: {path}")
    elif after.state == StageState.REUSED:
        path = after.artifact.path if after.artifact is not None else ""
        yield Event(EventReason.STAGE_REUSED, f"{after.name}: {path} was there already")


def _turned(before: FineTuneJobStatus, after: FineTuneJobStatus, kind: ConditionType, value: str) -> bool:
    was = find_condition(before.conditions, kind)
    now = find_condition(after.conditions, kind)
    return now is not None and now.status == value and (was is None or was.status != value)
