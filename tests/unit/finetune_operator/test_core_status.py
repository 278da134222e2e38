"""What the status and the events say at each moment of a job."""

from __future__ import annotations

import itertools
from datetime import timedelta

import pytest
from builders import job_body
from simulated import START, Simulation

from finetune_operator.api.conditions import find_condition
from finetune_operator.api.constants import ConditionType, Reason
from finetune_operator.api.status import Checkpoint, FineTuneJobStatus, PlanStatus, TrainingStatus
from finetune_operator.core.desired import Desired, desired_state
from finetune_operator.core.events import derive_events
from finetune_operator.core.failure import Waiting
from finetune_operator.core.figures import Progress
from finetune_operator.core.preflight import Findings
from finetune_operator.core.prerequisites import find_missing
from finetune_operator.core.stages import derive_pipeline
from finetune_operator.core.status import derive_status, planned_status, refused_status
from finetune_operator.core.times import format_time
from finetune_trainer.contract import ExitCode

ALL = ("prepare", "train", "consolidate", "merge", "evaluate")


def conditions(status: FineTuneJobStatus) -> dict[str, tuple[str, str]]:
    return {each.type: (each.status, each.reason) for each in status.conditions}


def test_every_condition_is_there_from_the_first_reconcile_in_a_fixed_order() -> None:
    status = Simulation().settle()
    assert [each.type for each in status.conditions] == [
        "Succeeded",
        "Validated",
        "StorageReady",
        "Healthy",
        "Suspended",
        "DataPrepared",
        "Trained",
        "Consolidated",
        "Merged",
        "Evaluated",
    ]
    assert conditions(status)["Succeeded"] == ("Unknown", "Starting")
    assert status.phase == "Preparing"
    assert status.stage == "1/5 prepare"


def test_a_transition_time_moves_only_with_the_status() -> None:
    simulation = Simulation()
    first = simulation.settle()
    second = simulation.settle(60)
    assert second.conditions == first.conditions
    simulation.run_stage("prepare")
    third = {each.type: each.last_transition_time for each in simulation.settle(60).conditions}
    assert third["DataPrepared"] == START + timedelta(seconds=120)
    assert third["Succeeded"] == START


def test_a_missing_claim_is_a_waiting_condition_and_no_failure() -> None:
    simulation = Simulation()
    job, observed = simulation.job, simulation.observe()
    pipeline = derive_pipeline(job, observed, simulation.settings, START)
    problem = Waiting(Reason.CLAIM_MISSING, "PersistentVolumeClaim workspace does not exist.")
    status = derive_status(job, observed, pipeline, START, problem=problem)
    assert conditions(status)["StorageReady"] == ("False", "ClaimMissing")
    assert conditions(status)["DataPrepared"] == ("Unknown", "ClaimMissing")
    assert (status.phase, status.reason) == ("Pending", "ClaimMissing")
    assert status.start_time is None
    assert (status.stages[0].state, status.stages[0].attempt) == ("Waiting", 0)


def test_doubts_stand_in_the_message_of_validated_and_a_dry_runs_refusal_makes_it_false() -> None:
    simulation = Simulation()
    job, observed = simulation.job, simulation.observe()
    pipeline = derive_pipeline(job, observed, simulation.settings, START)
    status = derive_status(job, observed, pipeline, START, findings=Findings(doubts=("It may be too large.",)))
    validated = find_condition(status.conditions, ConditionType.VALIDATED)
    assert validated is not None
    assert (validated.status, validated.message) == ("True", "Every check of the spec passed. It may be too large.")
    refused = Findings(Waiting(Reason.INVALID_SPEC, "spec.x: 3 is wrong"), ("It may be too large.",))
    planned = planned_status(job, PLAN, refused, START)
    assert conditions(planned)["Validated"] == ("False", "InvalidSpec")
    assert conditions(planned)["Succeeded"] == ("Unknown", "DryRun")
    assert (planned.plan, planned.completion_time) == (PLAN, None)


PLAN = PlanStatus(message="Nothing is started.", world_size=2, data_parallel_size=2, global_batch_size=2)


def test_a_dry_run_of_a_job_that_ran_starts_nothing_removes_nothing_and_shows_the_plan() -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.run_stage("prepare")
    simulation.settle()
    simulation.fail_stage("train", ExitCode.RETRYABLE)
    simulation.settle()
    assert simulation.body["status"]["startTime"]
    simulation.change(dryRun=True)
    simulation.now += timedelta(seconds=600)
    job, observed = simulation.job, simulation.observe()
    pipeline = derive_pipeline(job, observed, simulation.settings, simulation.now)
    assert desired_state(job, observed, pipeline, simulation.settings, simulation.now).manifests, "it was due"
    held = pipeline.held()
    assert desired_state(job, observed, held, simulation.settings, simulation.now) == Desired()
    status = derive_status(job, observed, held, simulation.now, plan=PLAN)
    train = status.stages[1]
    assert (status.phase, status.reason, status.message) == ("Pending", "DryRun", PLAN.message)
    assert (train.state, train.reason, train.attempt) == ("Waiting", "DryRun", 1)
    assert (status.stages[0].state, status.plan, status.start_time) == ("Succeeded", PLAN, None)


