from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from builders import make_job
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.api.constants import LABEL_QUEUE, Reason
from finetune_operator.api.finetunejob import FineTuneJob, unavailable_features
from finetune_operator.api.status import Cost, FineTuneJobStatus, MemoryParts, PlanCost, PlannedStage, PlanStatus
from finetune_operator.core.accelerators.instances import BUILT_IN
from finetune_operator.core.failure import Waiting
from finetune_operator.core.memory import GIB
from finetune_operator.core.model_shapes import BUILT_IN_SHAPES
from finetune_operator.core.parallelism import Parallelism, derive_parallelism
from finetune_operator.core.plan import derive_cost, derive_plan, train_flops
from finetune_operator.core.preflight import spec_doubts
from finetune_operator.core.records import Outcome, Result
from finetune_operator.core.settings import Settings

SETTINGS = Settings(trainer_image="registry.example/trainer:0123abc", currency="EUR")
LLAMA_8B = BUILT_IN_SHAPES["meta-llama/meta-llama-3-8b"]
TRN1 = replace(BUILT_IN["ml.trn1.32xlarge"], price_per_hour=21.5)
LORA = {"lora": {"rank": 16, "targetModules": ["q_proj", "v_proj"]}}
ADAPTER = 6_815_744


def trainium(**spec: Any) -> FineTuneJob:
    changes: dict[str, Any] = {
        "accelerator": {"type": "neuron", "instanceType": TRN1.name, "nodes": 2},
        "parallelism": {"tensorParallelSize": 8},
        "dataset": {"maxLength": 2048},
        "training": {"maxSteps": 1200, "gradientAccumulationSteps": 3},
        "method": LORA,
        "queue": {"name": "research"},
        "dryRun": True,
    }
    return make_job(**{**changes, **spec})


def spread(job: FineTuneJob, cores: int) -> Parallelism:
    return derive_parallelism(
        num_nodes=job.spec.accelerator.nodes,
        procs_per_node=cores,
        tp_size=job.spec.parallelism.tensor_parallel_size,
        pp_size=job.spec.parallelism.pipeline_parallel_size,
        micro_batch_size=job.spec.training.micro_batch_size,
        gradient_accumulation_steps=job.spec.training.gradient_accumulation_steps,
    )


def manifest(stage: str, pods: int, resources: dict[str, Any] | None = None, **labels: str) -> dict[str, Any]:
    container = {"name": "stage", "image": f"trainer:{stage}", **({"resources": resources} if resources else {})}
    return {
        "metadata": {"name": f"tiny-{stage}-01234567-1", "labels": labels},
        "spec": {"parallelism": pods, "template": {"spec": {"containers": [container]}}},
    }


JOBS = {
    "prepare": manifest("prepare", 1, {"requests": {"cpu": "500m"}, "limits": {"memory": "2Gi"}}),
    "train": manifest("train", 2, {"requests": {"aws.amazon.com/neuron": "16"}}, **{LABEL_QUEUE: "research"}),
    "merge": manifest("merge", 1),
}


def test_the_plan_shows_the_jobs_the_estimate_and_the_price() -> None:
    job = trainium()
    plan = derive_plan(job, SETTINGS, JOBS, spread(job, 32), LLAMA_8B, TRN1)
    assert plan.stages == (
        PlannedStage(
            name="prepare",
            job_name="tiny-prepare-01234567-1",
            pods=1,
            requests={"cpu": "500m"},
            limits={"memory": "2Gi"},
            image="trainer:prepare",
            queue="research",
        ),
        PlannedStage(
            name="train",
            pods=2,
            instance_type="ml.trn1.32xlarge",
            requests={"aws.amazon.com/neuron": "16"},
            image="trainer:train",
            queue="research",
        ),
        PlannedStage(name="merge", pods=1, image="trainer:merge", queue="research"),
    )
    assert (plan.world_size, plan.data_parallel_size, plan.global_batch_size) == (64, 8, 24)
    assert plan.trainable_parameters == ADAPTER
    assert plan.estimate is not None
    assert plan.estimate.device_memory_gib == 16
    assert plan.estimate.parts == MemoryParts(
        weights=1.88, gradients=0.0254, optimizer=0.00952, activations=6.63, logits=0.428
    )
    assert plan.estimate.memory_gib_per_device == 8.97
    # 1200 steps of 24 rows of 2048 tokens, 4 operations for each frozen parameter, on 32 devices of 190 TFLOPS at 35 %
    flops = 1200 * 24 * 2048 * (4 * 8_030_261_248 + 6 * ADAPTER)
    hours = flops / (2 * 16 * 190e12 * 0.35) / 3600
    assert plan.estimate.train_hours == pytest.approx(hours, rel=5e-3)
    assert plan.cost == PlanCost(amount=round(hours * 2 * 21.5, 2), currency="EUR")
    assert plan.message == (
        "Nothing is started: spec.dryRun is true. The job would run prepare (1 pod), train (2 pods), merge (1 pod). "
        "Set spec.dryRun to false to start it."
    )
    assert "35% of the devices' bf16 peak" in plan.estimate.assumptions
    assert PlanStatus.model_validate_json(plan.model_dump_json(by_alias=True)) == plan
    assert FineTuneJobStatus(plan=plan).as_json()["plan"]["estimate"]["parts"]["optimizer"] == 0.00952


