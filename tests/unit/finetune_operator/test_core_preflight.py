from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from builders import make_job
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.api.constants import Reason
from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.core.accelerators.instances import BUILT_IN, InstanceType
from finetune_operator.core.memory import GIB, estimate_memory
from finetune_operator.core.model_shapes import BUILT_IN_SHAPES, ModelShape
from finetune_operator.core.parallelism import Parallelism, derive_parallelism
from finetune_operator.core.preflight import (
    ClaimFacts,
    ClusterQueue,
    Flavor,
    PodRequests,
    Quota,
    check_cluster,
    check_environments,
    check_pair,
    check_spec,
    memory_limit,
    pair_doubts,
    parse_claim,
    parse_cluster_queue,
    parse_quota,
    pod_requests,
    spec_doubts,
)

LLAMA_8B = BUILT_IN_SHAPES["meta-llama/meta-llama-3-8b"]
BLOOMZ_7B = BUILT_IN_SHAPES["bigscience/bloomz-7b1"]
TRN1, TRN2, G5 = BUILT_IN["ml.trn1.32xlarge"], BUILT_IN["ml.trn2.48xlarge"], BUILT_IN["ml.g5.12xlarge"]
JOB = make_job()
LORA = {"lora": {"rank": 16, "targetModules": ["q_proj", "v_proj"]}}
ON_OUTPUT = {"lora": {"rank": 16, "targetModules": ["o_proj"]}}


def trainium(*, tp: int = 8, pp: int = 1, instance: InstanceType = TRN1, nodes: int = 1, **spec: Any) -> FineTuneJob:
    changes: dict[str, Any] = {
        "accelerator": {"type": "neuron", "instanceType": instance.name, "nodes": nodes},
        "parallelism": {"tensorParallelSize": tp, "pipelineParallelSize": pp},
        "dataset": {"maxLength": 2048},
        "method": LORA,
    }
    return make_job(**{**changes, **spec})


def gpu(instance: InstanceType = G5, **spec: Any) -> FineTuneJob:
    return make_job(accelerator={"type": "cuda", "instanceType": instance.name, "nodes": 1}, **{"method": LORA, **spec})


def spread(job: FineTuneJob, instance: InstanceType | None) -> Parallelism:
    return derive_parallelism(
        num_nodes=job.spec.accelerator.nodes,
        procs_per_node=instance.cores if instance else job.spec.accelerator.processes_per_node,
        tp_size=job.spec.parallelism.tensor_parallel_size,
        pp_size=job.spec.parallelism.pipeline_parallel_size,
        micro_batch_size=job.spec.training.micro_batch_size,
        gradient_accumulation_steps=job.spec.training.gradient_accumulation_steps,
    )


def problems(job: FineTuneJob, shape: ModelShape | None, instance: InstanceType | None, **more: Any) -> dict[str, str]:
    found = check_spec(job, spread(job, instance), shape, instance, **more)
    return {problem.field: problem.message for problem in found}


def doubts(job: FineTuneJob, shape: ModelShape | None, instance: InstanceType | None, **more: Any) -> tuple[str, ...]:
    return spec_doubts(job, spread(job, instance), shape, instance, **more)


def test_the_examples_plans_are_sound() -> None:
    job = trainium()
    assert (problems(job, LLAMA_8B, TRN1), doubts(job, LLAMA_8B, TRN1)) == ({}, ())


TENSOR, PIPELINE = "spec.parallelism.tensorParallelSize", "spec.parallelism.pipelineParallelSize"
SPLITS: dict[str, tuple[FineTuneJob, ModelShape, InstanceType, str, list[str]]] = {
    "heads that the tensor parallel size does not divide": (
        trainium(tp=16, method=ON_OUTPUT),
        replace(LLAMA_8B, heads=24, kv_heads=24, hidden_size=3072),
        TRN1,
        TENSOR,
        ["tensorParallelSize 16 does not divide", "attention heads (24)", "use 8"],
    ),
    "an MLP that it does not divide": (
        trainium(tp=8),
        replace(LLAMA_8B, intermediate_size=14340),
        TRN1,
        TENSOR,
        ["MLP's width (14340)", "use 4"],
    ),
    "a vocabulary that it does not divide": (
        trainium(tp=8),
        replace(LLAMA_8B, vocab_size=50257),
        TRN1,
        TENSOR,
        ["vocabulary (50257)", "use 1"],
    ),
    "kv heads that are neither divided nor copied evenly": (
        trainium(tp=16, method=ON_OUTPUT),
        replace(LLAMA_8B, heads=48, kv_heads=12, hidden_size=6144),
        TRN1,
        TENSOR,
        ["neither divides the model's key and value heads (12) nor is", "use 4"],
    ),
    "copied kv heads on trn2": (
        trainium(tp=16, instance=TRN2, method=ON_OUTPUT),
        LLAMA_8B,
        TRN2,
        TENSOR,
        ["tensorParallelSize 16 is more than the model's key and value heads (8)", "trn2", "use 8"],
    ),
    "layers that the pipeline size does not divide": (
        trainium(tp=1, pp=32, dataset={"packing": "none"}),
        replace(LLAMA_8B, layers=30),
        TRN1,
        PIPELINE,
        ["pipelineParallelSize 32", "30 layers", "use 30"],
    ),
}


