"""Each preemption is found, remembered and told once, whoever looks and whenever."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from workloads import at, condition, evicted, pending, readmitted, recorded, reserved, workload

from finetune_operator.api.constants import (
    ANNOTATION_CHECKPOINT_STEP,
    ANNOTATION_CHECKPOINT_TIME,
    ANNOTATION_PREEMPTIONS,
)
from finetune_operator.core.preemptions import (
    MAX_NOTED,
    Noted,
    Preemption,
    checkpoint_annotations,
    find_preemption,
    noted_preemptions,
    preemption_annotations,
    with_preemption,
)
from finetune_operator.core.queueing import parse_workload

WORDS = "Preempted to accommodate a workload (UID: u, JobUID: j) due to prioritization in the ClusterQueue"
FIRST = Preemption(at(60), "Preempted", WORDS, step=37)


def find(raw: dict[str, Any], noted: Noted = Noted(), step: int | None = None) -> Preemption | None:  # noqa: B008
    return find_preemption(parse_workload(raw), noted, step=step)


def test_an_eviction_of_what_was_admitted_is_a_preemption() -> None:
    assert find(workload(*reserved(5), evicted("Preempted", WORDS, 60)), step=37) == FIRST


def test_it_is_still_one_when_the_quota_is_gone_already() -> None:
    no_reservation = condition("Admitted", "False", "NoReservation", "The workload has no reservation", 62)
    raw = workload(pending(WORDS, 62), no_reservation, evicted("Preempted", WORDS, 60))
    assert find(raw, step=37) == FIRST


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(workload(), id="new"),
        pytest.param(workload(pending("no quota")), id="waiting"),
        pytest.param(workload(*reserved(5)), id="admitted"),
        pytest.param(workload(pending("x"), evicted("Deactivated", "x", 60)), id="evicted before any admission"),
        pytest.param(
            workload(reserved(5)[0], evicted("AdmissionCheck", "x", 60)), id="evicted while a check was still open"
        ),
        pytest.param(
            workload(*reserved(5), evicted("Preempted", WORDS, 60), condition("Finished", "True", "Succeeded", "")),
            id="it finished before it was stopped",
        ),
    ],
)
def test_nothing_is_lost_where_nothing_was_stopped(raw: dict[str, Any]) -> None:
    assert find(raw) is None


def test_an_eviction_of_an_attempt_that_had_ended_by_itself_is_none() -> None:
    raw = parse_workload(workload(*reserved(5), evicted("Preempted", WORDS, 60)))
    assert find_preemption(raw, Noted(), ended=True) is None


def test_one_that_nobody_saw_is_found_after_the_end_too() -> None:
    raw = readmitted(WORDS, again=90)
    raw["status"]["conditions"].append(condition("Finished", "True", "Succeeded", "", 120))
    assert find_preemption(parse_workload(raw), Noted(), ended=True) == Preemption(at(90), "Preempted", WORDS)


def test_no_workload_is_no_preemption() -> None:
    assert find_preemption(None, Noted()) is None


def test_what_is_remembered_is_not_found_again() -> None:
    noted = with_preemption(Noted(), FIRST)
    assert find(workload(*reserved(5), evicted("Preempted", WORDS, 60)), noted) is None
    assert find(readmitted(WORDS, again=90), noted) is None
    second = find(workload(*reserved(90), evicted("Preempted", "again", 200)), noted)
    assert second == Preemption(at(200), "Preempted", "again")


def test_one_that_nobody_saw_is_found_by_kueues_count() -> None:
    missed = find(readmitted(WORDS, again=90))
    assert missed == Preemption(at(90), "Preempted", WORDS)
    assert find(readmitted(WORDS, again=90), with_preemption(Noted(), missed)) is None
    twice = readmitted(WORDS, again=90, evictions={"Preempted": 2})
    assert find(twice, with_preemption(Noted(), FIRST)) == missed


@pytest.mark.parametrize(
    ("job", "reasons"),
    [
        pytest.param("low", ["Preempted", "Preempted"], id="preempted twice"),
        pytest.param("runs", ["ClusterQueueStopped", "Deactivated"], id="drained, later deactivated"),
        pytest.param("high", [], id="the one that took the quota"),
        pytest.param("second", [], id="waited, ran, finished"),
    ],
)
@pytest.mark.parametrize("looks", [1, 2], ids=["seen each time", "looked at twice each time"])
def test_the_real_kueues_evictions_are_each_found_once(job: str, reasons: list[str], looks: int) -> None:
    noted = Noted()
    for moment, raw in recorded().items():
        for _ in range(looks if moment.startswith(f"{job}: ") else 0):
            found = find(raw, noted)
            noted = noted if found is None else with_preemption(noted, found)
    assert [each.reason for each in noted.last] == reasons


def test_the_real_kueues_preemption_is_found_by_who_comes_after_it() -> None:
    found = find(recorded()["low: high finished, low admitted again"])
    assert found is not None
    assert (found.reason, found.message.partition(" (UID")[0]) == (
        "Preempted",
        "Preempted to accommodate a workload",
    )


def test_one_that_was_deactivated_before_any_admission_lost_nothing() -> None:
    raw = readmitted("The workload is deactivated", again=90, evictions={"Deactivated": 1})
    del raw["status"]["accumulatedPastExexcutionTimeSeconds"]
    assert find(raw) is None


def test_a_deactivation_is_counted_by_the_word_that_kueue_counts_it_by() -> None:
    reason = "DeactivatedDueToMaximumExecutionTimeExceeded"
    noted = with_preemption(Noted(), Preemption(at(60), reason, "The workload is deactivated"))
    assert find(readmitted("The workload is deactivated", again=90, evictions={"Deactivated": 1}), noted) is None


def test_the_memory_is_bounded_and_still_counts() -> None:
    noted = Noted()
    for second in range(3 * MAX_NOTED):
        noted = with_preemption(noted, Preemption(at(second), "Preempted", "x" * 512))
    assert noted.total == 3 * MAX_NOTED
    assert [each.at for each in noted.last] == [at(second) for second in range(2 * MAX_NOTED, 3 * MAX_NOTED)]
    assert len(preemption_annotations(noted)[ANNOTATION_PREEMPTIONS]) < 8192


_PREEMPTIONS = st.builds(
    Preemption,
    at=st.integers(0, 10**6).map(at),
    reason=st.sampled_from(["Preempted", "PodsReadyTimeout", "LocalQueueStopped"]),
    message=st.text(max_size=64).filter(lambda text: text.isprintable()),
    step=st.none() | st.integers(0, 10**7),
)


@given(st.lists(_PREEMPTIONS, max_size=2 * MAX_NOTED))
def test_the_memory_is_read_back_as_it_was_written(preemptions: list[Preemption]) -> None:
    noted = Noted()
    for preemption in preemptions:
        noted = with_preemption(noted, preemption)
    assert noted_preemptions(preemption_annotations(noted)) == noted


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"last":[{}],"counts":{}}', '{"last":[],"counts":[]}', '{"last":[{"at":""}],"counts":{}}'],
)
def test_a_memory_that_a_hand_has_damaged_is_none(text: str) -> None:
    assert noted_preemptions({ANNOTATION_PREEMPTIONS: text}) == Noted()


def test_a_checkpoint_is_annotated_with_its_step_and_its_time() -> None:
    assert checkpoint_annotations({}, 400, at(7), at(8)) == {
        ANNOTATION_CHECKPOINT_STEP: "400",
        ANNOTATION_CHECKPOINT_TIME: "2026-01-02T03:04:12Z",
    }


def test_checkpoints_in_quick_succession_are_annotated_every_10_seconds() -> None:
    there = checkpoint_annotations({}, 10, at(0), at(0))
    assert checkpoint_annotations(there, 10, at(0), at(60)) == {}
    assert checkpoint_annotations(there, 20, at(4), at(4)) == {}
    assert checkpoint_annotations(there, 20, at(4), at(10))[ANNOTATION_CHECKPOINT_STEP] == "20"


def test_training_that_went_back_to_an_older_checkpoint_says_so() -> None:
    there = checkpoint_annotations({}, 20, at(0), at(0))
    assert checkpoint_annotations(there, 10, at(-30), at(60))[ANNOTATION_CHECKPOINT_STEP] == "10"


def test_an_unreadable_time_is_written_anew() -> None:
    there = {ANNOTATION_CHECKPOINT_STEP: "10", ANNOTATION_CHECKPOINT_TIME: "yesterday"}
    assert checkpoint_annotations(there, 20, at(1), at(1))[ANNOTATION_CHECKPOINT_STEP] == "20"


def test_the_annotation_is_json_that_a_person_can_read() -> None:
    value = json.loads(preemption_annotations(with_preemption(Noted(), FIRST))[ANNOTATION_PREEMPTIONS])
    assert value == {
        "counts": {"Preempted": 1},
        "last": [{"at": "2026-01-02T03:05:05Z", "message": WORDS, "reason": "Preempted", "step": 37}],
    }
