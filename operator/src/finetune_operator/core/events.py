"""derive_events: what to tell of the change from one status to the next, as Kubernetes events of the FineTuneJob.

Called by reconcile.py after the status is written, with the status before and after: an event marks a transition, so a
reconcile that changes nothing posts nothing, and a restarted operator repeats none. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetune_operator.api.conditions import find_condition
from finetune_operator.api.constants import ConditionType, EventReason, Reason, StageState
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus, StageStatus, TrainingStatus

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


_KINDS = {
    Reason.NODE_FAULT: EventReason.NODE_FAULT_DETECTED,
    Reason.NODE_LOST: EventReason.NODE_FAULT_DETECTED,
    Reason.HANGING: EventReason.HANG_DETECTED,
    Reason.PREEMPTED: EventReason.PREEMPTED,
}
"""The event of an attempt's end, by its reason; any other is StageFailed."""


def _events(before: FineTuneJobStatus, after: FineTuneJobStatus) -> Iterator[Event]:
    if _turned(before, after, ConditionType.VALIDATED, "False"):
        yield Event(EventReason.VALIDATION_FAILED, after.message or "", warning=True)
    known = {stage.name: stage for stage in before.stages}
    for attempt in after.attempts:
        yield from _attempt_events(next((each for each in before.attempts if _is_same(each, attempt)), None), attempt)
    handed_over = any(
        stage.state in _DONE and stage.name in known and known[stage.name].state not in _DONE for stage in after.stages
    )
    for stage in after.stages:
        yield from _stage_events(known.get(stage.name), stage, handed_over=handed_over)
    yield from _checkpoint_events(before.training, after.training)
    yield from _verdict_events(before, after)


def _checkpoint_events(before: TrainingStatus | None, after: TrainingStatus | None) -> Iterator[Event]:
    newest = after.last_checkpoint if after is not None else None
    known = before.last_checkpoint if before is not None else None
    if after is not None and newest is not None and (known is None or newest.step > known.step):
        of = f" of {after.total_steps}" if after.total_steps is not None else ""
        yield Event(EventReason.CHECKPOINT_VERIFIED, f"train: the checkpoint of step {newest.step}{of} is complete.")


_ENDS = (Reason.RETRIES_EXHAUSTED, Reason.DEADLINE_EXCEEDED)
"""Ends of a job that no attempt's own end tells."""


def _verdict_events(before: FineTuneJobStatus, after: FineTuneJobStatus) -> Iterator[Event]:
    if _turned(before, after, ConditionType.EVALUATED, "True"):
        yield Event(EventReason.EVAL_PASSED, _figures(after))
    missed = find_condition(after.conditions, ConditionType.EVALUATED)
    if missed is not None and missed.reason == Reason.GATE_NOT_MET:
        if _turned(before, after, ConditionType.EVALUATED, "False"):
            yield Event(EventReason.EVAL_FAILED, missed.message, warning=True)
    elif after.reason in _ENDS and _turned(before, after, ConditionType.SUCCEEDED, "False"):
        yield Event(EventReason.STAGE_FAILED, f"{after.reason}: {after.message}", warning=True)
    if _turned(before, after, ConditionType.PUBLISHED, "True"):
        published = find_condition(after.conditions, ConditionType.PUBLISHED)
        yield Event(EventReason.PUBLISHED, published.message if published is not None else "")


def _figures(status: FineTuneJobStatus) -> str:
    """What evaluate measured of the tuned model beside the base model, as far as the status has it."""
    found = status.evaluation
    pairs = (
        ()
        if found is None
        else (
            ("held-out loss", found.tuned_loss, found.base_loss),
            ("exact match", found.tuned_exact_match, found.base_exact_match),
            ("ROUGE-L", found.tuned_rouge_l, found.base_rouge_l),
        )
    )
    told = [f"{name} {tuned:g} ({base:g})" for name, tuned, base in pairs if tuned is not None and base is not None]
    if not told:
        return "evaluate: base and tuned model were compared."
    return f"evaluate: {', '.join(told)} of the tuned (base) model."


_DONE = (StageState.SUCCEEDED, StageState.REUSED)


def _is_same(one: AttemptStatus, other: AttemptStatus) -> bool:
    """True for one end of one attempt, which may have several: a preempted Job goes on under its number."""
    return (one.stage, one.attempt, one.job_name, one.reason, one.end_time) == (
        other.stage,
        other.attempt,
        other.job_name,
        other.reason,
        other.end_time,
    )


def _attempt_events(before: AttemptStatus | None, after: AttemptStatus) -> Iterator[Event]:
    what = f"{after.stage}, attempt {after.attempt}"
    lost = "" if after.lost_steps is None else f", {after.lost_steps} steps lost"
    if before is None:
        kind = next((event for reason, event in _KINDS.items() if reason == after.reason), EventReason.STAGE_FAILED)
        yield Event(kind, f"{what} ({after.reason}){lost}: {after.message}", warning=True)
    if after.recovery_seconds is not None and (before is None or before.recovery_seconds is None):
        words = f"{what} ({after.reason}): the stage runs again after {after.recovery_seconds} s{lost}."
        yield Event(EventReason.ATTEMPT_RESTARTED, words)


def _stage_events(before: StageStatus | None, after: StageStatus, *, handed_over: bool) -> Iterator[Event]:
    """`handed_over`: another stage ended in the same write, whose own event says that the next one begins."""
    state, attempt = (before.state, before.attempt) if before is not None else (str(StageState.WAITING), 0)
    same_inputs = before is not None and before.input_digest == after.input_digest
    if after.state == StageState.QUEUED and (state != after.state or not same_inputs):
        yield Event(EventReason.QUEUED, f"{after.name}: {after.message or ''}")
    if state == StageState.QUEUED and after.state in _BEGUN and same_inputs:
        yield Event(EventReason.ADMITTED, f"{after.name}: Job {after.job_name}")
    begun = after.attempt > attempt or not same_inputs
    if after.state in _BEGUN and begun and after.attempt == 1 and not handed_over:
        yield Event(EventReason.STAGE_STARTED, f"{after.name}: Job {after.job_name}")
    if after.state == state and same_inputs:
        return
    if after.state in _DONE:
        kind = EventReason.STAGE_SUCCEEDED if after.state == StageState.SUCCEEDED else EventReason.STAGE_SKIPPED
        path = after.artifact.path if after.artifact is not None else ""
        yield Event(kind, f"{after.name}: {path}" + (" was there already" if kind == EventReason.STAGE_SKIPPED else ""))


def _turned(before: FineTuneJobStatus, after: FineTuneJobStatus, kind: ConditionType, value: str) -> bool:
    was = find_condition(before.conditions, kind)
    now = find_condition(after.conditions, kind)
    return now is not None and now.status == value and (was is None or was.status != value)