@pytest.mark.parametrize(
    ("job", "shape", "instance", "field", "words"), [pytest.param(*case, id=name) for name, case in SPLITS.items()]
)
def test_a_split_that_does_not_come_out_even_is_refused_with_the_numbers(
    job: FineTuneJob, shape: ModelShape, instance: InstanceType, field: str, words: list[str]
) -> None:
    message = problems(job, shape, instance)[field]
    assert [word for word in words if word not in message] == []


def test_copied_kv_heads_are_sound_on_trn1() -> None:
    assert problems(trainium(tp=32, method=ON_OUTPUT), LLAMA_8B, TRN1) == {}


def test_the_walkthroughs_adapter_is_offered_its_third_layer_where_heads_are_shared() -> None:
    message = problems(trainium(tp=32), LLAMA_8B, TRN1)["spec.method.lora.targetModules"]
    assert "q_proj, v_proj without k_proj: add k_proj to targetModules, or use tensorParallelSize 8" in message
    assert problems(gpu(), LLAMA_8B, None) == {}, "on other accelerators any module has an adapter of its own"


def test_a_model_that_the_vendor_does_not_train_is_refused_as_soon_as_its_type_is_known() -> None:
    found = problems(trainium(tp=4), BUILT_IN_SHAPES["mistralai/mistral-7b-v0.1"], TRN1)
    assert list(found) == ["spec.model.source"]
    assert "model type mistral cannot be trained on Trainium" in found["spec.model.source"]
    assert problems(trainium(tp=4), replace(LLAMA_8B, model_type=""), TRN1) == {}, "nobody told it yet"


def test_several_trainium_nodes_without_efa_cannot_train_together() -> None:
    small = BUILT_IN["ml.trn1.2xlarge"]
    found = problems(trainium(tp=2, instance=small, nodes=2), None, small)
    assert list(found) == ["spec.accelerator.nodes"]
    assert (
        "2 nodes of ml.trn1.2xlarge cannot train together: it has no EFA interface" in found["spec.accelerator.nodes"]
    )
    assert problems(trainium(tp=2, instance=small), None, small) == problems(trainium(nodes=2), None, TRN1) == {}


def test_layers_that_are_split_over_nodes_are_a_doubt() -> None:
    shape = BUILT_IN_SHAPES["meta-llama/meta-llama-3-70b"]
    job = trainium(tp=64, nodes=2, method=ON_OUTPUT, dataset={"maxLength": 512})
    assert problems(job, shape, TRN1) == {}
    (doubt,) = doubts(job, shape, TRN1)
    assert "tensorParallelSize 64 is more than the 32 NeuronCores of ml.trn1.32xlarge" in doubt
    assert doubts(trainium(tp=32, nodes=2, method=ON_OUTPUT), LLAMA_8B, TRN1) == ()


def test_more_than_a_neuroncore_has_is_refused_with_the_parts() -> None:
    full = {"type": "full", "lora": None}
    message = problems(trainium(tp=8, method=full), BUILT_IN_SHAPES["meta-llama/meta-llama-3-70b"], TRN1)
    words = message["spec.accelerator.instanceType"]
    assert "on each NeuronCore of ml.trn1.32xlarge, 16.0 GiB are there (weights 16.4" in words
    assert "raise parallelism.tensorParallelSize" in words


# ---- what the pods of compile and train run in


