"""The memory arithmetic: states against counts by hand, activations against what autograd really keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from builders import make_job
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.api.spec import FineTuneJobSpec
from finetune_operator.core.memory import GIB, TOLERANCE, _block_layers, estimate_memory, trainable_parameters
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


ON_TRAINIUM = {"accelerator": {"type": "neuron", "instanceType": "ml.trn1.32xlarge", "nodes": 1}}


@pytest.mark.parametrize(
    ("where", "precision", "states"),
    [
        pytest.param({}, "fp32", (4, 4, 8), id="float32 Adam: 4 + 4 + 8 bytes a parameter"),
        pytest.param(ON_TRAINIUM, "bf16", (2, 4, 12), id="Trainium: 2 + 4 + 12, gradients and a copy in float32"),
    ],
)
def test_full_training_holds_so_many_bytes_a_parameter(
    where: dict[str, Any], precision: str, states: tuple[int, int, int]
) -> None:
    spec = make_job(method=FULL, training={"precision": precision}, **where).spec
    found = estimate_memory(spec, spread(), LLAMA_8B)
    parts = (found.weights, found.gradients, found.optimizer)
    assert parts == tuple(size * LLAMA_8B.parameters for size in states)


def test_on_trainium_data_parallel_ranks_share_the_optimizer_and_nothing_else() -> None:
    spec = make_job(method=FULL, **ON_TRAINIUM).spec
    alone, four = (estimate_memory(spec, spread(tp=8, dp=dp), LLAMA_8B) for dp in (1, 4))
    assert (
        (four.weights, four.gradients)
        == (alone.weights, alone.gradients)
        == (2 * 8_030_261_248 / 8, 4 * 8_030_261_248 / 8)
    )
    assert alone.optimizer == 4 * four.optimizer == 12 * 8_030_261_248 / 8


def test_the_walkthroughs_adapter_on_a_neuroncore() -> None:
    adapter = 6_815_744
    spec = make_job(method=LORA, **ON_TRAINIUM).spec
    found = estimate_memory(spec, spread(tp=8, dp=4), LLAMA_8B)
    assert found.weights == 2 * (8_030_261_248 / 8 + adapter)
    assert (found.gradients, found.optimizer) == (4 * adapter, 3 * adapter)


def test_ranks_that_are_more_than_kv_heads_hold_a_whole_head_each() -> None:
    spec = make_job(method=FULL, **ON_TRAINIUM).spec
    keys_and_values = 32 * 2 * 4096 * 1024
    found = estimate_memory(spec, spread(tp=32), LLAMA_8B).weights
    assert found == pytest.approx(2 * ((8_030_261_248 - keys_and_values) / 32 + keys_and_values / 8))


@pytest.mark.parametrize(
    ("length", "packing", "pp", "keeps"),
    [
        pytest.param(2048, "bestFit", 1, True, id="a mask keeps records apart"),
        pytest.param(2048, "wrapped", 1, True, id="cut records, kept apart as well"),
        pytest.param(2048, "none", 1, False, id="one record a row: flash attention"),
        pytest.param(2048, "none", 2, False, id="pipeline stages: flash attention"),
        pytest.param(1024, "none", 1, True, id="rows that the kernel does not take"),
        pytest.param(4096, "wrapped", 1, False, id="rows too long for a mask: flash attention"),
    ],
)
def test_eager_attention_on_trainium_keeps_its_scores_and_flash_attention_does_not(
    length: int, packing: str, pp: int, keeps: bool
) -> None:
    dataset = {"maxLength": length, "packing": packing}
    split = {"tensorParallelSize": 8, "pipelineParallelSize": pp}
    spec = make_job(method=FULL, dataset=dataset, parallelism=split, **ON_TRAINIUM).spec
    found = estimate_memory(spec, spread(tp=8, pp=pp), LLAMA_8B).activations
    without = 32 * length * (4096 * (10 + 8 / 8) + 8 * 14336 / 8)
    assert found == pytest.approx(without + keeps * 32 * 6 * (32 / 8) * length * length)


def test_full_training_in_bf16_has_float32_weights_and_a_copy_of_every_matrix_it_multiplies_with() -> None:
    spec = make_job(method=FULL, training={"precision": "bf16"}).spec
    found = estimate_memory(spec, spread(), LLAMA_8B)
    assert found.weights == 4 * 8_030_261_248 + 2 * (8_030_261_248 - 128256 * 4096)
    assert (found.gradients, found.optimizer) == (4 * 8_030_261_248, 8 * 8_030_261_248)


@pytest.mark.parametrize(
    ("quantization", "precision", "base_bytes"),
    [
        pytest.param("none", "bf16", 2 * 8_030_261_248, id="a bf16 base"),
        pytest.param("none", "fp32", 4 * 8_030_261_248, id="a float32 base"),
        pytest.param("int8", "bf16", 2 * 1_050_673_152 + 6_979_588_096, id="an int8 base with bf16 embeddings"),
        pytest.param("nf4", "bf16", 2 * 1_050_673_152 + 0.5625 * 6_979_588_096, id="an nf4 base with bf16 embeddings"),
        pytest.param("nf4", "fp32", 4 * 1_050_673_152 + 0.5625 * 6_979_588_096, id="an nf4 base in float32"),
    ],
)
def test_lora_holds_the_base_once_and_sixteen_bytes_a_parameter_of_the_adapter(
    quantization: str, precision: str, base_bytes: float
) -> None:
    adapter = 6_815_744  # of r=16 on q_proj and v_proj of Llama 3 8B, as the trainer counts it
    spec = make_job(method={**LORA, "quantization": quantization}, training={"precision": precision}).spec
    found = estimate_memory(spec, spread(), LLAMA_8B)
    assert trainable_parameters(spec, LLAMA_8B) == adapter
    assert found.weights == base_bytes + (6 if precision == "bf16" else 4) * adapter
    assert (found.gradients, found.optimizer) == (4 * adapter, 8 * adapter)


def test_an_adapter_on_wide_heads_has_their_width() -> None:
    """Qwen3 0.6B: 16 heads of 128 numbers on a hidden state of 1024, 8 key and value heads, 28 layers."""
    shape = ModelShape(1024, 28, 16, 8, 3072, 151936, 596_049_920, tied=True, model_type="qwen3", head_dim=128)
    targets = {"rank": 8, "targetModules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    expected = 28 * 8 * (2 * (1024 + 2048) + 2 * (1024 + 1024))
    assert trainable_parameters(make_job(method={"lora": targets}).spec, shape) == expected
    matrices = 28 * sum(inputs * outputs for inputs, outputs in _block_layers(shape).values())
    norms = 28 * (2 * 1024 + 2 * 128) + 1024
    assert matrices + norms + shape.embedding_parameters == shape.parameters
    assert shape.has_gated_mlp


# Of one block of Llama 3 8B: q and o, k and v (8 of 32 heads), gate and up, down. The trainer's tests have the same.
_LLAMA_LINEAR = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
_LLAMA_OUTPUTS = 2 * 4096 + 2 * 1024 + 2 * 14336 + 4096
_BLOOM_LINEAR = (4096 + 12288) + (4096 + 4096) + 2 * (4096 + 16384)


@pytest.mark.parametrize(
    ("model", "lora", "expected"),
    [
        pytest.param("llama", {"targetModules": ["q_proj", "v_proj"]}, 6_815_744, id="Llama 3 8B, q and v"),
        pytest.param("bloom", {"rank": 8, "targetModules": ["query_key_value"]}, 3_932_160, id="BLOOMZ-7B1, fused"),
        pytest.param("llama", {"targetModules": ["all-linear"]}, 32 * 16 * _LLAMA_LINEAR, id="Llama 3 8B, all-linear"),
        pytest.param("bloom", {"targetModules": ["all-linear"]}, 30 * 16 * _BLOOM_LINEAR, id="BLOOMZ-7B1, all-linear"),
        pytest.param(
            "llama",
            {"targetModules": ["all-linear"], "variant": "dora"},
            32 * (16 * _LLAMA_LINEAR + _LLAMA_OUTPUTS),
            id="Llama 3 8B, DoRA: a magnitude for each output more",
        ),
        pytest.param(
            "llama",
            {"targetModules": ["q_proj", "v_proj"], "modulesToSave": ["lm_head", "embed_tokens", "norm"]},
            6_815_744 + 2 * 128256 * 4096 + 4096,
            id="Llama 3 8B, saved modules whole",
        ),
        pytest.param(
            "llama", {"targetModules": ["model.layers.3.mlp.up_proj"]}, 16 * (4096 + 14336), id="one layer by its name"
        ),
        pytest.param("llama", {"targetModules": ["lm_head"]}, 16 * (4096 + 128256), id="the output layer"),
    ],
)
def test_trainable_parameters_are_those_that_the_trainer_counts(
    model: str, lora: dict[str, Any], expected: int
) -> None:
    spec = make_job(method={"lora": {"rank": 16, **lora}}).spec
    shape = {"llama": LLAMA_8B, "bloom": BUILT_IN_SHAPES["bigscience/bloomz-7b1"]}[model]
    assert trainable_parameters(spec, shape) == expected


@pytest.mark.parametrize(
    "name", ["meta-llama/meta-llama-3-8b", "bigscience/bloomz-7b1", "microsoft/phi-3-mini-4k-instruct"]
)
def test_the_linear_layers_of_a_family_are_its_parameters_without_embeddings_norms_and_biases(name: str) -> None:
    shape = BUILT_IN_SHAPES[name]
    matrices = shape.layers * sum(inputs * outputs for inputs, outputs in _block_layers(shape).values())
    rest = shape.parameters - shape.embedding_parameters - matrices
    assert 0 < rest < shape.parameters / 1000


def test_with_an_mlp_of_four_widths_it_is_the_papers_formula_and_what_the_adapter_keeps() -> None:
    shape = BUILT_IN_SHAPES["bigscience/bloomz-7b1"]
    spec = make_job(
        method={"lora": {"rank": 16, "targetModules": ["query_key_value"]}}, dataset={"maxLength": 1024}
    ).spec
    for t in (1, 2, 8):
        found = estimate_memory(spec, spread(tp=t, micro=3), shape)
        adapter = 2 * (4096 + 16)
        assert found.activations == pytest.approx(30 * 1024 * 3 * (4096 * (10 + 24 / t) + adapter))


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


TOKENS = 512
_DORA = {"lora": {"rank": 8, "targetModules": ["all-linear"], "variant": "dora"}}
_FEW = {"lora": {"rank": 8, "targetModules": ["q_proj", "v_proj"]}}


@pytest.mark.parametrize(
    ("method", "precision", "checkpointing"),
    [
        pytest.param(FULL, "bf16", False, id="full in bf16"),
        pytest.param(FULL, "fp32", False, id="full in fp32"),
        pytest.param(FULL, "bf16", True, id="full, computed again"),
        pytest.param(_FEW, "bf16", False, id="a few layers' adapters in bf16"),
        pytest.param(_FEW, "fp32", False, id="a few layers' adapters in fp32"),
        pytest.param(_DORA, "bf16", False, id="dora in bf16"),
    ],
)
def test_the_activations_are_what_autograd_keeps(method: dict[str, Any], precision: str, checkpointing: bool) -> None:
    """Per layer, as the difference between a model of 4 and one of 2 layers, so that embedding and logits cancel."""
    shape = ModelShape(256, 2, 8, 2, 704, 512, 1)
    gated = replace(shape, parameters=2 * shape.embedding_parameters + 4 * 256 * 704 * 4)
    training = {"precision": precision, "gradientCheckpointing": checkpointing}
    spec = make_job(method=method, dataset={"maxLength": TOKENS}, training=training).spec
    two = estimate_memory(spec, spread(), gated).activations
    if checkpointing:  # the one layer that is computed again cancels, too
        plain = make_job(method=method, dataset={"maxLength": TOKENS}, training={"precision": precision}).spec
        two -= estimate_memory(plain, spread(), gated).activations / 2
    kept = _kept_bytes(4, shape, spec) - _kept_bytes(2, shape, spec)
    assert gated.has_gated_mlp
    assert two == pytest.approx(kept, rel=TOLERANCE)


def _kept_bytes(layers: int, shape: ModelShape, spec: FineTuneJobSpec) -> int:
    """Bytes that autograd keeps for the backward pass of one row of TOKENS tokens, but weights and their copies."""
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
    bf16, lora = spec.training.precision == "bf16", spec.method.lora
    # As finetune_trainer.methods: a frozen base in the precision, what trains in float32.
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16 if bf16 and lora else torch.float32)
    if spec.training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora is not None:
        targets = "all-linear" if lora.target_modules == ("all-linear",) else list(lora.target_modules)
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=lora.rank,
                target_modules=targets,
                lora_dropout=lora.dropout,
                use_dora=lora.variant == "dora",
                task_type="CAUSAL_LM",
            ),
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        # Copies of weights are counted as weights, and DoRA's norms of them are gone with their layer's pass.
        is_weight = storage.data_ptr() in parameters or (tensor.dim() == 2 and TOKENS not in tensor.shape)
        if not is_weight:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # else its address could be another's a moment later
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model.train()(input_ids=torch.zeros((1, TOKENS), dtype=torch.long))
    return sum(kept.values())


@pytest.mark.parametrize("dp", [2, 8, 64])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_fsdp_divides_the_states_among_the_ranks_but_for_what_is_whole_while_it_computes(
    precision: str, dp: int
) -> None:
    """Llama 3 8B: 1,050,673,152 parameters of embeddings, and blocks of 218,112,128 with the last norm's share."""
    wide = 2 if precision == "bf16" else 4
    count, embeddings = 8_030_261_248, 1_050_673_152
    gathered = wide * (embeddings + 2 * (count - embeddings) / 32)
    full = make_job(method=FULL, training={"precision": precision}).spec
    found = estimate_memory(full, spread(dp=dp, strategy="fsdp"), LLAMA_8B)
    assert found.weights == pytest.approx(4 * count / dp + gathered)
    assert found.gradients == pytest.approx(4 * count / dp + (wide + 4) * embeddings)
    assert found.optimizer == pytest.approx(8 * count / dp)
    lora = make_job(method=LORA, training={"precision": precision}).spec
    found = estimate_memory(lora, spread(dp=dp, strategy="fsdp"), LLAMA_8B)
    assert found.weights == pytest.approx((wide * count + 4 * 6_815_744) / dp + gathered)
    assert (found.gradients, found.optimizer) == (4 * 6_815_744, pytest.approx(8 * 6_815_744 / dp))


def test_gradient_checkpointing_keeps_each_layers_input_and_one_layers_activations() -> None:
    spec = make_job(method=LORA, training={"precision": "bf16"}).spec
    saving = make_job(method=LORA, training={"precision": "bf16", "gradientCheckpointing": True}).spec
    whole = estimate_memory(spec, spread(), LLAMA_8B).activations
    inputs = 2 * LLAMA_8B.layers * LLAMA_8B.hidden_size * spec.dataset.max_length
    assert estimate_memory(saving, spread(), LLAMA_8B).activations == pytest.approx(inputs + whole / LLAMA_8B.layers)
