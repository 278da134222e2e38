"""What the vendor's stack cannot train: one row a rule, with the words that its message must have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.neuron_rules import (
    MODEL_TYPES,
    NeuronModel,
    NeuronNode,
    check_caches,
    check_cores,
    check_groups,
    check_model,
    check_stack,
    needs_shared_heads,
    neuron_model,
    neuron_targets,
    stack_doubt,
)

LLAMA_8B = NeuronModel("llama", 4096, 32, 8, 14336, 128256, 32)
TRN1, TRN2 = NeuronNode("ml.trn1.32xlarge", 32), NeuronNode("ml.trn2.48xlarge", 64)
TENSOR, PIPELINE = "spec.parallelism.tensorParallelSize", "spec.parallelism.pipelineParallelSize"
TARGETS, SOURCE = "spec.method.lora.targetModules", "spec.model.source"
FULL = {"type": "full"}


def lora(*targets: str) -> dict[str, Any]:
    return {"type": "lora", "lora": {"rank": 16, "targetModules": list(targets or ("q_proj", "v_proj"))}}


WALKTHROUGH = lora("q_proj", "v_proj")


def found(
    method: dict[str, Any], tp: int, pp: int = 1, model: NeuronModel = LLAMA_8B, node: NeuronNode | None = TRN1
) -> dict[str, str]:
    return {problem.field: problem.message for problem in check_model(method, tp, pp, model, node)}


REFUSED: dict[str, tuple[dict[str, str], str, list[str]]] = {
    "a model type that the vendor does not train": (
        found(WALKTHROUGH, 8, model=replace(LLAMA_8B, model_type="mistral")),
        SOURCE,
        ["mistral", "llama, qwen3, granite (tensor parallelism only)", "cuda or cpu"],
    ),
    "Qwen 2.5, which is not Qwen3": (
        found(WALKTHROUGH, 4, model=NeuronModel("qwen2", 3584, 28, 4, 18944, 152064, 28)),
        SOURCE,
        ["model type qwen2 cannot be trained on Trainium"],
    ),
    "granite in pipeline stages": (
        found(WALKTHROUGH, 8, 2, replace(LLAMA_8B, model_type="granite")),
        PIPELINE,
        ["granite takes no pipeline stages", "is 2", "use 1"],
    ),
    "layers with biases, which the vendor leaves out": (
        found(WALKTHROUGH, 8, model=replace(LLAMA_8B, biased=True)),
        SOURCE,
        ["biases", "attention_bias or mlp_bias"],
    ),
    "heads that do not divide the hidden size": (
        found(WALKTHROUGH, 8, model=replace(LLAMA_8B, hidden_size=4100)),
        SOURCE,
        ["32 attention heads do not divide its hidden size 4100"],
    ),
    "a vocabulary that is not divided": (
        found(WALKTHROUGH, 8, model=replace(LLAMA_8B, vocab_size=50257)),
        TENSOR,
        ["tensorParallelSize 8 does not divide the model's vocabulary (50257)", "use 1"],
    ),
    "heads that are not divided": (
        found(lora("o_proj"), 16, model=replace(LLAMA_8B, hidden_size=3072, heads=24, kv_heads=24)),
        TENSOR,
        ["attention heads (24)", "use 8"],
    ),
    "an intermediate size that is not divided": (
        found(WALKTHROUGH, 8, model=replace(LLAMA_8B, intermediate_size=14340)),
        TENSOR,
        ["MLP's width (14340)", "use 4"],
    ),
    "KV heads that are neither divided nor copied evenly": (
        found(lora("o_proj"), 16, model=replace(LLAMA_8B, hidden_size=6144, heads=48, kv_heads=12)),
        TENSOR,
        ["neither divides the model's key and value heads (12) nor is a multiple", "use 4"],
    ),
    "layers that are not divided": (
        found(WALKTHROUGH, 1, 32, replace(LLAMA_8B, layers=30)),
        PIPELINE,
        ["pipelineParallelSize 32 does not divide the model's 30 layers", "use 30"],
    ),
    "copied KV heads on trn2": (
        found(lora("o_proj"), 16, node=TRN2),
        TENSOR,
        ["tensorParallelSize 16 is more than the model's key and value heads (8)", "train apart on trn2", "use 8"],
    ),
    "q and v without k at 16": (
        found(WALKTHROUGH, 16),
        TARGETS,
        ["at tensorParallelSize 16 the model's 8 key and value heads", "q_proj, v_proj without k_proj", "add k_proj"],
    ),
    "q and v without k at 32": (
        found(WALKTHROUGH, 32),
        TARGETS,
        ["add k_proj to targetModules, or use tensorParallelSize 8"],
    ),
    "q alone where heads are shared": (
        found(lora("q_proj", "o_proj"), 32),
        TARGETS,
        ["q_proj without k_proj and v_proj", "add k_proj and v_proj"],
    ),
    "tied embeddings on two pipeline stages, fully trained": (
        found(FULL, 1, 2, replace(LLAMA_8B, tied=True)),
        PIPELINE,
        ["pipelineParallelSize is 2", "tied embeddings", "two copies", "use 1, or method.type lora"],
    ),
}


@pytest.mark.parametrize(("problems", "field", "words"), REFUSED.values(), ids=REFUSED)
def test_what_the_vendor_cannot_train_is_refused_with_the_numbers_and_a_fix(
    problems: dict[str, str], field: str, words: list[str]
) -> None:
    assert [word for word in words if word not in problems[field]] == []
    assert list(problems) == [field], "one cause has one problem"


SOUND = {
    "the walkthrough: q and v at 8, with 8 KV heads": found(WALKTHROUGH, 8),
    "q, k and v at 16": found(lora("q_proj", "k_proj", "v_proj"), 16),
    "q, k and v at 32": found(lora("q_proj", "k_proj", "v_proj"), 32),
    "all linear layers at 32": found(lora("all-linear"), 32),
    "no attention at 32": found(lora("gate_proj", "up_proj", "down_proj"), 32),
    "every weight at 32": found(FULL, 32),
    "q and v at 4 on trn2, the walkthrough's size there": found(WALKTHROUGH, 4, node=TRN2),
    "Qwen3 in two pipeline stages": found(WALKTHROUGH, 8, 2, replace(LLAMA_8B, model_type="qwen3")),
    "granite by tensor parallelism": found(WALKTHROUGH, 8, model=replace(LLAMA_8B, model_type="granite")),
    "tied embeddings on two stages, frozen": found(WALKTHROUGH, 8, 2, replace(LLAMA_8B, tied=True)),
    "tied embeddings on one stage, fully trained": found(FULL, 8, 1, replace(LLAMA_8B, tied=True)),
    "a model type that nobody told": found(WALKTHROUGH, 8, model=replace(LLAMA_8B, model_type="")),
}


@pytest.mark.parametrize("problems", SOUND.values(), ids=SOUND)
def test_what_the_vendor_can_train_is_not_refused(problems: dict[str, str]) -> None:
    assert problems == {}


@given(
    st.sampled_from([1, 2, 4, 8, 12, 16, 32, 64]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 64),
    st.sampled_from([TRN1, TRN2]),
)
def test_every_tensor_parallel_size_that_is_advised_is_sound(
    kv_heads: int, group: int, tp: int, node: NeuronNode
) -> None:
    model = replace(LLAMA_8B, hidden_size=64 * 96, heads=kv_heads * group, kv_heads=kv_heads, intermediate_size=64 * 96)
    problems = found(lora("o_proj"), tp, model=model, node=node)
    if TENSOR in problems:
        advised = problems[TENSOR].rpartition("use ")[2].split(" or ")
        assert advised
        assert [size for size in advised if TENSOR in found(lora("o_proj"), int(size), model=model, node=node)] == []
    elif node is TRN2:
        assert tp <= kv_heads


@given(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
def test_adapters_on_some_of_q_k_and_v_are_refused_exactly_where_their_heads_are_shared(kv_heads: int, tp: int) -> None:
    model = replace(LLAMA_8B, heads=64, kv_heads=kv_heads)
    for targets in (("q_proj",), ("q_proj", "v_proj"), ("k_proj", "v_proj")):
        assert (TARGETS in found(lora(*targets), tp, model=model)) == needs_shared_heads(tp, kv_heads)
    assert TARGETS not in found(lora("q_proj", "k_proj", "v_proj", "o_proj"), tp, model=model)


def test_all_linear_reaches_the_vendor_by_its_names() -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert neuron_targets(["all-linear"]) == names
    assert neuron_targets(["v_proj", "q_proj"]) == ("v_proj", "q_proj")


def test_config_json_is_read_in_the_words_of_the_three_families() -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "num_hidden_layers": 32,
    }
    assert neuron_model(config) == LLAMA_8B
    multi_head = {name: value for name, value in config.items() if name != "num_key_value_heads"}
    assert neuron_model(multi_head).kv_heads == 32
    assert neuron_model({**config, "attention_bias": True, "tie_word_embeddings": True}) == replace(
        LLAMA_8B, biased=True, tied=True
    )
    with pytest.raises(KeyError, match="vocab_size"):
        neuron_model({name: value for name, value in config.items() if name != "vocab_size"})
    assert set(MODEL_TYPES) == {"llama", "qwen3", "granite"}


# cores


def split(tp: int, pp: int, dp: int, nodes: int = 1, procs: int = 32) -> dict[str, Any]:
    return {
        "numNodes": nodes,
        "procsPerNode": procs,
        "worldSize": nodes * procs,
        "tensorParallelSize": tp,
        "pipelineParallelSize": pp,
        "dataParallelSize": dp,
    }


@pytest.mark.parametrize("sizes", [split(8, 1, 4), split(32, 1, 1), split(8, 2, 2), split(8, 4, 2, nodes=2)])
def test_sizes_that_use_every_core_are_sound(sizes: dict[str, Any]) -> None:
    assert check_cores(sizes, TRN1) == ()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        pytest.param(
            split(8, 1, 1, procs=8),
            [
                "tensorParallelSize 8 x pipelineParallelSize 1 x dataParallelSize 1 are 8 NeuronCores",
                "have 32: 24 of them",
            ],
            id="the walkthrough's first template: 24 of 32 cores idle",
        ),
        pytest.param(split(8, 1, 8, procs=64), ["are 64 NeuronCores", "32 are not there"], id="more than there are"),
        pytest.param(
            split(6, 1, 5, procs=30), ["2 of them idle", "tensorParallelSize 32"], id="sizes that do not divide"
        ),
    ],
)
def test_cores_that_would_idle_or_are_not_there_are_refused(sizes: dict[str, Any], words: list[str]) -> None:
    (problem,) = check_cores(sizes, TRN1)
    assert [word for word in words if word not in problem.message] == []


# groups


@pytest.mark.parametrize(
    ("sizes", "node", "words"),
    [
        pytest.param(
            split(4, 2, 4),
            TRN1,
            [
                "must be a multiple of 8, is 4 with pipelineParallelSize 2",
                "use pipelineParallelSize 1 or tensorParallelSize 8",
            ],
            id="two stages on one node",
        ),
        pytest.param(
            split(4, 1, 1, nodes=2, procs=2),
            NeuronNode("trn1.2xlarge", 2),
            ["a node has 2 of them", "use tensorParallelSize 2"],
            id="less than a group a node",
        ),
    ],
)
def test_groups_of_four_on_trn1_must_fill_whole_nodes(
    sizes: dict[str, Any], node: NeuronNode, words: list[str]
) -> None:
    (problem,) = check_groups(sizes, node)
    assert problem.field == TENSOR
    assert [word for word in words if word not in problem.message] == []


@pytest.mark.parametrize(
    ("sizes", "node"),
    [(split(4, 1, 8), TRN1), (split(4, 2, 8, nodes=2), TRN1), (split(8, 2, 2), TRN1), (split(4, 4, 4, procs=64), TRN2)],
    ids=["one stage on one node", "a stage a node", "groups of eight", "trn2"],
)
def test_other_groups_are_made_of_neighbours(sizes: dict[str, Any], node: NeuronNode) -> None:
    assert check_groups(sizes, node) == ()


# the stack


@pytest.mark.parametrize(
    ("instance", "sdk", "words"),
    [
        pytest.param("ml.trn1.32xlarge", "2.28.0", ["Python 3.12", "use an image of SDK 2.26.0"], id="trn1 with 2.28"),
        pytest.param(
            "trn1.32xlarge", "2.30.0", ["no PyTorch/XLA training", "use an image of SDK"], id="trn1 with 2.30"
        ),
        pytest.param("ml.trn3.48xlarge", "2.26.0", ["TorchNeuron", "use an instance type of trn1"], id="trn3"),
        pytest.param("ml.inf2.48xlarge", "2.26.0", ["inference", "use an instance type of trn1"], id="Inferentia"),
    ],
)
def test_a_pair_that_is_known_not_to_work_is_refused_with_its_source(instance: str, sdk: str, words: list[str]) -> None:
    problem = check_stack(instance, sdk)
    assert problem is not None
    assert (problem.field, problem.value) == ("spec.accelerator.instanceType", instance)
    assert [word for word in (instance, sdk, *words) if word not in problem.message] == []
    assert stack_doubt(instance, sdk) is None


def test_trn2_may_be_tried_and_is_told_what_is_not_sure() -> None:
    assert check_stack("ml.trn2.48xlarge", "2.26.0") is None
    assert "train apart there" in (stack_doubt("ml.trn2.48xlarge", "2.26.0") or "")
    assert check_stack("ml.trn1.32xlarge", "2.26.0") is stack_doubt("ml.trn1.32xlarge", "2.26.0") is None
    assert "Nothing is known of ml.trn1.32xlarge with Neuron SDK 2.27.0" in (
        stack_doubt("ml.trn1.32xlarge", "2.27.0") or ""
    )


# the cache


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        pytest.param(
            {"NEURON_CC_FLAGS": "--model-type=transformer --cache_dir=/fsx/llama3.1"},
            ["NEURON_CC_FLAGS", "'/fsx/llama3.1'", "use /fsx/llama3-1"],
            id="a dot",
        ),
        pytest.param(
            {"NEURON_COMPILE_CACHE_URL": "s3://bucket/cache"},
            ["NEURON_COMPILE_CACHE_URL", "'s3://bucket/cache'", "use /bucket/cache"],
            id="an address",
        ),
        pytest.param(
            {"NEURON_CC_FLAGS": "--cache_dir=/a", "NEURON_COMPILE_CACHE_URL": "/b"},
            ["name different caches", "NEURON_CC_FLAGS /a and NEURON_COMPILE_CACHE_URL /b"],
            id="two caches",
        ),
        pytest.param({"NEURON_CC_FLAGS": "--cache_dir relative"}, ["'relative'", "use /relative"], id="not absolute"),
    ],
)
def test_a_cache_that_the_vendors_tools_would_not_agree_on_is_refused(
    environment: dict[str, str], words: list[str]
) -> None:
    (problem,) = check_caches(environment, "spec.stages.train.env")
    assert problem.field == "spec.stages.train.env"
    assert [word for word in words if word not in problem.message] == []


def test_one_plain_cache_or_none_is_sound() -> None:
    both = {"NEURON_CC_FLAGS": "--cache_dir=/fsx/neuron_cache", "NEURON_COMPILE_CACHE_URL": "/fsx/neuron_cache"}
    assert check_caches(both, "x") == check_caches({}, "x") == ()
