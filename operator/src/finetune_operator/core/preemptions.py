"""Preemptions of a stage whose Job stays: found in its Workload, noted on its Job, shown once each.

Kueue suspends a preempted Job and admits it again later: the same Job, the same attempt. What happened is noted in an
annotation of the Job, by which status.attempts and events tell of it, whatever operator wrote it. Called by desired.py
and status.py. The other half is here too: the newest checkpoint as annotations of Job and pods, for whoever chooses
what to preempt. Pure: `now` is an argument.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from finetune_operator.api import constants
from finetune_operator.core.queueing import Workload
from finetune_operator.core.times import format_time, parse_time
from finetune_trainer import contract

MAX_NOTED = 10
"""Preemptions kept in full on a Job; the oldest fall out and stay counted."""
MAX_MESSAGE_LENGTH = 512
CHECKPOINT_SECONDS = 10
"""Least time between two updates of the checkpoint's annotations."""


@dataclass(frozen=True)
class Preemption:
    """One loss of quota while the stage ran. `reason` and `message` are Kueue's.

    `at` is when Kueue decided it; for one that no operator saw, when quota was given again. `step` is the last training
    step known then, None outside training.
    """

    at: datetime
    reason: str
    message: str
    step: int | None = None


@dataclass(frozen=True)
class Noted:
    """What a Job remembers: the last preemptions, oldest first, and how many there were by Kueue's reason."""

    last: tuple[Preemption, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Preemptions of the attempt so far."""
        return sum(self.counts.values())


def noted_preemptions(annotations: Mapping[str, str]) -> Noted:
    """What the Job's annotations remember; nothing where a hand has made them unreadable."""
    text = annotations.get(constants.ANNOTATION_PREEMPTIONS)
    if text is None:
        return Noted()
    try:
        value: Any = json.loads(text)
        last = tuple(_parse(entry) for entry in value["last"])
        return Noted(last, {str(reason): int(count) for reason, count in value["counts"].items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        return Noted()


def _parse(entry: Mapping[str, Any]) -> Preemption:
    at = parse_time(entry["at"])
    if at is None:
        raise ValueError("a preemption without its time")
    return Preemption(at, str(entry["reason"]), str(entry["message"]), entry["step"])


def find_preemption(
    workload: Workload | None, noted: Noted, *, step: int | None = None, ended: bool = False
) -> Preemption | None:
    """The preemption that the Job does not remember yet, or None. `step` is the last training step known.

    An eviction counts when the Workload had been admitted: before that no pod ran and nothing is lost. It does not when
    the attempt has `ended` first. One that came and went while no operator looked is found by Kueue's count of
    evictions, also when the attempt has ended since.
    """
    if workload is None or not workload.was_admitted:
        return None
    evicted = workload.evicted
    if evicted is not None:
        if ended or workload.finished or evicted.at is None or any(known.at == evicted.at for known in noted.last):
            return None
        return Preemption(evicted.at, evicted.reason, evicted.message[:MAX_MESSAGE_LENGTH], step)
    again = workload.readmitted
    if again is None or again.at is None:
        return None
    missed = sorted(kind for kind, count in workload.evictions.items() if count > noted.counts.get(_kind(kind), 0))
    return Preemption(again.at, missed[0], again.message[:MAX_MESSAGE_LENGTH], step) if missed else None


def with_preemption(noted: Noted, preemption: Preemption) -> Noted:
    """The memory with one more preemption."""
    kind = _kind(preemption.reason)
    counts = {**noted.counts, kind: noted.counts.get(kind, 0) + 1}
    return replace(noted, last=(*noted.last, preemption)[-MAX_NOTED:], counts=counts)


def _kind(reason: str) -> str:
    """The word by which Kueue counts an eviction: DeactivatedDueToMaximumExecutionTimeExceeded is a Deactivated."""
    return reason.partition("DueTo")[0]


def preemption_annotations(noted: Noted) -> dict[str, str]:
    """The Job's annotation for that memory: of bounded size, and the same text for the same memory."""
    value = {
        "last": [
            {"at": format_time(each.at), "reason": each.reason, "message": each.message, "step": each.step}
            for each in noted.last
        ],
        "counts": dict(noted.counts),
    }
    return {constants.ANNOTATION_PREEMPTIONS: contract.canonical_json(value).decode()}


def checkpoint_annotations(annotations: Mapping[str, str], step: int, at: datetime, now: datetime) -> dict[str, str]:
    """Annotations to put on a training's Job and pods for its newest checkpoint; empty when there is nothing to do.

    `annotations` are the Job's. A checkpoint less than CHECKPOINT_SECONDS after the annotated one waits until so much
    time has passed, so that a training with very frequent checkpoints costs few writes.
    """
    if annotations.get(constants.ANNOTATION_CHECKPOINT_STEP) == str(step):
        return {}
    try:
        before = parse_time(annotations.get(constants.ANNOTATION_CHECKPOINT_TIME))
    except ValueError:
        before = None
    if before is not None and now < before + timedelta(seconds=CHECKPOINT_SECONDS):
        return {}
    return {
        constants.ANNOTATION_CHECKPOINT_STEP: str(step),
        constants.ANNOTATION_CHECKPOINT_TIME: format_time(at) or "",
    }
