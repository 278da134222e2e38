"""The Neuron backend against stand-ins for the vendor's entry points: what is called when, with what, what is refused.

tests/fake_neuron.py has the stand-ins. Each test of a trap says in its name what goes wrong without the backend's way.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_neuron
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from train_runs import write_prepared

from finetune_trainer import contract, training
from finetune_trainer.backends import IGNORED, MicroBatch, ModelPlan, Placement, neuron_config, open_backend
from finetune_trainer.backends.neuron import NeuronBackend
from finetune_trainer.backends.neuron_checkpointing import rounds_to
from finetune_trainer.backends.neuron_model import (
    additive_mask,
    count_copies,
    draw_a,
    is_partial,
    norm_counting_copies_once,
    pad_batches,
    parameter_facts,
    reduce_input_gradient,
    shifted_labels,
    start_adapter,
)
from finetune_trainer.batches import PreparedRows, open_rows
from finetune_trainer.checkpoints import NEURON_FORMAT, find_last_checkpoint, read_checkpoint
from finetune_trainer.errors import CorruptArtifact, RetryableError, UserError
from finetune_trainer.progress import Progress, ProgressPoster
from finetune_trainer.stages import train_agent
from finetune_trainer.training import TrainingPlan

STEPS = 6
GLOBAL_BATCH = 4
FULL = {"type": "full", "quantization": "none"}
PLAN = TrainingPlan(
    total_steps=STEPS,
    global_batch_size=GLOBAL_BATCH,
    micro_batch_size=2,
    learning_rate=0.01,
    schedule="cosine",
    warmup_steps=0,
    max_gradient_norm=0.5,
    seed=3,
    precision="bf16",
    checkpoint_every_steps=3,
    keep_checkpoints=5,
    log_every_steps=2,
    identity={"data": "d"},
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> fake_neuron.Calls:
    return fake_neuron.install(monkeypatch)


@pytest.fixture
def make_backend(calls: fake_neuron.Calls, tmp_path: Path) -> Iterator[Callable[..., NeuronBackend]]:
    fake_neuron.write_config(tmp_path / "model")

    def make(**changes: Any) -> NeuronBackend:
        if dist.is_initialized():
            dist.destroy_process_group()
        backend = open_backend(Placement("neuron", instance_type="ml.trn1.2xlarge"))
        assert isinstance(backend, NeuronBackend)
        backend.start()
        plan = ModelPlan(
            folder=tmp_path / "model",
            method=FULL,
            precision="bf16",
            weight_decay=0.1,
            seed=3,
            keep_masks=False,
            row_length=24,
            micro_batch_size=2,
            micro_steps=2,
            max_gradient_norm=0.5,
        )
        backend.build(replace(plan, **changes))
        return backend

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def rows(tmp_path: Path) -> PreparedRows:
    return open_rows(write_prepared(tmp_path / "prepared", steps=STEPS, global_batch_size=GLOBAL_BATCH), GLOBAL_BATCH)


def run(backend: NeuronBackend, rows: PreparedRows, work: Path, plan: TrainingPlan = PLAN, **options: Any) -> None:
    start = training.resume(backend, plan, work / training.CHECKPOINTS_FOLDER)
    progress = Progress(ProgressPoster({}), plan.total_steps)
    training.train(backend, plan, rows, work, start, progress, should_stop=lambda: False, **options)


def weights(backend: NeuronBackend) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in backend._trained.values()]


# ---- the order of things


def test_the_vendor_is_told_its_sizes_before_there_is_a_process_group_or_it_makes_its_groups_twice(
    make_backend: Callable[..., NeuronBackend], calls: fake_neuron.Calls
) -> None:
    make_backend()
    assert calls.names()[:3] == ["check_vendor", "neuronx_distributed_config", "initialize_model_parallel"]
    (config,) = calls.of("neuronx_distributed_config")
    assert not config["is_grouped"]
    assert config["optimizer_config"]["zero_one_enabled"]
    assert config["mixed_precision_config"] == {
        "use_master_weights": True,
        "use_fp32_grad_acc": True,
        "use_master_weights_in_ckpt": True,
    }


@pytest.mark.parametrize(("asked", "given"), [(0.5, 0.5), (0.0, math.inf)])
def test_the_bound_of_the_norm_goes_to_zero_1_itself_or_it_clips_at_1(
    make_backend: Callable[..., NeuronBackend], calls: fake_neuron.Calls, asked: float, given: float
) -> None:
    make_backend(max_gradient_norm=asked)
    (made,) = calls.of("initialize_parallel_optimizer")
    assert made["max_norm"] == given
    assert made["kind"] is torch.optim.AdamW


def test_one_mark_step_a_micro_step_and_one_for_the_optimizer_and_no_number_is_read_between_log_lines(
    make_backend: Callable[..., NeuronBackend], calls: fake_neuron.Calls, rows: PreparedRows, tmp_path: Path
) -> None:
    backend = make_backend()
    read, reads = backend.read, []

    def watched(numbers: Any) -> Any:
        reads.append(len(numbers))
        return read(numbers)

    backend.read = watched  # type: ignore[method-assign]
    calls.made.clear()
    run(backend, rows, tmp_path / "work", replace(PLAN, checkpoint_every_steps=100))
    assert calls.names().count("forward") == 2 * STEPS
    assert calls.names().count("mark_step") == 3 * STEPS
    assert reads == [1, 1, 2, 2]  # after steps 1, 2, 4 and 6
    assert {arguments["reduction"] for arguments in calls.of("forward")} == {"sum"}
    assert {arguments["shape"] for arguments in calls.of("forward")} == {(2, 24)}  # one shape, one program


def test_a_loss_that_is_no_number_is_told_with_its_own_step_when_it_is_read_and_nothing_is_kept(
    make_backend: Callable[..., NeuronBackend], rows: PreparedRows, tmp_path: Path
) -> None:
    backend = make_backend()
    update, steps = backend.update, []

    def spoilt(rate: float, bound: float) -> torch.Tensor:
        steps.append(rate)
        norm = update(rate, bound)
        if len(steps) == 3:
            next(iter(backend._trained.values())).data.fill_(math.nan)
        return norm

    backend.update = spoilt  # type: ignore[method-assign]
    plan = replace(PLAN, log_every_steps=100, checkpoint_every_steps=5)
    with pytest.raises(UserError, match=r"LossNotFinite: step 4 of 6: loss nan"):
        run(backend, rows, tmp_path / "work", plan)
    assert len(steps) == 5  # heard of when the checkpoint of step 5 was due
    assert not list((tmp_path / "work").glob("checkpoints/step-*"))


# ---- checkpoints


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    make_backend: Callable[..., NeuronBackend], rows: PreparedRows, tmp_path: Path
) -> None:
    whole = make_backend()
    run(whole, rows, tmp_path / "whole")
    first = make_backend()
    run(first, rows, tmp_path / "parts")
    for path in (tmp_path / "parts" / "checkpoints").glob("step-00000006"):
        for file in path.rglob("*.pt"):
            file.write_bytes(file.read_bytes()[:-1])  # the newest one is damaged, and the one of step 3 is taken
    resumed = make_backend()
    run(resumed, rows, tmp_path / "parts")
    assert all(map(torch.equal, weights(whole), weights(resumed)))
    names = ("training.jsonl",)
    assert [(tmp_path / "whole" / name).read_bytes() for name in names] == [
        (tmp_path / "parts" / name).read_bytes() for name in names
    ]


def test_a_checkpoint_goes_into_a_new_folder_and_is_finished_before_our_manifest(
    make_backend: Callable[..., NeuronBackend], calls: fake_neuron.Calls, rows: PreparedRows, tmp_path: Path
) -> None:
    backend = make_backend()
    run(backend, rows, tmp_path / "work")
    saves = calls.of("save_checkpoint")
    assert len(saves) == 2
    for save in saves:
        assert not save["existed"]
        assert ".tmp-" in str(save["folder"])  # published by renaming
        assert not save["async_save"]
        assert save["use_xser"]
        assert "scheduler" not in save
    order = [name for name in calls.names() if name in ("save_checkpoint", "finalize_checkpoint")]
    assert order == ["save_checkpoint", "finalize_checkpoint"] * 2
    checkpoint, damaged = find_last_checkpoint(tmp_path / "work" / "checkpoints")
    assert checkpoint is not None
    assert damaged == []
    assert checkpoint.format == NEURON_FORMAT
    assert checkpoint.state["layout"] == {
        "tensorParallelSize": 1,
        "pipelineParallelSize": 1,
        "dataParallelSize": 1,
    }
    assert checkpoint.state["optimizerNames"] == {"0": ["embed", "head", "norm"]}  # decaying first, as the optimizer's
    assert (checkpoint.path / "config.json").exists()
    content = torch.load(checkpoint.path / "shards" / "user_content.pt", weights_only=True)
    assert content["step"] == STEPS
    assert len(content["randomStates"]) == 1
    backend.stop()
    assert calls.names()[-1] == "finalize_checkpoint"


def test_weights_are_loaded_before_the_optimizer_or_its_masters_are_those_of_the_start(
    make_backend: Callable[..., NeuronBackend], calls: fake_neuron.Calls, rows: PreparedRows, tmp_path: Path
) -> None:
    run(make_backend(), rows, tmp_path / "work")
    backend = make_backend()
    calls.made.clear()
    training.resume(backend, PLAN, tmp_path / "work" / "checkpoints")
    assert calls.of("load_checkpoint") == [{"model": True, "optimizer": False}, {"model": False, "optimizer": True}]


def test_a_flipped_bit_is_found_before_anything_is_loaded(
    make_backend: Callable[..., NeuronBackend], calls: fake_neuron.Calls, rows: PreparedRows, tmp_path: Path
) -> None:
    run(make_backend(), rows, tmp_path / "work")
    backend = make_backend()
    folder = tmp_path / "work" / "checkpoints" / "step-00000006"
    checkpoint = read_checkpoint(folder)
    path = folder / "shards" / "model" / "dp_rank_00_tp_rank_00_pp_rank_00.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = weights(backend)
    calls.made.clear()
    with pytest.raises(CorruptArtifact, match=r"rank 0: .*model/dp_rank_00_tp_rank_00_pp_rank_00.pt has sha256"):
        backend.load(checkpoint)
    assert calls.of("load_checkpoint") == []
    assert all(map(torch.equal, before, weights(backend)))


def test_masters_that_are_not_the_weights_are_refused(
    make_backend: Callable[..., NeuronBackend], rows: PreparedRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_backend(), rows, tmp_path / "work")
    backend = make_backend()
    load = fake_neuron.FakeZero.load_state_dict

    def spoilt(zero: fake_neuron.FakeZero, state: dict[str, Any]) -> None:
        load(zero, state)
        next(iter(zero._pairs()))[1].data.add_(1.0)

    monkeypatch.setattr(fake_neuron.FakeZero, "load_state_dict", spoilt)
    with pytest.raises(RetryableError, match="the optimizer's float32 copy of 'embed' is not its weight"):
        training.resume(backend, PLAN, tmp_path / "work" / "checkpoints")


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("layout", {"dataParallelSize": 2}, "parallelism.dataParallelSize: the job has 1, the checkpoint 2"),
        ("format", "another", "has format 'another', this trainer reads 'neuronx-distributed'"),
        ("optimizerNames", {"0": ["head", "embed", "norm"]}, "its optimizer files number other parameters"),
    ],
)
def test_a_checkpoint_of_another_split_is_refused_with_both_values(
    make_backend: Callable[..., NeuronBackend],
    rows: PreparedRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    field: str,
    value: Any,
    told: str,
) -> None:
    run(make_backend(), rows, tmp_path / "work")
    backend = make_backend()
    root = tmp_path / "work" / "checkpoints"
    checkpoint = read_checkpoint(root / "step-00000006")
    state = {**checkpoint.state, field: {**checkpoint.state[field], **value} if isinstance(value, dict) else value}
    changed = replace(checkpoint, state=state)
    monkeypatch.setattr(training, "read_checkpoint", lambda *_arguments, **_options: changed)
    if field == "format":
        with pytest.raises(UserError, match='format: the job has "neuronx-distributed", the checkpoint "another"'):
            training.resume(backend, PLAN, root)
        return
    with pytest.raises(UserError, match=told):
        training.resume(backend, PLAN, root)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda state: state.update(format="another"), "has format 'another', this trainer reads"),
        (lambda state: state["layout"].update(dataParallelSize=2), r"do not make worldSize 1"),
        (lambda state: state.update(layout={"tensorParallelSize": 1}), "has no layout with"),
        (lambda state: (state["layout"].update(tensorParallelSize=2), state.update(worldSize=2)), "written by 2 ranks"),
    ],
)
def test_a_checkpoint_that_is_not_all_of_its_layout_is_damaged(
    make_backend: Callable[..., NeuronBackend],
    rows: PreparedRows,
    tmp_path: Path,
    damage: Callable[[dict[str, Any]], None],
    told: str,
) -> None:
    run(make_backend(), rows, tmp_path / "work")
    path = tmp_path / "work" / "checkpoints" / "step-00000006"
    state = json.loads((path / "state.json").read_bytes())
    damage(state)
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_bytes())
    for entry in manifest["files"]:
        if entry["path"] == "state.json":
            entry["size"] = (path / "state.json").stat().st_size
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptArtifact, match=told):
        read_checkpoint(path, contents=False)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8), st.randoms())
def test_a_weight_is_its_master_rounded_to_either_side_where_the_device_rounds_at_random(
    values: list[float], random: Any
) -> None:
    master = torch.tensor(values, dtype=torch.float32).clamp(-1e38, 1e38)
    bits = master.view(torch.int32)
    up = torch.tensor([random.randint(0, 1) for _ in values], dtype=torch.int32)
    exact = (bits & 0xFFFF) == 0
    upper = torch.div(bits, 1 << 16, rounding_mode="floor") + torch.where(exact, torch.zeros_like(up), up)
    weight = (upper << 16).view(torch.float32).to(torch.bfloat16)
    assert rounds_to(master, weight, at_random=True)
    assert rounds_to(master, master.to(torch.bfloat16))
    far = ((upper + 2) << 16).view(torch.float32).to(torch.bfloat16)
    assert not rounds_to(master, far, at_random=True)


# ---- held-out loss and packing


def test_held_out_loss_is_measured_without_dropout_and_does_not_change_training(
    make_backend: Callable[..., NeuronBackend], calls: fake_neuron.Calls, rows: PreparedRows, tmp_path: Path
) -> None:
    plain = make_backend()
    run(plain, rows, tmp_path / "plain")
    measured = make_backend()
    calls.made.clear()
    run(measured, rows, tmp_path / "measured", replace(PLAN, evaluate_every_steps=4), held_out=rows)
    assert all(map(torch.equal, weights(plain), weights(measured)))
    passes = [arguments["training"] for arguments in calls.of("forward")]
    assert passes.count(False) == 2 * len(rows.input_ids) // 2  # at steps 4 and 6, two rows a pass
    lines = [json.loads(line) for line in (tmp_path / "measured" / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validationLoss" in line] == [4, 6]


@pytest.mark.parametrize(
    ("length", "packing", "is_refused"), [(24, "bestFit", False), (4096, "bestFit", True), (4096, "wrapped", False)]
)
def test_documents_of_a_row_are_kept_apart_refused_or_declared_to_see_each_other(
    make_backend: Callable[..., NeuronBackend],
    calls: fake_neuron.Calls,
    capsys: pytest.CaptureFixture[str],
    length: int,
    packing: str,
    is_refused: bool,
) -> None:
    if is_refused:
        with pytest.raises(UserError, match="PackingNotSupported: dataset.packing is bestFit, rows have 4096 tokens"):
            make_backend(keep_masks=True, row_length=length, packing=packing)
        return
    backend = make_backend(keep_masks=True, row_length=length, packing=packing)
    assert backend.keeps_documents_apart == (length == 24)
    (loaded,) = calls.of("from_pretrained")
    assert loaded["attn_implementation"] == ("eager" if length == 24 else "flash_attention_2")
    assert loaded["trn_config"].recompute_causal_mask == (length != 24)
    assert ("packing is wrapped" in capsys.readouterr().out) == (length != 24)


def test_a_document_attends_to_itself_only_and_padding_to_padding() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 0]])
    mask = additive_mask(segments, torch.bfloat16)
    assert mask.dtype == torch.bfloat16
    assert mask.shape == (1, 1, 5, 5)
    seen = (mask[0, 0] == 0).int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert torch.isfinite(mask).all()


def test_labels_are_the_targets_after_the_vendors_own_shift() -> None:
    targets = np.array([[5, IGNORED, 7, IGNORED]], dtype=np.int32)
    zeros = np.zeros_like(targets)
    labels = shifted_labels(MicroBatch(zeros, targets, zeros, zeros))
    assert labels.tolist() == [[IGNORED, 5, IGNORED, 7]]
    assert labels[:, 1:].tolist() == targets[:, :-1].tolist()


def test_a_pipeline_takes_whole_groups_and_what_fills_the_last_one_has_no_target() -> None:
    ones = np.ones((1, 2), dtype=np.int32)
    groups = list(pad_batches([MicroBatch(ones, ones, ones, ones)] * 3, 2))
    assert [len(group) for group in groups] == [2, 2]
    assert (groups[1][1].targets == IGNORED).all()


# ---- what is computed beside the vendor's code


def test_replicated_k_and_v_are_counted_once_in_the_norm() -> None:
    plain, copied = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    shards = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    shards[0].grad, shards[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    zero = SimpleNamespace(
        param_groups=[{"params": [plain, copied]}],
        base_optimizer=SimpleNamespace(param_groups=[{"params": shards}]),
        sharding_groups=[[0, 1]],
    )
    asked = []

    def vendors(parameters: list[Any], **options: Any) -> torch.Tensor:
        asked.append(options)
        return torch.stack([p.grad.norm() for p in parameters]).norm().reshape(1)

    found, norm = norm_counting_copies_once(zero, {id(copied): 2}, vendors)
    assert found == shards
    assert float(norm) == pytest.approx(math.sqrt(9 + 16 / 2))
    assert asked == [{"norm_type": 2.0, "zero1_optimizer": True, "zero1_optimizer_groups": [[0, 1]]}] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_summed_input_gradient_of_a_column_parallel_layer_is_not_lost_where_it_is_summed_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Work:
        def wait(self) -> None:
            asked[-1].add_(1.0)  # what the other rank has

    def all_reduce(tensor: torch.Tensor, *, group: Any, async_op: bool) -> Work:
        assert (group, async_op) == ("tensor parallel", True)
        asked.append(tensor)
        return Work()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    context = SimpleNamespace(async_grad_allreduce=True, reduce_dtype=torch.float32, process_group="tensor parallel")
    gradient = torch.full((2, 2), 2.0, dtype=dtype)
    work = reduce_input_gradient(context, gradient, dtype)
    assert asked[0].dtype == torch.float32
    work.wait()
    assert gradient.tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert gradient.dtype == dtype
    context.async_grad_allreduce = False
    assert reduce_input_gradient(context, gradient, dtype) is None
    assert len(asked) == 1


def test_the_backend_puts_its_sum_of_input_gradients_in_the_vendors_place(
    make_backend: Callable[..., NeuronBackend],
) -> None:
    make_backend()
    layers = sys.modules["neuronx_distributed.parallel_layers"].layers
    assert layers._linear_autograd_bwd_grad_reduce is reduce_input_gradient


def test_norms_of_query_and_key_have_their_own_heads_gradient_only() -> None:
    assert is_partial("model.layers.0.self_attn.q_norm.weight")
    assert is_partial("model.layers.0.self_attn.k_norm.weight")
    assert not is_partial("model.norm.weight")


def test_copies_are_those_of_the_layers_own_k_and_v() -> None:
    layer = torch.nn.Module()
    layer.kv_size_multiplier = 2  # type: ignore[assignment]
    for name in ("weight_q", "weight_k", "weight_v"):
        layer.register_parameter(name, torch.nn.Parameter(torch.zeros(4, 2)))
    attention = torch.nn.Module()
    attention.kv_size_multiplier = 2  # type: ignore[assignment]
    attention.qkv_proj = layer
    assert count_copies(attention) == {"qkv_proj.weight_k": 2, "qkv_proj.weight_v": 2}
    parameter = layer.weight_k
    parameter.tensor_model_parallel, parameter.partition_dim = True, 0  # type: ignore[union-attr]
    facts = parameter_facts({"qkv_proj.weight_k": parameter}, {"qkv_proj.weight_k": 2}, 4)  # type: ignore[dict-item]
    assert facts["qkv_proj.weight_k"].shape == (8, 2)


class Block(torch.nn.Module):
    """A row parallel output projection and a column parallel layer with an adapter, as one rank has them."""

    def __init__(self, inputs: int, tp_size: int, specs: Any) -> None:
        super().__init__()
        self.attention = torch.nn.Module()
        self.attention.specs = specs
        self.attention.o_proj = self._layer(3, inputs // tp_size, cut=tp_size > 1)
        self.up_proj = self._layer(3, inputs, cut=False)

    @staticmethod
    def _layer(rank: int, inputs: int, *, cut: bool) -> torch.nn.Module:
        layer, adapter = torch.nn.Module(), torch.nn.Module()
        adapter.weight = torch.nn.Parameter(torch.zeros(rank, inputs))
        adapter.weight.tensor_model_parallel = cut  # type: ignore[assignment]
        layer.lora_A = torch.nn.ModuleDict({"default": adapter})
        return layer


GroupedSpec = type(
    "GQAQKVColumnParallelLinearSpec",
    (),
    {"num_attention_heads": 8, "num_key_value_heads": 2, "kv_size_multiplier": 2, "output_projection_name": "o_proj"},
)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), tp_size=st.sampled_from([1, 2, 4]), is_grouped=st.booleans())
def test_an_adapter_starts_from_the_same_numbers_however_it_is_split(seed: int, tp_size: int, is_grouped: bool) -> None:
    def heads(size: int, rank: int, count: int, _kv_heads: int, _copies: int) -> list[int]:
        return [(rank + head * size) % count for head in range(count // size)]  # dealt out in turn

    inputs = 32
    parts = []
    for rank in range(tp_size):
        block = Block(inputs, tp_size, [GroupedSpec()] if is_grouped and tp_size > 1 else [])
        start_adapter(block, seed, rank, tp_size, heads)
        parts.append(block)
    whole = Block(inputs, 1, [])
    start_adapter(whole, seed, 0, 1, heads)
    expected = whole.attention.o_proj.lora_A["default"].weight
    found = torch.cat([part.attention.o_proj.lora_A["default"].weight for part in parts], dim=1)
    if is_grouped and tp_size > 1:
        order = [head for rank in range(tp_size) for head in heads(tp_size, rank, 8, 2, 2)]
        columns = [head * 4 + column for head in order for column in range(4)]
        expected = expected[:, columns]
    assert torch.equal(found, expected)
    for part in parts:
        assert torch.equal(part.up_proj.lora_A["default"].weight, whole.up_proj.lora_A["default"].weight)
    assert float(expected.detach().abs().max()) <= 1 / math.sqrt(inputs)  # the whole layer's inputs, not the rank's


def test_the_start_of_a_differs_by_name_and_seed() -> None:
    assert torch.equal(draw_a(1, "a", 2, 8), draw_a(1, "a", 2, 8))
    assert not torch.equal(draw_a(1, "a", 2, 8), draw_a(1, "b", 2, 8))
    assert not torch.equal(draw_a(1, "a", 2, 8), draw_a(2, "a", 2, 8))


# ---- the installed version


def test_an_argument_that_the_installed_version_lacks_is_named_with_the_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("neuronx_distributed.fake")

    def save(directory: str, tag: str, **_others: Any) -> None:
        del directory, tag

    module.save = save  # type: ignore[attr-defined]
    monkeypatch.setattr(neuron_config.importlib, "import_module", lambda _name: module)
    monkeypatch.setattr(neuron_config.importlib.metadata, "version", lambda _name: "0.16.1")
    monkeypatch.setattr(neuron_config, "VENDOR_ARGUMENTS", {"neuronx_distributed.fake:save": ("tag", "use_xser")})
    with pytest.raises(
        UserError,
        match=r"NeuronStackMismatch: neuronx-distributed 0.16.1 has no argument use_xser of neuronx_distributed.fake",
    ):
        neuron_config.check_vendor()
    monkeypatch.setattr(neuron_config, "VENDOR_ARGUMENTS", {"neuronx_distributed.fake:load": ("tag",)})
    with pytest.raises(UserError, match=r"0.16.1 has no neuronx_distributed.fake.load"):
        neuron_config.check_vendor()


# ---- the ranks' processes


@pytest.mark.parametrize("is_neuron", [True, False])
def test_on_trainium_a_rank_is_a_new_interpreter_and_its_agent_imports_nothing_that_looks_for_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_neuron: bool
) -> None:
    spec = {"accelerator": {"type": "neuron", "instanceType": "ml.trn1.2xlarge"}} if is_neuron else {}
    config = contract.StageConfig(stage=contract.TRAIN, image="trainer:test", spec=spec, output="o", inputs={})
    (tmp_path / "stage.json").write_bytes(contract.canonical_json(config.as_json()))
    started: list[Any] = []
    imported: list[str] = []
    monkeypatch.setattr(train_agent, "launch_agent", lambda _launch, entry, own: started.append((entry, own)))
    monkeypatch.setattr(train_agent.importlib, "import_module", imported.append)
    sizes = ["--nodes", "1", "--procs-per-node", "2", "--node-rank", "0", "--join-seconds", "5"]
    files = ["--config", str(tmp_path / "stage.json"), "--scratch", str(tmp_path)]
    names = ["--endpoint", "localhost:0", "--run-id", "r", "--trace-steps", "3"]
    monkeypatch.setattr(sys, "argv", ["train_agent", *sizes, *files, *names])
    assert train_agent.main() == 0
    ((entry, own),) = started
    if is_neuron:
        assert (entry, own[:2]) == (sys.executable, ["-m", "finetune_trainer.stages.train_worker"])
        assert imported == []
    else:
        assert callable(entry)
        assert "peft" in imported
    assert own[-6:] == [*files, "--trace-steps", "3"]