def test_a_dry_run_lets_a_stage_that_runs_come_to_its_end() -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.change(dryRun=True)
    job, observed = simulation.job, simulation.observe()
    pipeline = derive_pipeline(job, observed, simulation.settings, simulation.now)
    assert pipeline.held() == pipeline
    assert desired_state(job, observed, pipeline.held(), simulation.settings, simulation.now) == Desired()
    assert derive_status(job, observed, pipeline.held(), simulation.now, plan=PLAN).reason == "Starting"


def test_a_dry_run_removes_no_attempt_of_an_earlier_spec() -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.change(dryRun=True, dataset={"maxLength": 128})
    job, observed = simulation.job, simulation.observe()
    held = derive_pipeline(job, observed, simulation.settings, simulation.now).held()
    assert desired_state(job, observed, held, simulation.settings, simulation.now).deletions == ()


def test_progress_follows_what_the_training_posts() -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.run_stage("prepare")
    simulation.settle()
    simulation.progress = Progress(
        "train", 1, step=20, total_steps=40, loss=1.5, tokens_per_second=99.5, seconds_left=95, mfu=0.4123456
    )
    status = simulation.step()
    assert status.training is not None
    assert (status.training.step, status.training.loss, status.eta) == (20, 1.5, "1m35s")
    assert status.training.mfu == 0.41235
    assert status.progress == "42%"


@pytest.mark.parametrize(
    "posted",
    [
        pytest.param(Progress("train", 2, 30, 40), id="another attempt's"),
        pytest.param(Progress("train", 1, 30, 40, digest="0123456789abcdef"), id="that of other inputs"),
    ],
)
def test_progress_that_is_not_the_running_attempts_is_not_shown(posted: Progress) -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.run_stage("prepare")
    simulation.settle()
    simulation.progress = posted
    assert simulation.step().training is None


def test_a_refused_spec_is_at_its_end_until_it_changes() -> None:
    status = refused_status(FineTuneJobStatus(), 3, Reason.INVALID_SPEC, "spec.x: wrong", START)
    assert conditions(status) == {"Succeeded": ("False", "InvalidSpec"), "Validated": ("False", "InvalidSpec")}
    assert status.completion_time == START
    assert refused_status(status, 3, Reason.INVALID_SPEC, "spec.x: wrong", START + timedelta(hours=1)) == status


def test_failed_is_said_when_nothing_runs_any_more() -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.run_stage("prepare")
    simulation.settle()
    first, second = simulation.pods_of("train")
    simulation.end_pod(first, ExitCode.USER_ERROR)
    second["metadata"]["deletionTimestamp"] = "2026-01-02T03:09:05Z"
    status = simulation.settle()
    assert conditions(status)["Succeeded"][0] == "Unknown"
    assert conditions(status)["Trained"] == ("False", "UserError")
    del simulation.pods[second["metadata"]["name"]]
    assert conditions(simulation.settle())["Succeeded"] == ("False", "UserError")


def test_events_tell_each_transition_once() -> None:
    simulation = Simulation()
    told: list[str] = []
    before = FineTuneJobStatus()

    def step(seconds: float = 0) -> None:
        nonlocal before
        after = simulation.settle(seconds)
        told.extend(f"{event.reason}{'!' if event.warning else ''}" for event in derive_events(before, after))
        assert derive_events(after, after) == ()
        before = after

    step()
    simulation.run_stage("prepare")
    step()
    simulation.fail_stage("train", ExitCode.RETRYABLE)
    step()
    step(60)
    for pod in simulation.pods_of("train"):
        running = {"startedAt": format_time(simulation.now)}
        pod["status"]["containerStatuses"] = [{"name": "stage", "state": {"running": running}}]
    step()
    simulation.change(suspend=True)
    step()
    simulation.change(suspend=False)
    step()
    for stage in ("train", "consolidate", "merge", "evaluate"):
        simulation.run_stage(stage)
        step()
    assert told == [
        "StageStarted",
        "StageSucceeded",
        "StageFailed!",
        "AttemptRestarted",
        "StageSucceeded",
        "StageSucceeded",
        "StageSucceeded",
        "StageSucceeded",
        "EvalPassed",
    ]


