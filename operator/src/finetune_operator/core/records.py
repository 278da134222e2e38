"""How an attempt ended, and how that is written on its Job so that it outlives the pods.

An Outcome is decided once (failure.py), stored by reconcile.py as annotations of the attempt's Job, and from then on
read back: the children are the operator's memory, its status is not. A success that a Job of the next stage follows at
once is remembered by that one, in the write that makes it. Everything stored is bounded, and a record of an earlier
release is read as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from finetune_operator.api import constants
from finetune_operator.api.constants import Reason
from finetune_operator.core.log_tail import MAX_LINE_LENGTH
from finetune_operator.core.times import format_time, parse_time
from finetune_trainer import contract

ANNOTATION_OUTCOME = f"{constants.PREFIX}outcome"
ANNOTATION_DEFAULT_IMAGE = f"{constants.PREFIX}default-image"
"""The operator's default trainer image when the attempt was made: an upgrade leaves started stages alone."""
ANNOTATION_BEFORE = f"{constants.PREFIX}ended-before"
"""On a Job: the successes that its making followed, which it remembers for their own Jobs."""
MESSAGE_MAX_LENGTH = 2048
LOG_MAX_LINES = 20
"""Lines of the failing container's log that are kept; each has at most log_tail.MAX_LINE_LENGTH characters."""
MAX_NODES = 64
"""Nodes of an attempt that are kept by name."""

_REASONS = {str(reason): reason for reason in Reason}
_REQUIRED = frozenset({"result", "reason", "message", "counts", "exitCode", "startedAt", "finishedAt", "generation"})
"""Keys that every record has."""


class Result(StrEnum):
    """What an ended attempt means for its stage."""

    SUCCEEDED = "Succeeded"
    RETRY = "Retry"
    FAIL = "Fail"
    SUSPENDED = "Suspended"
    """Stopped by spec.suspend: the next attempt follows on resume and is no restart."""


@dataclass(frozen=True)
class Outcome:
    """The end of one attempt. `counts` says whether a retry uses up retryPolicy.maxRetries.

    `generation` is the spec's when the end was judged. A failure of an earlier generation is forgiven: somebody has
    changed the spec since, or suspended and resumed the job.

    `pod` and `node` are those that failed first (`node` is None where no single one is to blame), `nodes` all that the
    attempt ran on. `log` is the end of that pod's log, without secrets. `step` is the last one that was done,
    `checkpoint_step` that of the newest complete checkpoint; None where nothing was posted. `pod_seconds` is the time
    for which its pods had a node, all together; None where an earlier release wrote the record.
    """

    result: Result
    reason: Reason
    message: str = ""
    counts: bool = False
    exit_code: int | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    report: contract.Report | None = None
    generation: int | None = None
    pod: str | None = None
    node: str | None = None
    nodes: tuple[str, ...] = ()
    log: tuple[str, ...] = ()
    step: int | None = None
    checkpoint_step: int | None = None
    pod_seconds: int | None = None

    @property
    def lost_steps(self) -> int | None:
        """Steps that the next attempt does again; None where it is not known how far this one came."""
        if self.step is None or self.result is Result.SUCCEEDED:
            return None
        return max(0, self.step - (self.checkpoint_step or 0))

    def is_held_against(self, generation: int) -> bool:
        """True for a failure that the present generation of the spec has to answer for."""
        return self.result in (Result.FAIL, Result.RETRY) and self.generation in (None, generation)


def outcome_annotations(outcome: Outcome) -> dict[str, str]:
    """The annotations that hold the outcome and, when there is one, the report."""
    annotations = {ANNOTATION_OUTCOME: contract.canonical_json(_as_json(outcome)).decode()}
    if outcome.report is not None:
        annotations[constants.ANNOTATION_REPORT] = contract.canonical_json(outcome.report.as_json()).decode()
    return annotations


def find_outcome(annotations: Mapping[str, str]) -> Outcome | None:
    """The outcome that was stored, or None.

    What a hand has edited into something unreadable counts as not stored: the pods are judged again, or the stage is
    run again and finds its artifact.
    """
    text = annotations.get(ANNOTATION_OUTCOME)
    if text is None:
        return None
    try:
        return _parse(json.loads(text), annotations.get(constants.ANNOTATION_REPORT))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def before_annotation(outcomes: Mapping[tuple[str, str, int], Outcome]) -> dict[str, str]:
    """The annotation by which a new Job remembers these successes, by the keys of their attempts; none for none."""
    if not outcomes:
        return {}
    entries = [
        {
            "stage": stage,
            "digest": digest,
            "attempt": number,
            "outcome": _as_json(outcome),
            "report": None if outcome.report is None else outcome.report.as_json(),
        }
        for (stage, digest, number), outcome in sorted(outcomes.items())
    ]
    return {ANNOTATION_BEFORE: contract.canonical_json(entries).decode()}


def find_before(annotations: Mapping[str, str]) -> dict[tuple[str, str, int], Outcome]:
    """The successes that before_annotation stored; what is unreadable counts as not stored, as for find_outcome."""
    found: dict[tuple[str, str, int], Outcome] = {}
    text = annotations.get(ANNOTATION_BEFORE)
    if text is None:
        return found
    try:
        for entry in json.loads(text):
            report = None if entry["report"] is None else json.dumps(entry["report"])
            outcome = _parse(entry["outcome"], report)
            if outcome is not None and outcome.result is Result.SUCCEEDED:
                found[str(entry["stage"]), str(entry["digest"]), int(entry["attempt"])] = outcome
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return found


def _as_json(outcome: Outcome) -> dict[str, Any]:
    value: dict[str, Any] = {
        "result": str(outcome.result),
        "reason": str(outcome.reason),
        "message": _cut(outcome.message, MESSAGE_MAX_LENGTH),
        "counts": outcome.counts,
        "exitCode": outcome.exit_code,
        "startedAt": format_time(outcome.started_at),
        "finishedAt": format_time(outcome.finished_at),
        "generation": outcome.generation,
        "pod": outcome.pod,
        "node": outcome.node,
        "nodes": list(outcome.nodes[:MAX_NODES]),
        "log": [_cut(line, MAX_LINE_LENGTH) for line in outcome.log[-LOG_MAX_LINES:]],
        "step": outcome.step,
        "checkpointStep": outcome.checkpoint_step,
        "podSeconds": outcome.pod_seconds,
    }
    return {key: item for key, item in value.items() if key in _REQUIRED or item not in (None, [])}


def _parse(value: Any, report: str | None) -> Outcome | None:
    """The outcome of _as_json's object and a report's JSON; None for a success without a report, which is none."""
    outcome = Outcome(
        result=Result(value["result"]),
        reason=_REASONS[value["reason"]],
        message=str(value["message"]),
        counts=bool(value["counts"]),
        exit_code=value["exitCode"],
        started_at=parse_time(value["startedAt"]),
        finished_at=parse_time(value["finishedAt"]),
        generation=value["generation"],
        report=None if report is None else contract.parse_report(report),
        pod=value.get("pod"),
        node=value.get("node"),
        nodes=tuple(str(node) for node in value.get("nodes") or ()),
        log=tuple(str(line) for line in value.get("log") or ()),
        step=value.get("step"),
        checkpoint_step=value.get("checkpointStep"),
        pod_seconds=value.get("podSeconds"),
    )
    return None if outcome.result is Result.SUCCEEDED and outcome.report is None else outcome


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