@pytest.mark.parametrize(
    ("instance", "images", "words"),
    [
        pytest.param(
            TRN1, ("r/x:sdk2.28.0", "r/x:sdk2.28.0"), ["2.28.0", "SDK 2.26.0"], id="an image that cannot train"
        ),
        pytest.param(BUILT_IN["ml.inf2.48xlarge"], ("r/x:1",), ["2.26.0", "inference"], id="Inferentia"),
    ],
)
def test_an_instance_and_an_sdk_that_are_known_not_to_work_are_refused(
    instance: InstanceType, images: tuple[str, ...], words: list[str]
) -> None:
    refused = check_pair(instance, images)
    assert refused is not None
    assert refused.reason is Reason.UNSUPPORTED_INSTANCE_SDK_PAIR
    assert [word for word in (instance.name, *words) if word not in refused.message] == []


def test_a_pair_that_works_or_is_doubtful_is_not_refused() -> None:
    assert check_pair(TRN1, ("r/x:1",)) is check_pair(TRN2, ("r/x:1",)) is check_pair(G5, ("r/x:1",)) is None
    assert pair_doubts(TRN1, ("r/x:1",)) == pair_doubts(G5, ("r/x:1",)) == pair_doubts(None, ()) == ()
    (doubt,) = pair_doubts(TRN2, ("r/x:1", "r/x:1"))
    assert "train apart there" in doubt


SAME = {"NEURON_CC_FLAGS": "--model-type transformer --cache_dir=/c", "OMP_NUM_THREADS": "1"}


def test_compile_and_train_must_compile_alike_into_one_cache() -> None:
    assert check_environments({"compile": SAME, "train": SAME}) == check_environments({"train": SAME}) == ()
    assert check_environments({"compile": {**SAME, "OMP_NUM_THREADS": "8"}, "train": SAME}) == ()
    other = {**SAME, "NEURON_CC_FLAGS": "--model-type=transformer -O1 --cache_dir=/d"}
    found = [str(problem) for problem in check_environments({"compile": other, "train": SAME})]
    assert len(found) == 2
    assert "spec.stages.compile.env: NEURON_CC_FLAGS is '--model-type=transformer -O1' in compile" in found[0]
    assert "the cache is {'NEURON_CC_FLAGS': '/d'} in compile" in found[1]


def test_a_cache_with_a_dot_is_refused_where_it_was_set() -> None:
    (problem,) = check_environments({"train": {"NEURON_COMPILE_CACHE_URL": "/fsx/llama3.1"}})
    assert problem.field == "spec.stages.train.env"
    assert "use /fsx/llama3-1" in problem.message


@given(
    st.integers(1, 64),
    st.integers(1, 64),
    st.sampled_from(sorted(BUILT_IN_SHAPES)),
    st.sampled_from([None, TRN1, TRN2]),
)
def test_every_size_that_is_advised_is_sound(tp: int, pp: int, name: str, instance: InstanceType | None) -> None:
    shape = BUILT_IN_SHAPES[name]

    def refused(tp: int, pp: int) -> dict[str, str]:
        arrangement = derive_parallelism(
            num_nodes=1,
            procs_per_node=tp * pp,
            tp_size=tp,
            pp_size=pp,
            micro_batch_size=1,
            gradient_accumulation_steps=1,
        )
        # Without the memory of a device: that is another field's.
        bare = None if instance is None else replace(instance, device_memory_gib=0)
        return {problem.field: problem.message for problem in check_spec(JOB, arrangement, shape, bare)}

    found = refused(tp, pp)
    assert (TENSOR in found) >= bool(shape.heads % tp or shape.intermediate_size % tp)
    assert (PIPELINE in found) == bool(shape.layers % pp)
    for field, message in found.items():
        for size in map(int, message.rpartition("use ")[2].split(" or ")):
            assert field not in (refused(size, pp) if field == TENSOR else refused(tp, size))


@pytest.mark.parametrize("length", [16, 1000, 2048, 4096, 131072])
def test_rows_of_a_length_for_neuron_are_sound(length: int) -> None:
    job = trainium(dataset={"maxLength": length, "packing": "wrapped"})
    assert problems(job, None, TRN1) == {}


