"""What the demo prints, from statuses: the table, the lines of changes, the end, the report."""

import io
from datetime import datetime, timezone
from typing import Any

import pytest
from finetune_demo import kubectl, result, view
from finetune_demo.problem import DemoProblem
from rich.console import Console

NOW = datetime(2026, 1, 1, 12, 1, 0, tzinfo=timezone.utc)


def stage(name: str, state: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "state": state, "attempt": 1 if state not in ("Waiting", "Skipped") else 0, **more}


def job(status: dict[str, Any] | None = None, generation: int = 1) -> dict[str, Any]:
    metadata = {"namespace": "finetune-demo", "name": "tiny-cpu", "generation": generation}
    return {"metadata": metadata, "status": status or {}}


RUNNING = {
    "phase": "Training",
    "progress": "61%",
    "eta": "40s",
    "reason": "Running",
    "message": "Stage train: Attempt 2 runs on 2 pods.",
    "stages": [
        stage("prepare", "Succeeded", durationSeconds=14),
        stage("compile", "Skipped"),
        stage("train", "Running", startTime="2026-01-01T12:00:20Z") | {"attempt": 2},
        stage("consolidate", "Waiting"),
    ],
    "training": {"step": 120, "totalSteps": 240, "loss": 0.41234},
}


def drawn(of: dict[str, Any], event: str = "") -> list[str]:
    output = io.StringIO()
    Console(file=output, width=80, color_system=None).print(view.render(of, event, 92, NOW))
    return [line.rstrip() for line in output.getvalue().splitlines()]


def test_the_table_shows_stages_seconds_progress_and_reason_within_80_columns() -> None:
    lines = drawn(
        job(RUNNING), "StageStarted: train: Job tiny-cpu-train-5edba30a-2 was started because of a long story"
    )
    assert lines[0] == "finetune-demo/tiny-cpu  Training  61%  about 40s left  1 min 32 s"
    assert lines[1] == "✓ prepare     Succeeded        14 s"
    assert lines[2] == "- compile     Skipped"
    assert lines[3].startswith("▸ train       Running          40 s ")
    assert lines[3].endswith("120/240 loss 0.412 attempt 2")
    assert lines[4] == "· consolidate Waiting"
    assert lines[5] == "Running: Stage train: Attempt 2 runs on 2 pods."
    assert lines[6].startswith("last event: StageStarted: train")
    assert lines[6].endswith("…")
    assert max(map(len, lines)) <= 80


def test_a_first_attempt_has_the_row_to_itself() -> None:
    lines = drawn(job({**RUNNING, "stages": [stage("train", "Running", startTime="2026-01-01T12:00:20Z")]}))
    assert len(lines) == 3
    assert lines[1].endswith("120/240 loss 0.412")


def test_a_job_that_nobody_has_looked_at_is_drawn_too() -> None:
    assert drawn(job()) == ["finetune-demo/tiny-cpu  Pending  1 min 32 s"]


def condition(name: str, status: str, generation: int = 1) -> dict[str, Any]:
    return {"type": name, "status": status, "reason": "Why", "message": "What.", "observedGeneration": generation}


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        pytest.param([], None, id="nothing is known yet"),
        pytest.param([condition("Succeeded", "Unknown")], None, id="under way"),
        pytest.param([condition("Succeeded", "True")], (True, ""), id="succeeded"),
        pytest.param([condition("Succeeded", "True", 0)], None, id="succeeded, but of an earlier spec"),
        pytest.param([condition("Succeeded", "False")], (False, "train"), id="failed in a stage"),
        pytest.param([condition("Validated", "False")], (False, "train"), id="refused before it began"),
        pytest.param([condition("Validated", "True")], None, id="valid is no end"),
    ],
)
def test_the_end_of_a_job_is_read_from_its_conditions(
    conditions: list[dict[str, Any]], expected: tuple[bool, str] | None
) -> None:
    failed = any(c["status"] == "False" for c in conditions)
    found = view.outcome(job({"conditions": conditions, "stages": [stage("train", "Failed")] if failed else []}))
    assert (None if found is None else (found.succeeded, found.stage)) == expected


def test_changes_are_told_once_and_in_order() -> None:
    before = {"stages": [stage("prepare", "Running"), stage("train", "Waiting")]}
    after = {"stages": [stage("prepare", "Succeeded", durationSeconds=75), stage("train", "Starting")]}
    assert list(view.changes(before, after)) == ["prepare: Succeeded in 1 min 15 s", "train: Starting"]
    assert list(view.changes(after, after)) == []


def test_a_failure_is_told_with_its_message() -> None:
    after = {"stages": [stage("train", "Retrying", message="pod 1 was evicted")]}
    assert list(view.changes({}, after)) == ["train: Retrying: pod 1 was evicted"]


def test_the_training_is_told_every_tenth() -> None:
    told = []
    before: dict[str, Any] = {}
    for step in range(0, 241, 10):
        after = {"training": {"step": step, "totalSteps": 240, "loss": 1.0}}
        told += view.changes(before, after)
        before = after
    assert told[0] == "train: step 30/240 loss 1"
    assert told[-1] == "train: step 240/240 loss 1"
    assert len(told) == 10


def evaluation(base: int, tuned: int, base_loss: float = 6.5, tuned_loss: float = 1.5) -> dict[str, Any]:
    entries = [
        {
            "expected": f"Truth {number} " + "goes on and on " * 6,
            "base": "",
            "tuned": "Other.",
            "baseExact": number < base,
            "tunedExact": number < tuned,
        }
        for number in range(10)
    ]
    return {"baseLoss": base_loss, "tunedLoss": tuned_loss, "prompts": entries}


def test_the_report_has_answers_score_losses_places_and_times() -> None:
    status = {
        "artifacts": {"model": {"path": "finetune/jobs/n/j/merge-1"}},
        "stages": [stage("prepare", "Succeeded", durationSeconds=3), stage("train", "Succeeded", durationSeconds=61)],
    }
    asked = [
        {"text": f"Question {number}?", "context": "Some context." if number == 1 else None} for number in range(10)
    ]
    lines = list(
        result.lines({"status": status, "spec": {"evaluate": {"prompts": asked}}}, evaluation(0, 9), "claim c:")
    )
    assert lines[:2] == ["Prompt         Question 0?", "Base model     (nothing)"]
    assert "Context        Some context." in lines
    assert "Prompt         Question 2?" in lines
    assert "Prompt         Question 3?" not in lines
    assert lines[-4:] == [
        "Word for word  base 0 of 10, tuned 9 of 10",
        "Held-out loss  base 6.500, tuned 1.500",
        "Merged model   claim c:/finetune/jobs/n/j/merge-1",
        "Stages         prepare 3 s, train 1 min 1 s",
    ]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("found", "words"),
    [
        pytest.param(evaluation(0, 7), "tuned 7 of 10", id="too few answers learned"),
        pytest.param(evaluation(1, 10), "base 1 of 10", id="a base that knew an answer"),
        pytest.param(evaluation(0, 10, 2.0, 2.0), "held-out loss", id="a loss that did not fall"),
    ],
)
def test_a_poor_result_fails_the_demo(found: dict[str, Any], words: str) -> None:
    with pytest.raises(DemoProblem, match=words):
        result.check(found)


def test_a_good_result_passes() -> None:
    result.check(evaluation(0, 8))


def test_objects_of_a_watch_are_told_apart() -> None:
    text = '{\n    "a": {\n        "b": "}{"\n    }\n}\n{\n    "c": 1\n}\n'
    assert list(kubectl.documents(io.StringIO(text))) == [{"a": {"b": "}{"}}, {"c": 1}]
