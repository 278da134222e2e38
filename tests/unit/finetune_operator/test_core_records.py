"""Outcomes as annotations: read back as written, bounded, and readable when an earlier release wrote them."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.api.constants import Reason
from finetune_operator.core.log_tail import MAX_LINE_LENGTH
from finetune_operator.core.records import (
    ANNOTATION_BEFORE,
    ANNOTATION_OUTCOME,
    LOG_MAX_LINES,
    MAX_NODES,
    MESSAGE_MAX_LENGTH,
    Outcome,
    Result,
    before_annotation,
    find_before,
    find_outcome,
    outcome_annotations,
)
from finetune_trainer import contract

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
OUTCOME = Outcome(
    Result.RETRY,
    Reason.NODE_FAULT,
    "why",
    counts=False,
    exit_code=137,
    started_at=AT,
    finished_at=AT + timedelta(seconds=3),
    generation=4,
    pod="tiny-train-1-0",
    node="node-1",
    nodes=("node-1", "node-2"),
    log=("step 41", "step 42"),
    step=42,
    checkpoint_step=40,
)

times = st.none() | st.integers(0, 10**9).map(lambda seconds: AT + timedelta(seconds=seconds))
steps = st.none() | st.integers(0, 10**9)
lines = st.text(max_size=MAX_LINE_LENGTH)
outcomes = st.builds(
    Outcome,
    result=st.sampled_from([Result.RETRY, Result.FAIL, Result.SUSPENDED]),
    reason=st.sampled_from(Reason),
    message=st.text(max_size=MESSAGE_MAX_LENGTH),
    counts=st.booleans(),
    exit_code=st.none() | st.integers(0, 255),
    started_at=times,
    finished_at=times,
    generation=st.none() | st.integers(1, 1000),
    pod=st.none() | st.text(min_size=1, max_size=253),
    node=st.none() | st.text(min_size=1, max_size=253),
    nodes=st.lists(st.text(min_size=1, max_size=253), max_size=3).map(tuple),
    log=st.lists(lines, max_size=LOG_MAX_LINES).map(tuple),
    step=steps,
    checkpoint_step=steps,
    pod_seconds=steps,
)


@given(outcomes)
def test_an_outcome_is_read_back_as_it_was_written(outcome: Outcome) -> None:
    assert find_outcome(outcome_annotations(outcome)) == outcome


def test_a_record_is_bounded() -> None:
    long = replace(
        OUTCOME,
        message="m" * 5000,
        nodes=tuple(f"node-{index}" for index in range(500)),
        log=tuple(f"{index} " + "x" * 1000 for index in range(100)),
    )
    found = find_outcome(outcome_annotations(long))
    assert found is not None
    assert (len(found.message), found.message[-1]) == (MESSAGE_MAX_LENGTH, "…")
    assert len(found.nodes) == MAX_NODES
    assert len(found.log) == LOG_MAX_LINES
    assert found.log[-1].startswith("99 "), "the last lines are kept"
    assert {len(line) for line in found.log} == {MAX_LINE_LENGTH}


def test_what_an_earlier_release_recorded_is_read() -> None:
    text = (
        '{"counts":true,"exitCode":21,"finishedAt":"2026-01-02T03:04:08Z","generation":1,"message":"why",'
        '"reason":"RetryableError","result":"Retry","startedAt":"2026-01-02T03:04:05Z"}'
    )
    expected = Outcome(
        Result.RETRY, Reason.RETRYABLE_ERROR, "why", True, 21, AT, AT + timedelta(seconds=3), generation=1
    )
    assert find_outcome({ANNOTATION_OUTCOME: text}) == expected


def test_what_is_not_known_costs_no_room() -> None:
    value = json.loads(outcome_annotations(Outcome(Result.RETRY, Reason.EVICTED))[ANNOTATION_OUTCOME])
    assert {"pod", "node", "nodes", "log", "step", "checkpointStep"} & set(value) == set()


@pytest.mark.parametrize(
    ("step", "checkpoint", "lost"),
    [
        pytest.param(42, 40, 2, id="since the checkpoint"),
        pytest.param(42, None, 42, id="all without one"),
        pytest.param(40, 40, 0, id="none right after it"),
        pytest.param(38, 40, 0, id="never less than none"),
        pytest.param(None, 40, None, id="unknown without a step"),
    ],
)
def test_steps_lost(step: int | None, checkpoint: int | None, lost: int | None) -> None:
    assert replace(OUTCOME, step=step, checkpoint_step=checkpoint).lost_steps == lost


def test_a_success_loses_no_steps() -> None:
    assert replace(OUTCOME, result=Result.SUCCEEDED).lost_steps is None


@pytest.mark.parametrize("text", ["", "{}", '{"result":"Succeeded"}', "[1]", '{"result": 3}', "null", '"x"'])
def test_a_damaged_record_counts_as_none(text: str) -> None:
    assert find_outcome({ANNOTATION_OUTCOME: text}) is None


@pytest.mark.parametrize("change", [{"nodes": 3}, {"log": 3}, {"reason": "Unheard"}, {"startedAt": 5}])
def test_a_record_with_a_field_of_another_kind_counts_as_none(change: dict[str, object]) -> None:
    value = json.loads(outcome_annotations(OUTCOME)[ANNOTATION_OUTCOME]) | change
    assert find_outcome({ANNOTATION_OUTCOME: json.dumps(value)}) is None


SUCCESS = replace(
    OUTCOME,
    result=Result.SUCCEEDED,
    reason=Reason.COMPLETED,
    report=contract.Report("prepare", 0, artifacts={"prepare": contract.ArtifactRef("a/b", "sha256:" + "0" * 64)}),
)


def test_what_a_job_remembers_of_others_is_read_back() -> None:
    of = {("prepare", "0123456789abcdef", 1): SUCCESS, ("compile", "fedcba9876543210", 3): SUCCESS}
    assert find_before(before_annotation(of)) == of
    assert before_annotation({}) == {}


@pytest.mark.parametrize("text", ["", "{}", "3", "[3]", '[{"stage":"prepare"}]', "null"])
def test_damaged_memories_of_others_count_as_none(text: str) -> None:
    assert find_before({ANNOTATION_BEFORE: text}) == {}


def test_only_successes_are_remembered_for_others() -> None:
    failure = replace(SUCCESS, result=Result.RETRY)
    assert find_before(before_annotation({("prepare", "0123456789abcdef", 1): failure})) == {}