@pytest.mark.parametrize(
    ("template", "prompt", "words"),
    [
        pytest.param("{a} {a}", {"text": "x"}, None, id="one field, twice"),
        pytest.param("{context}: {a}", {"text": "x", "context": "y"}, None, id="two fields"),
        pytest.param("{a} {b} {c}", {"text": "x"}, "has 3 fields (a, b, c), and gives 1", id="three fields"),
        pytest.param("{a}", {"text": "x", "context": "y"}, "has 1 fields (a), and gives 2", id="a context too many"),
        pytest.param("{{a}}", {"text": "x"}, "has 0 fields (none), and gives 1", id="no field"),
    ],
)
def test_a_prompt_that_does_not_fill_the_template_is_refused_before_training(
    template: str, prompt: dict[str, str], words: str | None
) -> None:
    dataset = {"format": "template", "template": {"prompt": template, "completion": "{z}"}}
    found = problems(make_job(dataset=dataset, evaluate={"prompts": [prompt]}), None, None)
    assert list(found) == ([] if words is None else ["spec.evaluate.prompts[0]"])
    assert words is None or words in found["spec.evaluate.prompts[0]"]


def test_a_model_whose_weights_exceed_the_device_is_refused_with_the_parts() -> None:
    job = gpu(training={"precision": "fp32"}, dataset={"maxLength": 64})
    message = problems(job, LLAMA_8B, G5)["spec.accelerator.instanceType"]
    assert "on each GPU of ml.g5.12xlarge, 22.0 GiB are there (weights 29.94 GiB, gradients 0.03 GiB" in message
    assert message.endswith(
        "choose an instanceType with larger devices, or hold the base in fewer bits (method.quantization nf4), or "
        "share it between ranks (parallelism.strategy fsdp), or set training.precision to bf16, or take a smaller model"
    )


def test_a_full_training_that_cannot_fit_is_told_that_an_adapter_takes_less() -> None:
    message = problems(gpu(method={"type": "full", "lora": None}), LLAMA_8B, G5)["spec.accelerator.instanceType"]
    assert message.endswith(
        "larger devices, or train an adapter (method.type lora), or share it between ranks (parallelism.strategy "
        "fsdp), or take a smaller model"
    )
    (alone,) = problems(
        make_job(method={"type": "full", "lora": None}, accelerator={"nodes": 1}),
        LLAMA_8B,
        None,
        pod_memory_bytes=32 * GIB,
    ).values()
    assert alone.endswith("train an adapter (method.type lora), or take a smaller model")


@pytest.mark.parametrize(
    ("lora", "where"),
    [
        ({"targetModules": ["q_proj", "lm_head"]}, "spec.method.lora.targetModules"),
        ({"modulesToSave": ["embed_tokens"]}, "spec.method.lora.modulesToSave"),
    ],
    ids=["an adapter on the output layer", "the embedding as a whole"],
)
def test_a_matrix_that_is_embedding_and_output_layer_trains_in_no_single_place(
    lora: dict[str, Any], where: str
) -> None:
    job = make_job(method={"lora": lora})
    tied = BUILT_IN_SHAPES["meta-llama/llama-3.2-1b"]
    assert "are one matrix (tied embeddings)" in problems(job, tied, None)[where]
    assert where not in problems(job, LLAMA_8B, None)


def test_rows_too_long_for_the_device_are_refused_with_what_to_lower() -> None:
    job = gpu(dataset={"maxLength": 8192})
    message = problems(job, LLAMA_8B, G5)["spec.accelerator.instanceType"]
    estimate = estimate_memory(job.spec, spread(job, G5), LLAMA_8B)
    assert f"needs at least {estimate.least / GIB:.1f} GiB" in message
    assert "lower training.microBatchSize or dataset.maxLength" in message


def test_what_only_the_estimates_exceed_is_a_doubt_and_no_refusal() -> None:
    job = gpu(dataset={"maxLength": 1024})
    (doubt,) = doubts(job, LLAMA_8B, G5)
    assert problems(job, LLAMA_8B, G5) == {}
    assert "on each GPU of ml.g5.12xlarge, 22.0 GiB are there" in doubt
    assert "lower training.microBatchSize" in doubt


@given(
    st.integers(16, 16384),
    st.integers(1, 8),
    st.sampled_from([LLAMA_8B, BLOOMZ_7B]),
    st.sampled_from(["all", "completion"]),
)
def test_a_training_is_refused_doubted_or_neither_by_what_it_needs(
    length: int, micro: int, shape: ModelShape, loss: str
) -> None:
    job = gpu(dataset={"maxLength": length, "lossOn": loss}, training={"microBatchSize": micro})
    estimate = estimate_memory(job.spec, spread(job, G5), shape)
    room = 22.0 * GIB
    assert bool(problems(job, shape, G5)) == (estimate.least > room)
    assert bool(doubts(job, shape, G5)) == (estimate.least <= room < estimate.total)


