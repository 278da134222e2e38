"""Conditions: stable order, transition times that move only with the status."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from finetune_operator.api.conditions import MESSAGE_MAX_LENGTH, find_condition, with_condition
from finetune_operator.api.constants import STAGE_CONDITIONS, STAGE_PHASES, ConditionType, Reason
from finetune_operator.api.status import Condition, ConditionStatus
from finetune_trainer import contract

NOON = datetime(2026, 1, 2, 12, tzinfo=timezone.utc)


def put(
    conditions: tuple[Condition, ...],
    kind: ConditionType,
    status: ConditionStatus,
    *,
    minutes: int = 0,
    message: str = "",
) -> tuple[Condition, ...]:
    now = NOON + timedelta(minutes=minutes)
    return with_condition(conditions, kind, status, Reason.RUNNING, message, observed_generation=3, now=now)


def test_a_new_condition_is_complete() -> None:
    (condition,) = put((), ConditionType.TRAINED, "Unknown", message="Step 3 of 10.")
    assert condition.as_json() == {
        "type": "Trained",
        "status": "Unknown",
        "observedGeneration": 3,
        "lastTransitionTime": "2026-01-02T12:00:00Z",
        "reason": "Running",
        "message": "Step 3 of 10.",
    }


@pytest.mark.parametrize(
    ("status", "minutes"),
    [
        pytest.param("Unknown", 0, id="stays with the same status"),
        pytest.param("True", 5, id="moves with another status"),
    ],
)
def test_the_transition_time(status: ConditionStatus, minutes: int) -> None:
    before = put((), ConditionType.TRAINED, "Unknown")
    (after,) = put(before, ConditionType.TRAINED, status, minutes=5, message="new")
    assert after.last_transition_time == NOON + timedelta(minutes=minutes)
    assert after.message == "new"


def test_the_order_is_that_of_the_types_whatever_was_set_first() -> None:
    conditions: tuple[Condition, ...] = ()
    for kind in reversed(ConditionType):
        conditions = put(conditions, kind, "Unknown")
    assert [condition.type for condition in conditions] == [str(kind) for kind in ConditionType]
    assert put(conditions, ConditionType.MERGED, "Unknown", minutes=9) == conditions


def test_a_condition_of_another_release_is_kept_last() -> None:
    foreign = Condition(type="Blessed", status="True", last_transition_time=NOON, reason="Why")
    assert put((foreign,), ConditionType.PUBLISHED, "True")[-1] == foreign


def test_the_input_is_not_changed() -> None:
    before = put((), ConditionType.TRAINED, "Unknown")
    put(before, ConditionType.TRAINED, "True", minutes=1)
    assert before[0].status == "Unknown"


def test_a_message_beyond_the_bound_is_cut_with_an_ellipsis() -> None:
    (condition,) = put((), ConditionType.TRAINED, "True", message="x" * (MESSAGE_MAX_LENGTH + 1))
    assert len(condition.message) == MESSAGE_MAX_LENGTH
    assert condition.message.endswith("…")


def test_an_absent_condition_is_not_found() -> None:
    conditions = put((), ConditionType.TRAINED, "Unknown")
    assert find_condition(conditions, ConditionType.TRAINED) == conditions[0]
    assert find_condition(conditions, ConditionType.MERGED) is None


def test_every_stage_has_a_condition_and_a_phase() -> None:
    assert tuple(STAGE_CONDITIONS) == tuple(STAGE_PHASES) == contract.STAGES
