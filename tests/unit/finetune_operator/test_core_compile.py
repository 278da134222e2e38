"""The compile stage as the operator sees it: its gang, what its digest covers, and what train takes from it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from builders import job_body, make_job
from simulated import SETTINGS, Simulation, successful_report

from finetune_operator.api import constants
from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.core.figures import Progress
from finetune_operator.core.settings import Settings
from finetune_operator.core.stages import hang_limit
from finetune_trainer.contract import ExitCode

NEURON: dict[str, Any] = {
    "accelerator": {"type": "neuron", "instanceType": "ml.trn1.32xlarge", "nodes": 2},
    "parallelism": {"tensorParallelSize": 8},
    "training": {"precision": "bf16"},
}


def simulation(**spec: Any) -> Simulation:
    settings = replace(SETTINGS, features={**Settings("x").features, "Neuron": True})
    return Simulation(body=job_body(**{**NEURON, **spec}), settings=settings)


def walk(simulated: Simulation, *stages: str) -> None:
    for stage in stages:
        simulated.settle()
        simulated.run_stage(stage)
    simulated.settle()


def manifest(simulated: Simulation, stage: str) -> dict[str, Any]:
    """The newest Job of a stage."""
    found = [each for each in simulated.jobs.values() if each["metadata"]["labels"][constants.LABEL_STAGE] == stage]
    return found[-1]


def stage_json(simulated: Simulation, stage: str) -> dict[str, Any]:
    template = manifest(simulated, stage)["spec"]["template"]
    value: dict[str, Any] = json.loads(template["metadata"]["annotations"][constants.ANNOTATION_STAGE_JSON])
    return value


def test_compile_comes_before_train_and_both_have_the_same_pods() -> None:
    simulated = simulation()
    walk(simulated, "prepare", "compile")
    assert [name.split("-")[1] for name in simulated.created_jobs] == ["prepare", "compile", "train"]
    compiles, trains = (manifest(simulated, stage)["spec"] for stage in ("compile", "train"))
    names = ("completions", "parallelism", "completionMode")
    assert [compiles[name] for name in names] == [trains[name] for name in names] == [2, 2, "Indexed"]
    pods = [each["template"]["spec"] for each in (compiles, trains)]
    for name in ("nodeSelector", "tolerations", "volumes", "securityContext"):
        assert pods[0][name] == pods[1][name], name
    containers = [pod["containers"][0] for pod in pods]
    for name in ("env", "image", "volumeMounts"):
        assert containers[0][name] == containers[1][name], name
    devices = {name: quantity for name, quantity in containers[1]["resources"]["limits"].items() if "/" in name}
    assert devices.items() <= containers[0]["resources"]["limits"].items()


def test_both_read_the_same_spec_with_the_chips_and_cpu_jobs_read_none() -> None:
    simulated = simulation()
    walk(simulated, "prepare", "compile")
    compiles, trains = (stage_json(simulated, stage) for stage in ("compile", "train"))
    assert compiles["spec"] == trains["spec"]
    assert compiles["parallelism"] == trains["parallelism"]
    assert trains["spec"]["accelerator"] == {"type": "neuron", "instanceType": "ml.trn1.32xlarge"}
    assert set(trains["inputs"]) == {*compiles["inputs"], "compile"}
    plain = Simulation()
    walk(plain, "prepare")
    assert "accelerator" not in stage_json(plain, "train")["spec"]
    assert "compile" not in stage_json(plain, "train")["inputs"]


@pytest.mark.parametrize("field", ["learningRate", "checkpointEverySteps", "warmupSteps", "logEverySteps"])
def test_what_changes_no_graph_trains_again_and_compiles_nothing(field: str) -> None:
    simulated = simulation()
    walk(simulated, "prepare", "compile", "train")
    made = list(simulated.created_jobs)
    simulated.change(**{**NEURON, "training": {**NEURON["training"], field: {"learningRate": 0.5}.get(field, 3)}})
    simulated.settle()
    assert [name.split("-")[1] for name in simulated.created_jobs[len(made) :]] == ["train"]


def test_what_changes_a_graph_is_compiled_before_it_is_trained() -> None:
    simulated = simulation()
    walk(simulated, "prepare", "compile", "train")
    made = list(simulated.created_jobs)
    simulated.change(**{**NEURON, "training": {**NEURON["training"], "microBatchSize": 2}})
    walk(simulated, "prepare", "compile")
    assert "compile" in {name.split("-")[1] for name in simulated.created_jobs[len(made) :]}


def test_compile_switched_off_leaves_trains_name_and_so_its_checkpoints() -> None:
    with_it, without = simulation(), simulation(compile={"enabled": False})
    walk(with_it, "prepare", "compile")
    walk(without, "prepare")
    assert manifest(with_it, "train")["metadata"]["name"] == manifest(without, "train")["metadata"]["name"]
    assert "compile" not in stage_json(without, "train")["inputs"]


def test_a_compilation_that_was_found_done_shows_as_reused() -> None:
    simulated = simulation()
    walk(simulated, "prepare")
    for pod in simulated.pods_of("compile"):
        simulated.end_pod(pod, 0, successful_report("compile", reused=True))
    status = simulated.settle()
    assert {stage.name: stage.state for stage in status.stages}["compile"] == "Reused"
    conditions = {each.type: each for each in status.conditions}
    assert (conditions["Compiled"].status, conditions["Compiled"].reason) == ("True", "Reused")


@pytest.mark.parametrize(
    ("step", "total", "words"),
    [(0, 0, "Its graphs are being traced."), (5, 12, "5 of 12 graphs are compiled.")],
    ids=["while tracing", "while compiling"],
)
def test_graphs_are_counted_in_the_message(step: int, total: int, words: str) -> None:
    simulated = simulation()
    walk(simulated, "prepare")
    for pod in simulated.pods_of("compile"):
        simulated.pods[pod["metadata"]["name"]]["spec"]["nodeName"] = "node-1"
        pod["status"] = {
            "phase": "Running",
            "containerStatuses": [{"name": "stage", "state": {"running": {"startedAt": "2026-01-02T03:04:05Z"}}}],
        }
    simulated.progress = Progress("compile", 1, step, total, phase="compiling", advanced_at=simulated.now)
    status = simulated.settle()
    assert status.message is not None
    assert status.message.endswith(f"runs on 2 pods. {words}")
    quiet = simulated.settle(seconds=40_000)
    assert quiet.phase == "Compiling", "one graph may take longer than any step"


def test_graphs_that_a_failed_compilation_has_posted_are_no_lost_steps() -> None:
    simulated = simulation()
    walk(simulated, "prepare")
    simulated.progress = Progress("compile", 1, 3, 4, phase="compiling", advanced_at=simulated.now)
    simulated.fail_stage("compile", ExitCode.USER_ERROR)
    (attempt,) = simulated.settle().attempts
    assert (attempt.stage, attempt.reason, attempt.lost_steps) == ("compile", "UserError", None)


def test_only_its_own_limit_says_that_compile_hangs() -> None:
    job = make_job(**NEURON, stages={"train": {"hangSeconds": 60}})
    assert [hang_limit(job, stage, SETTINGS) for stage in ("compile", "train")] == [0, 60]
    assert hang_limit(make_job(**NEURON, stages={"compile": {"hangSeconds": 90}}), "compile", SETTINGS) == 90


def overrides(job: FineTuneJob, stage: str) -> dict[str, Any]:
    return job.spec.stages.of(stage).as_json()


def test_overrides_of_compile_are_on_top_of_trains_but_for_times() -> None:
    train = {
        "image": "registry.example/neuron:1",
        "env": [{"name": "NEURON_FUSE_SOFTMAX", "value": "0"}, {"name": "A", "value": "1"}],
        "nodeSelector": {"pool": "trn"},
        "tolerations": [{"key": "trn", "operator": "Exists"}],
        "resources": {"requests": {"cpu": "8"}},
        "activeDeadlineSeconds": 600,
        "hangSeconds": 60,
    }
    own = {"env": [{"name": "A", "value": "2"}], "nodeSelector": {"zone": "a"}, "activeDeadlineSeconds": 7200}
    job = make_job(**NEURON, stages={"train": train, "compile": own})
    expected = {
        **overrides(job, "train"),
        "env": [{"name": "NEURON_FUSE_SOFTMAX", "value": "0"}, {"name": "A", "value": "2"}],
        "nodeSelector": {"pool": "trn", "zone": "a"},
        "activeDeadlineSeconds": 7200,
    }
    del expected["hangSeconds"]
    assert overrides(job, "compile") == expected
    assert overrides(make_job(**NEURON, stages={"train": train}), "compile")["image"] == "registry.example/neuron:1"
    assert overrides(make_job(**NEURON), "compile") == overrides(make_job(**NEURON), "train")