def test_on_cpus_the_pods_memory_limit_is_what_the_processes_share() -> None:
    job = make_job(accelerator={"type": "cpu", "nodes": 1, "processesPerNode": 2}, dataset={"maxLength": 64})
    need = estimate_memory(job.spec, spread(job, None), LLAMA_8B).least
    limit = "spec.stages.train.resources.limits.memory"
    assert problems(job, LLAMA_8B, None, pod_memory_bytes=int(2 * need) + 2) == {}
    message = problems(job, LLAMA_8B, None, pod_memory_bytes=int(2 * need) - 2)[limit]
    assert "on each of the 2 processes of a training pod" in message
    assert "raise stages.train.resources.limits.memory" in message
    assert problems(job, LLAMA_8B, None) == {}


def test_sizes_that_are_not_known_yet_are_said_to_be_checked_later() -> None:
    assert problems(trainium(), None, TRN1) == {}
    assert doubts(trainium(), None, TRN1)[0].endswith("are checked after prepare.")


# ---- the cluster


def stage(name: str = "train", pods: int = 2, priority: str | None = None, **requests: str) -> PodRequests:
    return pod_requests(name, job_manifest(pods, {"requests": requests or {"cpu": "4", "memory": "8Gi"}}, priority))


def job_manifest(pods: int, resources: dict[str, Any], priority: str | None = None) -> dict[str, Any]:
    pod: dict[str, Any] = {"containers": [{"name": "stage", "resources": resources}]}
    if priority:
        pod["priorityClassName"] = priority
    return {"spec": {"parallelism": pods, "template": {"spec": pod}}}


def quota(hard: dict[str, str], used: dict[str, str] | None = None, **spec: Any) -> Quota:
    raw = {"metadata": {"name": "team"}, "spec": {"hard": hard, **spec}, "status": {"hard": hard, "used": used or {}}}
    return parse_quota(raw)


SHARED = ClaimFacts("workspace", "Bound", ("ReadWriteMany",))
QUEUED = make_job(queue={"name": "research"})


def reason(
    *requests: PodRequests, job: FineTuneJob = JOB, due: str = "train", claim: ClaimFacts = SHARED, **more: Any
) -> tuple[Reason, str] | None:
    found = check_cluster(job, due, requests or (stage(),), claim, more.get("quotas", ()), more.get("queue"))
    return None if found is None else (found.reason, found.message)


def test_a_jobs_pods_are_asked_for_as_the_api_server_counts_them() -> None:
    resources = {"requests": {"cpu": "500m"}, "limits": {"cpu": 1, "memory": "2Gi", "nvidia.com/gpu": "4"}}
    manifest = job_manifest(3, resources, "high")
    assert pod_requests("train", manifest) == PodRequests(
        stage="train",
        pods=3,
        requests={"cpu": Decimal("1.5"), "memory": Decimal(6 * GIB), "nvidia.com/gpu": Decimal(12)},
        limits={"cpu": Decimal(3), "memory": Decimal(6 * GIB), "nvidia.com/gpu": Decimal(12)},
        priority_class="high",
    )
    assert memory_limit({"memory": "2Gi", "cpu": "1"}) == 2 * GIB
    assert memory_limit({"cpu": "1"}) is None


@pytest.mark.parametrize(
    ("hard", "words"),
    [
        ({"requests.cpu": "7"}, "requests.cpu 8 in 2 pods, and ResourceQuota team of namespace team-a allows 7 in all"),
        ({"cpu": "7"}, "cpu 8 in 2 pods"),
        ({"memory": "15Gi"}, "memory 16Gi in 2 pods, and ResourceQuota team of namespace team-a allows 15Gi"),
        ({"limits.memory": "1Gi"}, "limits.memory 20Gi"),
        ({"pods": "1"}, "pods 2"),
        ({"count/jobs.batch": "0"}, "count/jobs.batch 1"),
        ({"requests.nvidia.com/gpu": "7"}, "requests.nvidia.com/gpu 8"),
    ],
)
def test_a_stage_above_what_a_quota_allows_in_all_can_never_run(hard: dict[str, str], words: str) -> None:
    resources = {
        "requests": {"cpu": "4", "memory": "8Gi", "nvidia.com/gpu": "4"},
        "limits": {"memory": "10Gi", "nvidia.com/gpu": "4"},
    }
    found = reason(pod_requests("train", job_manifest(2, resources)), quotas=[quota(hard)])
    assert found is not None
    assert found[0] is Reason.QUOTA_EXCEEDS_MAX
    assert words in found[1]
    assert "lower spec.accelerator.nodes or stages.train.resources, or have the quota raised." in found[1]


