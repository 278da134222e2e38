"""What the operator tells a stage of its job's past, for the report."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from builders import job_body
from simulated import Simulation

from finetune_operator.api import constants
from finetune_trainer import contract
from finetune_trainer.contract import StageConfig, parse_stage_config, stage_digest

PROMPTS = [{"text": "who may read this prompt twice", "expected": "nobody"}]
ENVIRONMENT = {"train": {"env": [{"name": "HIDDEN", "value": "do-not-print"}]}}


def told(simulation: Simulation, stage: str) -> StageConfig:
    """stage.json of the stage's newest Job."""
    name = next(name for name in reversed(simulation.created_jobs) if f"-{stage}-" in name)
    annotations = simulation.jobs[name]["spec"]["template"]["metadata"]["annotations"]
    return parse_stage_config(json.loads(annotations[constants.ANNOTATION_STAGE_JSON]))


def run_to_consolidate(**spec: Any) -> Simulation:
    """A job whose training failed once and whose consolidate stage has just begun."""
    simulation = Simulation(job_body(evaluate={"prompts": PROMPTS}, stages=ENVIRONMENT, **spec))
    simulation.settle()
    simulation.run_stage(contract.PREPARE)
    simulation.settle(60)
    simulation.fail_stage(contract.TRAIN, 21)
    simulation.settle(1)
    simulation.pods.clear()
    simulation.settle(30)
    simulation.run_stage(contract.TRAIN, step=3, totalSteps=3, trainableParameters=512, tokensPerSecond=90.5)
    simulation.settle(120)
    return simulation


def test_a_stage_after_training_hears_of_attempts_artifacts_and_images() -> None:
    simulation = run_to_consolidate()
    history = told(simulation, contract.CONSOLIDATE).history
    assert [(entry["stage"], entry["attempt"], entry["reason"]) for entry in history["attempts"]] == [
        ("train", 1, "RetryableError")
    ]
    assert {"model", "prepare", "train"} == history["artifacts"].keys()
    assert history["metrics"]["train"]["tokensPerSecond"] == 90.5
    assert history["trainableParameters"] == 512
    assert history["images"]["train"] == simulation.settings.trainer_image
    assert [(stage["name"], stage.get("attempts")) for stage in history["stages"][:2]] == [("prepare", 1), ("train", 2)]
    assert history["specDigest"] == simulation.job.spec.end_digest


def test_stages_up_to_training_hear_nothing() -> None:
    simulation = run_to_consolidate()
    assert told(simulation, contract.PREPARE).history == {}
    assert told(simulation, contract.TRAIN).history == {}


def test_neither_prompts_nor_the_environment_of_a_pod_are_in_it() -> None:
    text = json.dumps(told(run_to_consolidate(), contract.CONSOLIDATE).history)
    assert "do-not-print" not in text
    assert "who may read" not in text


def test_without_a_price_there_is_no_cost() -> None:
    assert "cost" not in told(run_to_consolidate(), contract.CONSOLIDATE).history


def test_the_past_changes_no_digest() -> None:
    config = told(run_to_consolidate(), contract.CONSOLIDATE)
    assert stage_digest(config) == stage_digest(replace(config, history={}))