STEPS = (
    (5, None),
    (12, Checkpoint(step=10)),
    (13, Checkpoint(step=10)),
    (30, Checkpoint(step=30)),
    (22, Checkpoint(step=20)),
)
"""(step, last checkpoint) of status after status; the last is of an attempt that went back."""


@pytest.mark.parametrize(
    ("reused", "reason", "words"),
    [
        pytest.param((), "Completed", "Every stage has its artifact.", id="none"),
        pytest.param(
            ("prepare", "train"),
            "Completed",
            "Every stage has its artifact. prepare, train: found complete, not run.",
            id="some",
        ),
        pytest.param(ALL, "Reused", "Every stage found its artifact complete, so nothing was run.", id="all"),
    ],
)
def test_a_job_says_at_its_end_which_stages_were_reused(reused: tuple[str, ...], reason: str, words: str) -> None:
    simulation = Simulation()
    for stage in ALL:
        simulation.settle()
        simulation.run_stage(stage, reused=stage in reused)
    status = simulation.settle()
    assert (status.phase, status.reason, status.message) == ("Succeeded", reason, words)


def test_events_tell_each_checkpoint_once() -> None:
    at = [FineTuneJobStatus(training=TrainingStatus(step=s, total_steps=40, last_checkpoint=c)) for s, c in STEPS]
    told = [
        f"{event.reason}: {event.message}"
        for before, after in itertools.pairwise([FineTuneJobStatus(), *at])
        for event in derive_events(before, after)
    ]
    assert told == [
        "CheckpointVerified: train: the checkpoint of step 10 of 40 is complete.",
        "CheckpointVerified: train: the checkpoint of step 30 of 40 is complete.",
    ]


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        pytest.param({}, "evaluate: base and tuned model were compared.", id="nothing measured"),
        pytest.param(
            {"baseLoss": 2.0, "tunedLoss": 1.5},
            "evaluate: held-out loss 1.5 (2) of the tuned (base) model.",
            id="losses alone",
        ),
        pytest.param(
            {"baseExactMatch": 0.0, "tunedExactMatch": 0.9, "baseRougeL": 0.125, "tunedRougeL": 0.95},
            "evaluate: exact match 0.9 (0), ROUGE-L 0.95 (0.125) of the tuned (base) model.",
            id="answers alone",
        ),
    ],
)
def test_a_comparison_that_is_done_is_told_with_its_figures(metrics: dict[str, float], words: str) -> None:
    simulation = Simulation()
    for stage in ("prepare", "train", "consolidate", "merge"):
        simulation.settle()
        simulation.run_stage(stage)
    before = simulation.settle()
    simulation.run_stage("evaluate", **metrics)
    told = [event.message for event in derive_events(before, simulation.settle()) if event.reason == "EvalPassed"]
    assert told == [words]


def test_a_missed_gate_and_spent_retries_are_told_once_each() -> None:
    simulation = Simulation(body=job_body(evaluate={"gate": {"maxLossRatioToBase": 0.5}}))
    for stage in ("prepare", "train", "consolidate", "merge"):
        simulation.settle()
        simulation.run_stage(stage)
    before = simulation.settle()
    simulation.run_stage("evaluate", baseLoss=2.0, tunedLoss=1.5)
    missed = derive_events(before, simulation.settle())
    assert [(event.reason, event.warning) for event in missed] == [("EvalFailed", True)]
    assert "maxLossRatioToBase" in missed[0].message

    simulation = Simulation(body=job_body(retryPolicy={"maxRetries": 0}))
    before = simulation.settle()
    simulation.fail_stage("prepare", ExitCode.RETRYABLE)
    spent = derive_events(before, simulation.settle())
    assert [event.reason for event in spent] == ["StageFailed", "StageFailed"]
    assert spent[1].message.startswith("RetriesExhausted: ")


def test_an_events_note_is_cut_by_bytes_as_the_api_server_counts_them() -> None:
    simulation = Simulation()
    before = simulation.settle()
    after = refused_status(before, 2, Reason.INVALID_SPEC, "…" * 1000, START)
    notes = [event.message for event in derive_events(before, after)]
    assert notes
    assert all(0 < len(note.encode()) <= 1024 for note in notes)


def test_a_secret_that_only_a_finished_stage_read_may_be_gone() -> None:
    simulation = Simulation(body=job_body(model={"tokenSecretRef": {"name": "hub", "key": "token"}}))
    missing = []
    for run in ("prepare", None):
        observed = simulation.observe()
        pipeline = derive_pipeline(simulation.job, observed, simulation.settings, START)
        start = next(stage.start for stage in pipeline.stages if stage.is_new)
        assert start is not None
        missing.append(find_missing(simulation.job, observed, start))
        if run:
            simulation.step()
            simulation.run_stage(run)
    assert missing[0] is not None
    assert missing[0].reason is Reason.SECRET_MISSING
    assert missing[1] is None
