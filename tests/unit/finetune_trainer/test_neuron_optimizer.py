"""Moments and masters out of the optimizer's files: the vendor's own, and every data parallel size of our writer's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from neuron_shards import ShardLayout, share_lora_a, whole_shapes, write_checkpoint
from safetensors.torch import load_file

from finetune_trainer.errors import CorruptArtifact
from finetune_trainer.neuron_checkpoints import open_neuron_checkpoint
from finetune_trainer.neuron_optimizer import MASTER, OptimizerState, open_optimizer
from finetune_trainer.neuron_tensors import NeuronTensor

FIXTURE = Path(__file__).resolve().parents[2] / "fixtures" / "neuron" / "full-zero1-tp2-dp2"
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


def whole(tensor: NeuronTensor) -> torch.Tensor:
    data = bytearray(b"".join(tensor.chunks()))
    return torch.frombuffer(data, dtype=TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)


def test_the_vendors_masters_are_the_weights_before_rounding() -> None:
    # Its norms went apart, which test_neuron_checkpoints.py looks at; each rank's are bf16 of its own masters.
    checkpoint = open_neuron_checkpoint(FIXTURE / "checkpoint", first_copies=True)
    names = json.loads((FIXTURE / "expected" / "optimizer_param_names.json").read_text())
    state = open_optimizer(checkpoint, [names])
    masters = {name: whole(tensor) for name, tensor in state.tensors(MASTER).items()}
    expected = load_file(FIXTURE / "expected" / "master_fp32.safetensors")
    parameters = checkpoint.parameters()
    assert masters.keys() == expected.keys() == parameters.keys()
    for name, master in masters.items():
        assert torch.equal(master, expected[name]), name
        assert torch.equal(master.bfloat16(), whole(parameters[name])), name
    assert state.dp_size == 2
    assert state.kinds == ("exp_avg", "exp_avg_sq", "master")
    assert set(state.steps.values()) == {8.0}
    assert {name: tensor.shape for name, tensor in state.tensors("exp_avg_sq").items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }


CONFIG = {
    "model_type": "llama", "hidden_size": 5, "intermediate_size": 12, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 3, "num_hidden_layers": 2, "vocab_size": 12,
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA",
    "r": 3,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def random_state(adapter: dict[str, Any] | None) -> dict[str, dict[str, torch.Tensor]]:
    shapes = whole_shapes(CONFIG, adapter)
    generator = torch.Generator().manual_seed(3)
    return {
        kind: share_lora_a({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
        for kind in ("exp_avg", "exp_avg_sq", "master")
    }


def write(folder: Path, adapter: dict[str, Any] | None, **layout: Any) -> tuple[OptimizerState, dict[str, Any]]:
    kinds = random_state(adapter)
    tensors = {name: master.bfloat16() for name, master in kinds["master"].items()}
    if not layout.get("zero1", True):
        del kinds["master"]
    write_checkpoint(folder, tensors, CONFIG, adapter_config=adapter, optimizer=kinds, optimizer_step=5, **layout)
    cut = ShardLayout(CONFIG, layout["tp"], layout.get("pp", 1), adapter_config=adapter)
    names = [cut.optimizer_names(tensors, pp_rank) for pp_rank in range(layout.get("pp", 1))]
    return open_optimizer(open_neuron_checkpoint(folder), names), kinds


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["full", "lora"])
@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 4, "dp": 3, "xser": False},
        {"tp": 2, "dp": 2, "pp": 2, "xser": True},
        {"tp": 1, "dp": 4, "xser": True},
        {"tp": 4, "dp": 2, "xser": False, "zero1": False},
    ],
    ids=lambda layout: ",".join(f"{name}={value}" for name, value in layout.items()),
)
def test_the_state_comes_back_from_every_layout(
    tmp_path: Path, adapter: dict[str, Any] | None, layout: dict[str, Any]
) -> None:
    state, kinds = write(tmp_path, adapter, **layout)
    assert set(state.kinds) == kinds.keys()
    assert set(state.steps.values()) == {5.0}
    for kind, expected in kinds.items():
        found = state.tensors(kind)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(whole(found[name]), tensor), (kind, name)


def test_a_rank_gets_what_it_trains_whatever_the_data_parallel_size_was(tmp_path: Path) -> None:
    states = [write(tmp_path / str(dp), ADAPTER, tp=4, dp=dp, xser=False)[0] for dp in (1, 3)]
    for tp_rank in range(4):
        one, three = (state.local("exp_avg", tp_rank, 0) for state in states)
        assert list(one) == list(three)
        for key, tensor in one.items():
            assert torch.equal(tensor, three[key]), key
    assert states[1].dp_size == 3


def shorter(names: list[str]) -> list[str]:
    return names[:-1]


def renamed(names: list[str]) -> list[str]:
    return [*names[:-1], "model.layers.9.mlp.down_proj.weight"]


def exchanged(names: list[str]) -> list[str]:
    return [names[-1], *names[1:-1], names[0]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shorter, "has the state of 19 parameters, and there are names of 18"),
        (renamed, "does not know the optimizer's model.layers.9.mlp.down_proj.weight"),
        (exchanged, "the names are in another order"),
    ],
    ids=["one name too few", "a name of another model", "names in another order"],
)
def test_names_that_are_not_this_trainings_are_refused(change: Any, words: str) -> None:
    checkpoint = open_neuron_checkpoint(FIXTURE / "checkpoint")
    names = json.loads((FIXTURE / "expected" / "optimizer_param_names.json").read_text())
    with pytest.raises(CorruptArtifact, match=words):
        open_optimizer(checkpoint, [change(names)])


@pytest.mark.parametrize("dp_rank", [0, 2], ids=["the first", "the last"])
def test_a_missing_data_parallel_rank_is_named(tmp_path: Path, dp_rank: int) -> None:
    write(tmp_path, None, tp=2, dp=3, xser=False)
    for tp_rank in range(2):
        (tmp_path / "shards" / "optim" / f"dp_rank_{dp_rank:02d}_tp_rank_{tp_rank:02d}_pp_rank_00.pt").unlink()
    checkpoint = open_neuron_checkpoint(tmp_path)
    names = ShardLayout(CONFIG, 2).optimizer_names(random_state(None)["master"], 0)
    with pytest.raises(CorruptArtifact, match=r"lacks dp_rank_00|data parallel rank are missing"):
        open_optimizer(checkpoint, [names])