def test_a_training_that_never_fits_is_found_while_prepare_is_due() -> None:
    requests = (stage("prepare", 1, cpu="1"), stage())
    found = reason(*requests, due="prepare", quotas=[quota({"cpu": "7"})])
    assert found is not None
    assert found[0] is Reason.QUOTA_EXCEEDS_MAX
    assert found[1].startswith("Stage train ")


def test_a_quota_that_others_use_now_is_waited_for_by_the_stage_that_is_due() -> None:
    taken = quota({"cpu": "8", "memory": "16Gi"}, {"cpu": "500m", "memory": "0"})
    found = reason(quotas=[taken])
    assert found == (
        Reason.QUOTA_EXCEEDED,
        "Stage train asks for cpu 8 in 2 pods; of ResourceQuota team in namespace team-a 0.5 of 8 are used. It starts "
        "when there is room.",
    )
    assert reason(stage("prepare", 1, cpu="1"), stage(), due="prepare", quotas=[taken]) is None
    assert reason(job=QUEUED, quotas=[taken]) is None, "Kueue decides when the pods come"
    assert reason(quotas=[quota({"cpu": "8", "memory": "16Gi"})]) is None


@given(st.integers(0, 20000), st.integers(0, 20000), st.integers(1, 8), st.integers(1, 5000))
def test_a_stage_starts_only_where_request_and_use_are_within_the_quota(
    hard: int, used: int, pods: int, each: int
) -> None:
    found = reason(stage(pods=pods, cpu=f"{each}m"), quotas=[quota({"cpu": f"{hard}m"}, {"cpu": f"{used}m"})])
    expected = None
    if pods * each > hard:
        expected = Reason.QUOTA_EXCEEDS_MAX
    elif pods * each + used > hard:
        expected = Reason.QUOTA_EXCEEDED
    assert (found and found[0]) is expected


def scope(name: str, operator: str = "Exists", *values: str) -> dict[str, Any]:
    return {"scopeSelector": {"matchExpressions": [{"scopeName": name, "operator": operator, "values": list(values)}]}}


@pytest.mark.parametrize(
    ("spec", "applies"),
    [
        ({}, True),
        ({"scopes": ["Terminating"]}, False),
        ({"scopes": ["NotTerminating"]}, True),
        ({"scopes": ["BestEffort"]}, False),
        ({"scopes": ["NotBestEffort", "NotTerminating"]}, True),
        ({"scopes": ["CrossNamespacePodAffinity"]}, False),
        (scope("PriorityClass", "In", "high", "low"), True),
        (scope("PriorityClass", "In", "low"), False),
        (scope("PriorityClass", "NotIn", "high"), False),
        (scope("PriorityClass", "NotIn", "low"), True),
        (scope("PriorityClass"), True),
        (scope("PriorityClass", "DoesNotExist"), False),
    ],
    ids=str,
)
def test_a_quota_counts_only_the_pods_in_its_scopes(spec: dict[str, Any], applies: bool) -> None:
    found = reason(stage(priority="high"), quotas=[quota({"cpu": "1"}, **spec)])
    assert (found is not None) is applies


def queue(*flavors: dict[str, tuple[str, str | None]], cohort: str | None = None, **key: Any) -> ClusterQueue:
    raw_flavors = [
        {
            "name": f"flavor-{number}",
            "resources": [
                {"name": name, "nominalQuota": nominal, **({"borrowingLimit": limit} if limit is not None else {})}
                for name, (nominal, limit) in flavor.items()
            ],
        }
        for number, flavor in enumerate(flavors)
    ]
    spec = {
        "resourceGroups": [{"coveredResources": [], "flavors": raw_flavors}],
        **({"cohort": cohort} if cohort else {}),
    }
    return parse_cluster_queue({"metadata": {"name": "team-queue"}, "spec": {**spec, **key}})


