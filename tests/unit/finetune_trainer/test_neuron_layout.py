"""What an independent writer cuts over ranks comes back whole, whatever the model, the ranks and the layout."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from neuron_shards import ShardLayout, share_lora_a, whole_shapes, write_checkpoint

from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.neuron_checkpoints import open_neuron_checkpoint
from finetune_trainer.neuron_layout import (
    PlannedTensor,
    StageMetadata,
    TensorFacts,
    parse_metadata,
    plan_tensors,
    query_places,
    stored_key,
)
from finetune_trainer.neuron_tensors import NeuronTensor

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
SLOW = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def whole(tensor: NeuronTensor) -> torch.Tensor:
    data = bytearray(b"".join(tensor.chunks()))
    return torch.frombuffer(data, dtype=TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)


def assert_equal(found: dict[str, NeuronTensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert TORCH_DTYPES[found[name].dtype] == tensor.dtype, name
        assert torch.equal(whole(found[name]), tensor), name


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@st.composite
def head_counts(draw: st.DrawFn) -> tuple[int, int, int, int | None]:
    """Query heads, KV heads, ranks, and a number of copies of the KV heads, None for the vendor's own choice."""
    tp = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16, 32]))
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    multiplier = None
    copies = max(1, tp // kv_heads) if kv_heads < tp or kv_heads % tp else 1
    if draw(st.booleans()) and copies * kv_heads * 2 <= 32 and (kv_heads < tp or kv_heads % tp):
        multiplier = copies = copies * 2
    if (kv_heads * copies) % tp:
        # The vendor's choice leaves KV heads out here: it does not load such a model either.
        kv_heads, multiplier, copies = tp, None, 1
    heads = kv_heads * copies * draw(st.sampled_from([1, 2, 3]))
    return heads, kv_heads, tp, multiplier


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config.json of small sizes, and the arguments of a writer that it fits."""
    heads, kv_heads, tp, multiplier = draw(head_counts())
    layers = draw(st.integers(1, 4))
    config = {
        "model_type": draw(st.sampled_from(["llama", "qwen3"])),
        "hidden_size": draw(st.sampled_from([6, 8])),
        "intermediate_size": tp * draw(st.integers(1, 2)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([2, 3])),
        "num_hidden_layers": layers,
        "vocab_size": tp * draw(st.integers(1, 3)),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }
    writer = {
        "tp": tp,
        "pp": draw(st.integers(1, min(layers, 4 if tp <= 8 else 2))),
        # A file for each tensor takes a while to write.
        "xser": draw(st.booleans()) if tp <= 4 else False,
        "fuse_qkv": draw(st.booleans()),
        "kv_size_multiplier": multiplier,
        "stale": draw(st.booleans()),
    }
    return config, writer


@SLOW
@given(models(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 1000))
def test_a_full_model_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[dict[str, Any], dict[str, Any]],
    dtype: torch.dtype,
    seed: int,
) -> None:
    config, writer = case
    tensors = random_tensors(whole_shapes(config), seed, dtype)
    folder = tmp_path_factory.mktemp("case")
    write_checkpoint(folder, tensors, config, **writer)
    assert_equal(open_neuron_checkpoint(folder).parameters(), tensors)


@st.composite
def adapters(draw: st.DrawFn, grouped: bool, tied: bool) -> dict[str, Any]:
    """An adapter_config.json whose targets the vendor can train: fused layers all or none."""
    groups = [["q_proj", "k_proj", "v_proj"]] if grouped else [["q_proj"], ["k_proj"], ["v_proj"]]
    groups += [["o_proj"], ["gate_proj", "up_proj"], ["down_proj"], ["embed_tokens"]]
    if not tied:
        groups.append(["lm_head"])
    chosen = draw(st.lists(st.sampled_from(groups), min_size=1, unique_by=tuple))
    targets = [name for group in chosen for name in group]
    saved = ["lm_head"] if not tied and "lm_head" not in targets and draw(st.booleans()) else None
    return {"peft_type": "LORA", "r": draw(st.integers(1, 3)), "target_modules": targets, "modules_to_save": saved}


@SLOW
@given(st.data(), models(), st.integers(0, 1000), st.sampled_from(["default", "weight2"]))
def test_an_adapter_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    case: tuple[dict[str, Any], dict[str, Any]],
    seed: int,
    name: str,
) -> None:
    config, writer = case
    layout = ShardLayout(
        config, writer["tp"], fuse_qkv=writer["fuse_qkv"], kv_size_multiplier=writer["kv_size_multiplier"]
    )
    fused = layout.grouped or (writer["fuse_qkv"] and layout.heads == layout.kv_heads)
    adapter = data.draw(adapters(fused, config["tie_word_embeddings"]))
    tensors = random_tensors(whole_shapes(config, adapter), seed, torch.float32)
    tensors = share_lora_a(tensors, projections=("q_proj", "k_proj", "v_proj") if fused else ())
    folder = tmp_path_factory.mktemp("case")
    write_checkpoint(folder, tensors, config, adapter_config=adapter, adapter_name=name, **writer)
    checkpoint = open_neuron_checkpoint(folder)
    assert checkpoint.adapter == name
    assert_equal(checkpoint.parameters(), tensors)


@pytest.mark.parametrize("fuse_qkv", [False, True], ids=["q, k, v apart", "fused"])
@pytest.mark.parametrize(("kv_heads", "tp"), [(4, 4), (2, 4), (4, 2)], ids=lambda size: str(size))
def test_a_model_as_release_0_1_wrote_it_comes_back(tmp_path: Path, kv_heads: int, tp: int, fuse_qkv: bool) -> None:
    config = small_config(num_key_value_heads=kv_heads)
    tensors = random_tensors(whole_shapes(config), 1, torch.float32)
    grouped = kv_heads < tp
    write_checkpoint(tmp_path, tensors, config, tp=tp, fuse_qkv=fuse_qkv and grouped, old=True, xser=False)
    assert (tmp_path / "shards" / "mp_metadata_pp_rank_0.pt").is_file()
    assert_equal(open_neuron_checkpoint(tmp_path).parameters(), tensors)


def test_an_adapter_as_release_0_1_wrote_it_comes_back(tmp_path: Path) -> None:
    config = small_config()
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}
    tensors = random_tensors(whole_shapes(config, adapter), 1, torch.float32)
    write_checkpoint(tmp_path, tensors, config, tp=4, adapter_config=adapter, old=True, xser=False)
    assert (tmp_path / "adapter_shards" / "model").is_dir()
    assert_equal(open_neuron_checkpoint(tmp_path).parameters(), tensors)
    assert_equal(open_neuron_checkpoint(tmp_path / "adapter_shards").parameters(), tensors)


def small_config(**changes: Any) -> dict[str, Any]:
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 2,
        "num_hidden_layers": 2,
        "vocab_size": 12,
    }
    return config | changes


def test_the_query_heads_of_llama_3_on_32_ranks_lie_as_the_vendor_lays_them() -> None:
    places = query_places(heads=32, kv_heads=8, copies=4, tp=32)
    by_rank = sorted(range(32), key=lambda head: places[head])
    assert by_rank == [kv * 4 + copy for copy in range(4) for kv in range(8)]
    assert by_rank[:9] == [0, 4, 8, 12, 16, 20, 24, 28, 1]


@given(head_counts())
def test_each_place_of_the_ranks_has_one_query_head(counts: tuple[int, int, int, int | None]) -> None:
    heads, kv_heads, tp, multiplier = counts
    copies = multiplier or (max(1, tp // kv_heads) if kv_heads < tp or kv_heads % tp else 1)
    places = query_places(heads, kv_heads, copies, tp)
    assert sorted(places) == [(rank, number) for rank in range(tp) for number in range(heads // tp)]


LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 32, "vocab_size": 128256,
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "tp", "pp", "parameters"),
    [(LLAMA_8B, 8, 1, 8_030_261_248), (LLAMA_8B, 32, 1, 8_030_261_248), (LLAMA_70B, 32, 4, 70_553_706_496)],
    ids=["8B, tp=8", "8B, tp=32", "70B, tp=32, pp=4"],
)
def test_a_large_model_is_planned_from_headers_alone(config: dict[str, Any], tp: int, pp: int, parameters: int) -> None:
    layout = ShardLayout(config, tp, pp)
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in whole_shapes(config).items()
    }
    held = {}
    for pp_rank in range(pp):
        local = layout.local_tensors(tensors, 0, pp_rank)
        facts = {key: TensorFacts("BF16", tuple(tensor.shape)) for key, tensor in local.items()}
        held |= {(pp_rank, tp_rank): facts for tp_rank in range(tp)}
    started = time.process_time()
    plans = plan_tensors([parsed(layout.metadata(pp_rank)) for pp_rank in range(pp)], held)
    assert time.process_time() - started < 5
    assert {name: plan.shape for name, plan in plans.items()} == whole_shapes(config)
    assert sum(plan.nbytes for plan in plans.values()) == 2 * parameters
    for plan in plans.values():
        assert covered(plan) == plan.shape[plan.axis]


def covered(plan: PlannedTensor) -> int:
    """Indices of the dimension that the pieces are put together along; no two pieces share one."""
    spans = sorted((piece.tp_rank, piece.key, piece.start, piece.start + piece.length) for piece in plan.pieces)
    for one, following in itertools.pairwise(spans):
        assert one[:2] != following[:2] or one[3] <= following[2]
    return sum(stop - start for _, _, start, stop in spans)


def parsed(value: Any, adapter: str | None = None) -> StageMetadata:
    return parse_metadata(json.loads(json.dumps(value)), "mp_metadata_pp_rank_0.json", adapter=adapter)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a.q_proj.lora_A.default.weight", "a.q_proj.lora_A.weight"),
        ("a.qkv_proj.lora_B.default.weight_q", "a.qkv_proj.lora_B.weight_q"),
        ("a.embed_tokens.lora_embedding_A.default", "a.embed_tokens.lora_embedding_A"),
        ("a.q_proj.lora_A.other.weight", None),
        ("a.lm_head.modules_to_save.default.weight", "a.lm_head.weight"),
        ("a.lm_head.original_module.weight", None),
        ("a.q_proj.base_layer.weight", "a.q_proj.base_layer.weight"),
    ],
)
def test_files_leave_the_adapters_name_out(name: str, key: str | None) -> None:
    assert stored_key(name, "default") == key


def plan_of(metadata: dict[str, Any], config: dict[str, Any], tp: int = 4) -> dict[str, PlannedTensor]:
    layout = ShardLayout(config, tp)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in whole_shapes(config).items()}
    facts = {key: TensorFacts("F32", tuple(value.shape)) for key, value in layout.local_tensors(tensors, 0).items()}
    return plan_tensors([parsed(metadata)], {(0, tp_rank): facts for tp_rank in range(tp)})


def without_module(metadata: dict[str, Any]) -> None:
    metadata["parameters"] = {name: entry for name, entry in metadata["parameters"].items() if ".layers.1." not in name}


def with_another_rule(metadata: dict[str, Any]) -> None:
    metadata["model_weight_transformation_specs"][0]["specs"] = [["MysterySpec", {"tp_size": 4}]]


def with_rows_fused(metadata: dict[str, Any]) -> None:
    metadata["model_weight_transformation_specs"][1]["specs"][0][1]["fuse_axis"] = 1


def with_other_sizes(metadata: dict[str, Any]) -> None:
    metadata["model_weight_transformation_specs"][1]["specs"][0][1]["original_dims"] = [12, 16]


def with_uneven_heads(metadata: dict[str, Any]) -> None:
    metadata["model_weight_transformation_specs"][0]["specs"][0][1]["num_attention_heads"] = 7


def with_two_sizes(metadata: dict[str, Any]) -> None:
    metadata["parameters"]["model.embed_tokens.weight"]["num_partitions"] = 2


def with_no_axis(metadata: dict[str, Any]) -> None:
    metadata["parameters"]["model.embed_tokens.weight"]["partition_dim"] = 2


def with_one_more(metadata: dict[str, Any]) -> None:
    metadata["parameters"]["model.layers.0.extra.weight"] = {"tensor_model_parallel": False}


def with_one_less(metadata: dict[str, Any]) -> None:
    del metadata["parameters"]["model.norm.weight"]


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (without_module, CorruptArtifact, "no pipeline rank has parameters of model.layers.1"),
        (with_another_rule, UserError, "has the rule 'MysterySpec'"),
        (with_rows_fused, UserError, "fuses layers along dimension 1"),
        (with_other_sizes, CorruptArtifact, r"expected 3 \+ 4 rows of 4 ranks"),
        (with_uneven_heads, CorruptArtifact, "does not come out even"),
        (with_two_sizes, CorruptArtifact, "contradicts itself"),
        (with_no_axis, CorruptArtifact, "is cut along dimension 2"),
        (with_one_more, CorruptArtifact, "promises model.layers.0.extra.weight, which its shards do not hold"),
        (with_one_less, CorruptArtifact, "does not know model.norm.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_metadata_that_does_not_fit_is_named(spoil: Any, error: type[Exception], words: str) -> None:
    config = small_config(num_key_value_heads=2)
    metadata = ShardLayout(config, 4).metadata(0)
    assert plan_of(metadata, config).keys() == whole_shapes(config).keys()
    spoil(metadata)
    with pytest.raises(error, match=words):
        plan_of(metadata, config)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(
    JSON
    | st.fixed_dictionaries({"parameters": JSON, "model_weight_transformation_specs": JSON})
    | st.fixed_dictionaries({"sharded_metadata": JSON, "gqa_qkv_metadata": JSON})
)
def test_any_json_is_metadata_or_a_named_damage(value: Any) -> None:
    try:
        parse_metadata(value, "here.json", adapter=None)
    except (CorruptArtifact, UserError) as error:
        assert "here.json" in error.message  # noqa: PT017
