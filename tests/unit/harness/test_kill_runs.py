"""Which deaths the kill tests choose, and what they call wrong."""

from __future__ import annotations

from typing import Any

import pytest
from api_proxy import Moment
from kill_runs import Death, Plan, judge_events, judge_jobs, judge_status

from finetune_operator.api import constants

STAGES = ("prepare", "train", "consolidate", "merge", "evaluate")


def job(stage: str, attempt: int = 1) -> dict[str, Any]:
    return {"metadata": {"labels": {constants.LABEL_STAGE: stage, constants.LABEL_ATTEMPT: str(attempt)}}}


def status(**changes: Any) -> dict[str, Any]:
    stages = [{"name": stage, "state": "Succeeded", "attempt": 1} for stage in STAGES]
    return {"phase": "Succeeded", "stages": stages, "restarts": 0, "attempts": [], **changes}


def carry_out(plan: Plan, calls: int) -> list[Death]:
    """Every death that strikes when a job has that many calls."""
    struck = []
    while (death := plan.take()) is not None:
        plan.note(death, death.number <= calls)
        if death.number <= calls:
            struck.append(death)
    return struck


def test_every_call_is_died_at_on_both_sides() -> None:
    wanted = {Death(number, moment) for number in range(1, 8) for moment in Moment}
    deaths = carry_out(Plan(), 7)
    assert set(deaths) == wanted
    assert len(deaths) == len(wanted)


def test_a_sample_takes_every_so_manyth_call() -> None:
    assert carry_out(Plan([Moment.BEFORE], first=2, step=3), 9) == [Death(n, Moment.BEFORE) for n in (2, 5, 8)]


def test_one_death_that_did_not_come_about_is_not_the_end() -> None:
    plan = Plan([Moment.AFTER])
    for number, struck in ((1, True), (2, False), (3, False), (4, True), (5, False), (6, False)):
        death = plan.take()
        assert death == Death(number, Moment.AFTER)
        plan.note(death, struck)
    assert plan.take() == Death(7, Moment.AFTER)
    plan.note(Death(7, Moment.AFTER), False)
    assert plan.take() is None


def test_one_job_of_each_stage_is_right() -> None:
    assert list(judge_jobs([job(stage) for stage in STAGES])) == []


@pytest.mark.parametrize(
    ("jobs", "word"),
    [
        pytest.param([job(stage) for stage in STAGES[:-1]], "evaluate", id="a stage without a Job"),
        pytest.param([job("train"), *(job(stage) for stage in STAGES)], "2 Jobs", id="a stage's Job made twice"),
        pytest.param([job("train", 2), *(job(stage) for stage in STAGES)], "attempt 2", id="a second attempt"),
        pytest.param([job("publish"), *(job(stage) for stage in STAGES)], "publish", id="a stage nobody asked for"),
    ],
)
def test_any_other_set_of_jobs_is_told(jobs: list[dict[str, Any]], word: str) -> None:
    (problem,) = judge_jobs(jobs)
    assert word in problem


def test_an_undisturbed_status_is_right() -> None:
    assert list(judge_status(status())) == []


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"phase": "Failed", "message": "why"}, id="failed"),
        pytest.param({"restarts": 1}, id="a restart"),
        pytest.param({"attempts": [{"stage": "train"}]}, id="an ended attempt"),
        pytest.param({"stages": status()["stages"][1:]}, id="a missing stage"),
        pytest.param(
            {"stages": [*status()["stages"][1:], {"name": "train", "state": "Succeeded", "attempt": 2}]}, id="attempt 2"
        ),
        pytest.param({"stages": [*status()["stages"][1:], {"name": "prepare", "state": "Reused"}]}, id="reused"),
    ],
)
def test_any_other_status_is_told(changes: dict[str, Any]) -> None:
    assert len(list(judge_status(status(**changes)))) == 1


def test_an_event_may_be_lost_and_not_doubled() -> None:
    event = {"reason": "StageStarted", "note": "train"}
    assert list(judge_events([event, {**event, "note": "merge"}])) == []
    assert len(list(judge_events([event, dict(event)]))) == 1