ABSENT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an unknown model": ({}, {"shape": None}, "trainHours: the model's sizes are not known before prepare has run."),
    "epochs before prepare has counted": (
        {"training": {"maxSteps": None, "epochs": 1}},
        {},
        "trainHours: spec.training.epochs is a number of steps only after prepare",
    ),
    "nodes of unknown speed": ({}, {"instance": replace(TRN1, bf16_tflops_per_device=None)}, "speed of these nodes"),
    "another precision": (
        {
            "training": {"precision": "fp32", "maxSteps": 1200},
            "accelerator": {"type": "cuda", "instanceType": "ml.p5.48xlarge", "nodes": 4},
        },
        {},
        "for precision bf16 only",
    ),
}


@pytest.mark.parametrize(("spec", "facts", "words"), [pytest.param(*case, id=name) for name, case in ABSENT.items()])
def test_a_figure_that_nobody_knows_is_absent_with_the_reason(
    spec: dict[str, Any], facts: dict[str, Any], words: str
) -> None:
    job = trainium(**spec)
    plan = derive_plan(job, SETTINGS, JOBS, spread(job, 32), facts.get("shape", LLAMA_8B), facts.get("instance", TRN1))
    assert plan.estimate is not None
    assert (plan.estimate.train_hours, plan.cost) == (None, None)
    assert (plan.estimate.parts is None) is ("shape" in facts)
    assert words in plan.estimate.assumptions


def test_without_a_price_there_is_a_time_and_no_cost() -> None:
    job = trainium()
    plan = derive_plan(job, SETTINGS, JOBS, spread(job, 32), LLAMA_8B, BUILT_IN["ml.trn1.32xlarge"])
    assert plan.cost is None
    assert plan.estimate is not None
    assert plan.estimate.train_hours is not None
    assert "no pricePerHour is configured" in plan.estimate.assumptions


def test_a_plan_for_trainium_has_all_cores_and_says_what_ranks_share() -> None:
    job = trainium()
    plan = derive_plan(job, SETTINGS, JOBS, spread(job, 32), LLAMA_8B, TRN1)
    assert (plan.world_size, plan.data_parallel_size, plan.global_batch_size) == (64, 8, 24)
    assert plan.trainable_parameters == ADAPTER
    assert plan.estimate is not None
    assert plan.estimate.device_memory_gib == 16
    assert plan.estimate.parts is not None
    assert plan.estimate.parts.weights == 1.88, "two bytes of an eighth of the model"
    assert "shared by data parallel ranks (ZeRO-1), flash attention for multiples of 2048" in plan.estimate.assumptions


def test_prepares_count_of_steps_wins_over_the_spec() -> None:
    job = trainium(training={"maxSteps": None, "epochs": 3})
    plan = derive_plan(job, SETTINGS, JOBS, spread(job, 32), LLAMA_8B, TRN1, total_steps=10)
    assert plan.estimate is not None
    assert plan.estimate.train_hours is not None
    assert plan.cost is not None


def test_a_refusal_and_doubts_are_said_and_the_job_is_not_recommended() -> None:
    job = trainium()
    refused = Waiting(Reason.FEATURE_NOT_AVAILABLE, "; ".join(map(str, unavailable_features(job.spec))))
    doubts = spec_doubts(job, spread(job, 32), None, TRN1)
    plan = derive_plan(job, SETTINGS, JOBS, spread(job, 32), None, TRN1, refused=refused, doubts=doubts)
    assert "It would be refused (FeatureNotAvailable): spec.parallelism.tensorParallelSize: " in plan.message
    assert "spec.accelerator.type: neuron is not available in this release; use cpu." in plan.message
    assert plan.message.endswith("are checked after prepare.")
    assert "Set spec.dryRun to false" not in plan.message


def test_what_the_job_would_wait_for_is_said_and_does_not_speak_against_starting_it() -> None:
    job, waiting = trainium(), Waiting(Reason.CLAIM_MISSING, "PersistentVolumeClaim fsx does not exist: create it.")
    plan = derive_plan(job, SETTINGS, JOBS, spread(job, 32), LLAMA_8B, TRN1, waiting=waiting)
    assert "It would wait (ClaimMissing): PersistentVolumeClaim fsx does not exist: create it. Set" in plan.message


