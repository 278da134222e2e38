"""How an attempt ended, and how that is written on its Job so that it outlives the pods.

An Outcome is decided once (failure.py), stored by reconcile.py as annotations, and from then on read back: the children
are the operator's memory, its status is not. A suspended attempt's Job goes, so its outcome is kept on its ConfigMap.
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
from finetune_operator.core.times import format_time, parse_time
from finetune_trainer import contract

ANNOTATION_OUTCOME = f"{constants.PREFIX}outcome"
ANNOTATION_DEFAULT_IMAGE = f"{constants.PREFIX}default-image"
"""The operator's default trainer image when the attempt was made: an upgrade leaves started stages alone."""
MESSAGE_MAX_LENGTH = 2048

_REASONS = {str(reason): reason for reason in Reason}


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

    def is_held_against(self, generation: int) -> bool:
        """True for a failure that the present generation of the spec has to answer for."""
        return self.result in (Result.FAIL, Result.RETRY) and self.generation in (None, generation)


def outcome_annotations(outcome: Outcome) -> dict[str, str]:
    """The annotations that hold the outcome and, when there is one, the report."""
    value = {
        "result": str(outcome.result),
        "reason": str(outcome.reason),
        "message": outcome.message[:MESSAGE_MAX_LENGTH],
        "counts": outcome.counts,
        "exitCode": outcome.exit_code,
        "startedAt": format_time(outcome.started_at),
        "finishedAt": format_time(outcome.finished_at),
        "generation": outcome.generation,
    }
    annotations = {ANNOTATION_OUTCOME: contract.canonical_json(value).decode()}
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
        value: Any = json.loads(text)
        report_text = annotations.get(constants.ANNOTATION_REPORT)
        outcome = Outcome(
            result=Result(value["result"]),
            reason=_REASONS[value["reason"]],
            message=str(value["message"]),
            counts=bool(value["counts"]),
            exit_code=value["exitCode"],
            started_at=parse_time(value["startedAt"]),
            finished_at=parse_time(value["finishedAt"]),
            generation=value["generation"],
            report=None if report_text is None else contract.parse_report(report_text),
        )
    except (ValueError, KeyError, TypeError):
        return None
    return None if outcome.result is Result.SUCCEEDED and outcome.report is None else outcome
