"""The memory arithmetic: states against counts by hand, activations against what autograd really keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from builders import make_job
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.core.memory import GIB, TOLERANCE, estimate_memory, trainable_parameters
from finetune_operator.core.model_shapes import BUILT_IN_SHAPES, ModelShape
from finetune_operator.core.parallelism import Parallelism, derive_parallelism

LLAMA_8B = BUILT_IN_SHAPES["meta-llama/meta-llama-3-8b"]
LORA = {"lora": {"rank": 16, "targetModules": ["q_proj", "v_proj"]}}
FULL = {"type": "full", "lora": None}


def spread(tp: int = 1, pp: int = 1, dp: int = 1, micro: int = 1, strategy: str = "ddp") -> Parallelism:
    return derive_parallelism(
        num_nodes=1,
        procs_per_node=tp * pp * dp,
        tp_size=tp,
        pp_size=pp,
        micro_batch_size=micro,
        gradient_accumulation_steps=1,
        strategy=strategy,
    )


@pytest.mark.parametrize(
    ("method", "precision", "states"),
    [
        pytest.param(FULL, "bf16", (2, 2, 12), id="mixed precision Adam: 2 + 2 + 12 bytes a parameter"),
        pytest.param(FULL, "fp32", (4, 4, 8), id="float32 Adam: 4 + 4 + 8 bytes a parameter"),
    ],
)
def test_full_training_holds_sixteen_bytes_a_parameter(
    method: dict[str, Any], precision: str, states: tuple[int, int, int]
) -> None:
    spec = make_job(method=method, training={"precision": precision}).spec
    found = estimate_memory(spec, spread(), LLAMA_8B)
    parts = (found.weights, found.gradients, found.optimizer)
    assert parts == tuple(size * LLAMA_8B.parameters for size in states)


@pytest.mark.parametrize(
    ("quantization", "precision", "base_bytes"),
    [
        pytest.param("none", "bf16", 2 * 8_030_261_248, id="a bf16 base"),
        pytest.param("none", "fp32", 4 * 8_030_261_248, id="a float32 base"),
        pytest.param("int8", "bf16", 2 * 1_050_673_152 + 6_979_588_096, id="an int8 base with bf16 embeddings"),
        pytest.param("nf4", "bf16", 2 * 1_050_673_152 + 0.5625 * 6_979_588_096, id="an nf4 base with bf16 embeddings"),
    ],
)
def test_lora_holds_the_base_once_and_sixteen_bytes_a_parameter_of_the_adapter(
    quantization: str, precision: str, base_bytes: float
) -> None:
    adapter = 6_815_744  # of r=16 on q_proj and v_proj of Llama 3 8B, as the trainer counts it
    spec = make_job(method={**LORA, "quantization": quantization}, training={"precision": precision}).spec
    found = estimate_memory(spec, spread(), LLAMA_8B)
    assert trainable_parameters(spec, LLAMA_8B) == adapter
    assert found.weights == base_bytes + 4 * adapter
    assert (found.gradients, found.optimizer) == (4 * adapter, 8 * adapter)


def test_bloom_7b1_trains_3932160_parameters_at_rank_16() -> None:
    spec = make_job(method={"lora": {"rank": 16, "targetModules": ["query_key_value"]}}).spec
    shape = BUILT_IN_SHAPES["bigscience/bloomz-7b1"]
    assert trainable_parameters(spec, shape) == 30 * 16 * (4096 + 3 * 4096)


def test_with_an_mlp_of_four_widths_it_is_the_papers_formula() -> None:
    shape = BUILT_IN_SHAPES["bigscience/bloomz-7b1"]
    spec = make_job(dataset={"maxLength": 1024}).spec
    for t in (1, 2, 8):
        found = estimate_memory(spec, spread(tp=t, micro=3), shape)
        assert found.activations == pytest.approx(30 * 1024 * 3 * 4096 * (10 + 24 / t))


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.integers(1, 4), st.sampled_from([FULL, LORA]))
def test_splitting_a_model_divides_its_weights_and_never_adds_to_a_part(
    tp: int, pp: int, micro: int, method: dict[str, Any]
) -> None:
    spec = make_job(method=method).spec
    whole, part = (estimate_memory(spec, spread(t, p, micro=micro), LLAMA_8B) for t, p in ((1, 1), (tp, pp)))
    assert all(part.parts_gib()[name] <= whole.parts_gib()[name] for name in whole.parts_gib())
    if method is FULL:
        assert part.states * tp * pp == pytest.approx(whole.states)
    assert 0 < part.states < part.least <= part.total
    assert sum(part.parts_gib().values()) * GIB == pytest.approx(part.total)


def test_data_parallelism_and_steps_between_updates_change_nothing() -> None:
    few = make_job().spec
    many = make_job(training={"gradientAccumulationSteps": 8}).spec
    assert estimate_memory(few, spread(), LLAMA_8B) == estimate_memory(many, spread(dp=16), LLAMA_8B)


def test_logits_count_as_certain_only_where_every_token_is_learnt() -> None:
    answers, everything = (
        estimate_memory(make_job(dataset={"lossOn": loss}).spec, spread(), LLAMA_8B) for loss in ("completion", "all")
    )
    assert answers.logits == everything.logits == everything.certain_logits > 0
    assert answers.certain_logits == 0


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_activations_are_what_autograd_keeps(lora: bool, precision: str) -> None:
    """Per layer, as the difference between a model of 4 and one of 2 layers, so that embedding and logits cancel."""
    shape = ModelShape(256, 2, 8, 2, 704, 512, 1)
    gated = replace(shape, parameters=2 * shape.embedding_parameters + 4 * 256 * 704 * 4)
    method = {"lora": {"rank": 8, "targetModules": ["q_proj", "v_proj"]}} if lora else FULL
    spec = make_job(method=method, dataset={"maxLength": 512}, training={"precision": precision}).spec
    two = estimate_memory(spec, spread(), gated).activations
    kept = _kept_bytes(4, shape, lora, precision) - _kept_bytes(2, shape, lora, precision)
    assert gated.has_gated_mlp
    assert two == pytest.approx(kept, rel=TOLERANCE)


def _kept_bytes(layers: int, shape: ModelShape, lora: bool, precision: str) -> int:
    """Bytes that autograd keeps for the backward pass of one row of 512 tokens, parameters not counted."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab_size,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    if lora:
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # else its address could be another's a moment later
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        model.train()(input_ids=torch.zeros((1, 512), dtype=torch.long))
    return sum(kept.values())


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_fsdp_divides_the_states_among_the_ranks_but_for_one_layer_and_the_embeddings(method: dict[str, Any]) -> None:
    spec = make_job(method=method, training={"precision": "bf16"}).spec
    whole = estimate_memory(spec, spread(dp=8), LLAMA_8B)
    shared = estimate_memory(spec, spread(dp=8, strategy="fsdp"), LLAMA_8B)
    layer = (LLAMA_8B.parameters - LLAMA_8B.embedding_parameters) / LLAMA_8B.layers
    assert shared.weights == whole.weights / 8 + 2 * (layer + LLAMA_8B.embedding_parameters)
    assert (shared.gradients, shared.optimizer) == (whole.gradients / 8, whole.optimizer / 8)
    assert shared.activations == whole.activations


def test_gradient_checkpointing_keeps_each_layers_input_and_one_layers_activations() -> None:
    spec = make_job(method=LORA, training={"precision": "bf16"}).spec
    saving = make_job(method=LORA, training={"precision": "bf16", "gradientCheckpointing": True}).spec
    whole = estimate_memory(spec, spread(), LLAMA_8B).activations
    inputs = 2 * LLAMA_8B.layers * LLAMA_8B.hidden_size * spec.dataset.max_length
    assert estimate_memory(saving, spread(), LLAMA_8B).activations == pytest.approx(inputs + whole / LLAMA_8B.layers)
