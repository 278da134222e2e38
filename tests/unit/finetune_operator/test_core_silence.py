"""Whose events are read, when, and what they say."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from finetune_operator.api.constants import Reason
from finetune_operator.core.observed import Attempt, Note, Pod, StageJob
from finetune_operator.core.records import Outcome, Result
from finetune_operator.core.silence import (
    LOOK_AGAIN_SECONDS,
    MOST_ASKED,
    SILENT_SECONDS,
    find_silent,
    newest_warning,
    next_look,
    to_ask,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
JOB = StageJob("tiny-train-01234567-1", completions=2, created_at=NOW, uid="job-uid")
CREATING = Note("ContainerCreating", "")


ENDED = Outcome(Result.RETRY, Reason.EVICTED)


def pod(index: int, **fields: Any) -> Pod:
    given: dict[str, Any] = {
        "node": "node-1",
        "created_at": NOW,
        "scheduled_at": NOW,
        "waiting": CREATING,
        "uid": f"uid-{index}",
        **fields,
    }
    return Pod(f"pod-{index}", index, "Pending", **given)


def attempt(*pods: Pod, **job: Any) -> Attempt:
    return Attempt("train", "0123456789abcdef", 1, JOB.name, replace(JOB, **job), pods=pods)


def asked(found: Attempt, seconds: float) -> list[str]:
    return [each.name for each in to_ask([found], NOW + timedelta(seconds=seconds))]


LATE = SILENT_SECONDS


@pytest.mark.parametrize(
    ("found", "names"),
    [
        pytest.param(attempt(), [JOB.name], id="a Job without a pod"),
        pytest.param(attempt(pod(0, running=True)), [JOB.name], id="a Job that lacks one of its pods"),
        pytest.param(attempt(pod(0), pod(1, running=True)), ["pod-0"], id="a pod on a node without its container"),
        pytest.param(attempt(pod(0, waiting=None), pod(1)), ["pod-0", "pod-1"], id="pods that no kubelet has seen"),
        pytest.param(attempt(pod(0, node=None), pod(1, running=True)), [], id="a pod that the scheduler speaks of"),
        pytest.param(
            attempt(pod(0, waiting=Note("ImagePullBackOff", "no")), pod(1, running=True)), [], id="a pod that says why"
        ),
        pytest.param(attempt(pod(0, running=True), pod(1, running=True)), [], id="pods that run"),
        pytest.param(attempt(pod(0, deletion_requested_at=NOW), pod(1, running=True)), [], id="a pod that goes"),
        pytest.param(attempt(suspended=True), [], id="a Job that a queue holds"),
        pytest.param(attempt(complete=True), [], id="a Job at its end"),
        pytest.param(attempt(deleting=True), [], id="a Job that goes"),
        pytest.param(
            replace(attempt(), recorded=Outcome(Result.RETRY, Reason.EVICTED)), [], id="an attempt that ended"
        ),
        pytest.param(replace(attempt(), job=None), [], id="an attempt without a Job"),
    ],
)
def test_only_what_is_silent_is_asked_and_only_after_a_while(found: Attempt, names: list[str]) -> None:
    assert asked(found, LATE - 1) == []
    assert asked(found, LATE) == names


def test_silence_begins_with_the_last_sign_of_life() -> None:
    later = NOW + timedelta(seconds=60)
    resumed = attempt(started_at=later)
    came = attempt(pod(0, running=True, created_at=later))
    bound = attempt(pod(0, scheduled_at=later), pod(1, running=True))
    for found in (resumed, came, bound):
        assert (asked(found, 60 + LATE - 1), len(asked(found, 60 + LATE))) == ([], 1)


def test_of_a_large_gang_only_the_first_pods_are_asked() -> None:
    found = attempt(*(pod(index) for index in range(64)), completions=64)
    assert asked(found, LATE) == [f"pod-{index}" for index in range(MOST_ASKED)]


def test_it_is_looked_again_when_a_silence_becomes_long_and_regularly_after_that() -> None:
    silent = find_silent(attempt(pod(0), pod(1, scheduled_at=NOW + timedelta(seconds=5))))
    dues = [next_look(silent, NOW + timedelta(seconds=seconds)) for seconds in (0, LATE, LATE + 5)]
    assert [(due - NOW) / timedelta(seconds=1) if due else None for due in dues] == [
        LATE,
        LATE + 5,
        LATE + 5 + LOOK_AGAIN_SECONDS,
    ]
    assert next_look((), NOW) is None


def event(
    reason: str, seconds: int, *, kind: str = "Warning", field: str = "deprecatedLastTimestamp"
) -> dict[str, Any]:
    at = (NOW + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
    told = {"series": {"count": 3, "lastObservedTime": at}} if field == "series" else {field: at}
    metadata = {"creationTimestamp": "2026-01-02T03:00:00Z"}
    return {"metadata": metadata, "type": kind, "reason": reason, "note": f"{reason} at {seconds}", **told}


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        pytest.param([], None, id="none"),
        pytest.param([event("FailedMount", 1)], "FailedMount", id="one warning"),
        pytest.param([event("FailedMount", 9), event("FailedAttachVolume", 2)], "FailedMount", id="the newer one"),
        pytest.param(
            [
                event("FailedCreate", 1),
                event("FailedMount", 5, field="eventTime"),
                event("FailedMapVolume", 9, field="series"),
            ],
            "FailedMapVolume",
            id="whatever field has the time",
        ),
        pytest.param(
            [event("FailedMount", 1), event("FailedScheduling", 1), event("Strange", 9)],
            "FailedMount",
            id="not the scheduler's, nor one that the table does not know",
        ),
        pytest.param([event("FailedMount", 1), event("Pulling", 9, kind="Normal")], None, id="one that is over"),
        pytest.param([event("Scheduled", 1, kind="Normal"), event("FailedMount", 9)], "FailedMount", id="after a step"),
        pytest.param(
            [event("FailedCreate", 3), event("SuccessfulCreate", 3, kind="Normal")],
            "FailedCreate",
            id="a refusal in the second of a success",
        ),
    ],
)
def test_the_newest_event_counts_if_it_is_a_warning(events: list[dict[str, Any]], reason: str | None) -> None:
    found = newest_warning(events)
    assert (found.reason if found is not None else None) == reason
    if found is not None:
        assert found.message.startswith(f"{reason} at ")