@pytest.mark.parametrize(
    ("cluster_queue", "fits"),
    [
        pytest.param(queue({"cpu": ("8", None)}), True, id="quota met exactly"),
        pytest.param(queue({"cpu": ("7", None)}), False, id="above the quota"),
        pytest.param(queue({"cpu": ("7", "1")}), False, id="a borrowing limit without a cohort gives nothing"),
        pytest.param(queue({"cpu": ("7", "1")}, cohort="all"), True, id="borrowing makes up for it"),
        pytest.param(queue({"cpu": ("6", "1")}, cohort="all"), False, id="above quota and borrowing"),
        pytest.param(queue({"cpu": ("0", None)}, cohort="all"), True, id="unlimited borrowing is not judged"),
        pytest.param(queue({"cpu": ("0", None)}, cohortName="all"), True, id="the cohort of v1beta2"),
        pytest.param(queue({"cpu": ("1", None)}, {"cpu": ("8", None)}), True, id="one of two flavors has enough"),
        pytest.param(
            queue({"cpu": ("8", None), "memory": ("1Gi", None)}, {"cpu": ("1", None), "memory": ("16Gi", None)}),
            False,
            id="no flavor has enough of both",
        ),
        pytest.param(queue({"nvidia.com/gpu": ("0", None)}), True, id="a group that the stage asks nothing of"),
        pytest.param(ClusterQueue("team-queue"), True, id="a queue without groups is left to Kueue"),
    ],
)
def test_a_stage_above_every_flavors_most_can_never_be_admitted(cluster_queue: ClusterQueue, fits: bool) -> None:
    found = reason(job=QUEUED, queue=cluster_queue)
    assert found is None if fits else found is not None and found[0] is Reason.QUOTA_EXCEEDS_MAX


def test_a_stage_that_can_never_be_admitted_is_told_each_flavors_numbers() -> None:
    cluster_queue = ClusterQueue(
        "team-queue", ((Flavor("trn1", {"cpu": Decimal(2)}), Flavor("spot", {"cpu": None, "memory": Decimal(GIB)})),)
    )
    assert reason(job=QUEUED, queue=cluster_queue) == (
        Reason.QUOTA_EXCEEDS_MAX,
        "Stage train can never be admitted: ClusterQueue team-queue gives at most cpu 2 of trn1, asked for are 8; "
        "memory 1Gi of spot, asked for are 16Gi in 2 pods. Lower spec.accelerator.nodes or stages.train.resources, "
        "have the quota raised, or use another queue (suspend the job first).",
    )


@pytest.mark.parametrize(
    ("nodes", "modes", "words"),
    [
        (1, ("ReadWriteOnce",), None),
        (1, ("ReadWriteOncePod",), None),
        (1, ("ReadOnlyMany",), "every stage writes to it"),
        (2, ("ReadWriteMany",), None),
        (2, ("ReadWriteOnce", "ReadWriteMany"), None),
        (2, ("ReadWriteOnce",), "has access mode ReadWriteOnce, and the 2 nodes of the training write to it at once"),
        (2, ("ReadOnlyMany", "ReadWriteOnce"), "has access mode ReadOnlyMany, ReadWriteOnce"),
    ],
)
def test_the_claim_must_be_writable_by_every_node(nodes: int, modes: tuple[str, ...], words: str | None) -> None:
    claim = parse_claim("fsx", {"spec": {"accessModes": list(modes)}, "status": {"phase": "Pending"}})
    found = reason(job=make_job(accelerator={"nodes": nodes}), due="prepare", claim=claim)
    if words is None:
        assert found is None
    else:
        assert found is not None
        assert found[0] is Reason.CLAIM_NOT_SHARED
        assert words in found[1]


def test_a_claim_has_the_modes_of_its_volume_and_none_where_it_is_missing() -> None:
    raw = {"spec": {"accessModes": ["ReadWriteOnce"]}, "status": {"phase": "Bound", "accessModes": ["ReadWriteMany"]}}
    assert parse_claim("fsx", raw) == ClaimFacts("fsx", "Bound", ("ReadWriteMany",))
    assert parse_claim("fsx", None) == ClaimFacts("fsx", None)
    assert reason(claim=parse_claim("fsx", None)) is None, "that is a missing claim, which is looked for elsewhere"