@pytest.mark.parametrize(
    ("left", "under_way", "words"),
    [
        (("merge",), None, "Nothing is started: spec.dryRun is true. The job would run merge (1 pod)."),
        (
            ("merge",),
            "train",
            "Stage train goes on to its end, and no other is started: spec.dryRun is true. The job would then run ",
        ),
        (
            (),
            "merge",
            "Stage merge goes on to its end, and no other is started: spec.dryRun is true. No other stage is",
        ),
        ((), None, "Nothing is started: spec.dryRun is true. No other stage is left to run."),
    ],
    ids=["a stage is due", "one runs and one is left", "the last one runs", "all are done"],
)
def test_the_plan_is_of_what_is_left_to_run(left: tuple[str, ...], under_way: str | None, words: str) -> None:
    job = trainium()
    jobs = {stage: JOBS[stage] for stage in left}
    plan = derive_plan(
        job, SETTINGS, jobs, spread(job, 32), LLAMA_8B, TRN1, under_way=under_way, first_is_named=under_way is None
    )
    assert plan.message.startswith(words)
    assert [stage.name for stage in plan.stages] == list(left)
    assert [stage.job_name is None for stage in plan.stages] == [under_way is not None] * len(left)
    assert plan.estimate is not None
    assert (plan.estimate.train_hours, plan.cost) == (None, None)
    assert "no training is left to start" in plan.estimate.assumptions


def test_on_cpus_the_processes_of_a_pod_share_its_memory() -> None:
    job = make_job(accelerator={"type": "cpu", "processesPerNode": 2})
    plan = derive_plan(job, SETTINGS, JOBS, spread(job, 2), LLAMA_8B, None, pod_memory_bytes=3 * GIB)
    assert plan.estimate is not None
    assert plan.estimate.device_memory_gib == 1.5
    assert plan.stages[1].instance_type is None


@given(st.integers(1, 5000), st.integers(1, 64))
def test_full_training_takes_six_operations_a_parameter_and_token(steps: int, accumulation: int) -> None:
    training = {"maxSteps": steps, "warmupSteps": 0, "gradientAccumulationSteps": accumulation}
    full = trainium(method={"type": "full", "lora": None}, training=training)
    adapter = trainium(training=training)
    tokens = steps * accumulation * 8 * 2048
    assert train_flops(full, spread(full, 32), LLAMA_8B, steps) == pytest.approx(6 * 8_030_261_248 * tokens)
    assert train_flops(adapter, spread(adapter, 32), LLAMA_8B, steps) == pytest.approx(
        (4 * 8_030_261_248 + 6 * ADAPTER) * tokens
    )


def ended(*attempts: tuple[str, int | None]) -> dict[tuple[str, str, int], Outcome]:
    """Outcomes by attempt, from (stage, seconds of its pods)."""
    return {
        (stage, "0123456789abcdef", number): Outcome(Result.RETRY, Reason.EVICTED, pod_seconds=seconds)
        for number, (stage, seconds) in enumerate(attempts, start=1)
    }


ENDED = ended(("prepare", 90), ("compile", 300), ("train", 3601), ("train", 10800), ("merge", 60), ("evaluate", None))


def test_the_cost_is_the_time_of_all_pods_and_the_price_of_the_accelerators() -> None:
    assert derive_cost(ENDED, TRN1, "EUR") == Cost(
        pod_seconds=90 + 300 + 3601 + 10800 + 60,
        amount=round((300 + 3601 + 10800) / 3600 * 21.5, 2),
        currency="EUR",
    )


@pytest.mark.parametrize("instance", [None, BUILT_IN["ml.trn1.32xlarge"]], ids=["cpu", "an instance without price"])
def test_without_a_price_only_the_time_is_counted(instance: Any) -> None:
    assert derive_cost(ENDED, instance, "EUR") == Cost(pod_seconds=14851)


def test_before_a_pod_had_a_node_there_is_no_cost() -> None:
    assert derive_cost(ended(("train", 0)), TRN1, "EUR") is None
    assert derive_cost({}, TRN1, "EUR") is None


@given(st.lists(st.tuples(st.sampled_from(["prepare", "train"]), st.none() | st.integers(0, 10**6)), max_size=6))
def test_an_attempt_more_never_makes_a_job_cheaper(attempts: list[tuple[str, int | None]]) -> None:
    amounts = [derive_cost(ended(*attempts[:count]), TRN1, "EUR") for count in range(len(attempts) + 1)]
    seconds = [0 if cost is None else cost.pod_seconds or 0 for cost in amounts]
    prices = [0 if cost is None else cost.amount or 0 for cost in amounts]
    assert seconds == sorted(seconds)
    assert prices == sorted(prices)
