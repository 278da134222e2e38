"""Consolidation of checkpoints that an independent writer cut, against peft itself; every damage is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune_trainer.artifacts import new_artifact, read_manifest, verify_artifact
from finetune_trainer.checkpoints import read_checkpoint
from finetune_trainer.consolidation import write_adapter
from finetune_trainer.contract import ExitCode, StageConfig
from finetune_trainer.errors import CorruptArtifact
from finetune_trainer.stages import consolidate

TOKENS = torch.arange(3, 67).reshape(2, 32)


@st.composite
def sharded(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], int, dict[str, list[int]]]:
    """Random tensors, a world size, and for each tensor the rows at which it is cut; some ranks may get nothing."""
    world_size = draw(st.integers(1, 5))
    tensors, cuts = {}, {}
    for number in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        name = f"base_model.model.layer.{number}.lora_A.weight"
        tensors[name] = torch.randn(shape).to(dtype)
        inner = sorted(draw(st.lists(st.integers(0, shape[0]), min_size=world_size - 1, max_size=world_size - 1)))
        cuts[name] = [0, *inner, shape[0]]
    return tensors, world_size, cuts


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sharded())
def test_what_was_cut_anyhow_comes_back_whole(
    tmp_path_factory: pytest.TempPathFactory,
    adapter_artifacts: ModuleType,
    case: tuple[dict[str, torch.Tensor], int, dict[str, list[int]]],
) -> None:
    tensors, world_size, cuts = case
    folder = tmp_path_factory.mktemp("case")
    adapter_artifacts.write_checkpoint(folder / "checkpoint", tensors, world_size, cut=lambda name, *_: cuts[name])
    with new_artifact(folder / "out", "consolidate") as writer:
        result = write_adapter(read_checkpoint(folder / "checkpoint"), {"r": 1}, [], writer)
    loaded = load_file(folder / "out" / "adapter_model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert result.parameters == sum(tensor.numel() for tensor in tensors.values())


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path, adapter_artifacts: ModuleType) -> Path:
    return adapter_artifacts.random_adapter(tiny_model, tmp_path / "adapter")


@pytest.fixture
def make_config(
    workspace: Path, tiny_model: Path, adapter: Path, tmp_path: Path, adapter_artifacts: ModuleType
) -> Callable[..., StageConfig]:
    """stage.json over a train artifact with the adapter cut for `world_size` ranks.

    `change` is write_checkpoint's, `spoil` edits the artifact's folder before it is complete, `damage` after.
    """
    model = adapter_artifacts.copy_artifact(tiny_model, workspace / "model", "model")

    def make(
        world_size: int = 2,
        spoil: Callable[[Path], None] | None = None,
        change: Callable[[int, dict[str, Any], dict[str, torch.Tensor]], None] | None = None,
        damage: Callable[[Path], None] | None = None,
    ) -> StageConfig:
        parameters = load_file(adapter / "adapter_model.safetensors")
        folder = tmp_path / "train"
        adapter_artifacts.write_checkpoint(folder / "checkpoint", parameters, world_size, change=change)
        shutil.copy(adapter / "adapter_config.json", folder)
        if spoil is not None:
            spoil(folder)
        train = adapter_artifacts.copy_artifact(folder, workspace / "train", "train")
        config = adapter_artifacts.stage_config(
            workspace, "consolidate", {"method": {"type": "lora"}}, [model, train], ["model", "train"]
        )
        if damage is not None:
            damage(train)
        return config

    return make


@pytest.mark.parametrize("world_size", [1, 2, 3, 4], ids=lambda size: f"dp={size}")
def test_plain_peft_loads_the_adapter_and_computes_the_same(
    make_config: Callable[..., StageConfig], tiny_model: Path, adapter: Path, world_size: int
) -> None:
    config = make_config(world_size)
    report = consolidate.run(config)

    assert report.exit_code == ExitCode.SUCCESS
    assert report.metrics == {
        "step": 3,
        "shards": world_size,
        "tensors": 8,
        "targets": 4,
        "parameters": 2 * 4 * ((32 + 32) + (32 + 16)),
        "bytes": 4 * report.metrics["parameters"],
    }
    manifest = verify_artifact(config.output_path, report.artifacts["consolidate"].digest)
    assert manifest.metadata["targets"]["model.layers.1.self_attn.v_proj.weight"] == {
        "module": "model.layers.1.self_attn.v_proj",
        "kind": "lora",
        "rank": 4,
        "scale": 2.0,
    }

    def logits(folder: Path) -> torch.Tensor:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(folder)).eval()
        with torch.no_grad():
            return model(TOKENS).logits

    assert torch.equal(logits(config.output_path), logits(adapter))
    assert consolidate.run(config) == report


def test_the_number_of_ranks_does_not_change_a_byte(
    make_config: Callable[..., StageConfig], workspace: Path, tmp_path: Path
) -> None:
    digests = set()
    for world_size in (1, 3):
        config = make_config(world_size)
        consolidate.run(config)
        digests.add(read_manifest(config.output_path).files[1].sha256)
        for path in (workspace / "train", workspace / "out", tmp_path / "train"):
            shutil.rmtree(path)
    assert len(digests) == 1


def shard(folder: Path, rank: int = 1) -> Path:
    return folder / "checkpoint" / f"rank-{rank:05d}.safetensors"


def remove_shard(train: Path) -> None:
    shard(train).unlink()


def truncate_shard(train: Path) -> None:
    data = shard(train).read_bytes()
    shard(train).write_bytes(data[: len(data) // 2])


def flip_a_bit(train: Path) -> None:
    data = bytearray(shard(train).read_bytes())
    data[-1] ^= 1
    shard(train).write_bytes(data)


def add_foreign_shard(train: Path) -> None:
    shutil.copy(shard(train), shard(train, 2))


def swap_shards(train: Path) -> None:
    first, second = shard(train, 0).read_bytes(), shard(train, 1).read_bytes()
    shard(train, 0).write_bytes(second)
    shard(train, 1).write_bytes(first)


def drop_manifest(train: Path) -> None:
    (train / "checkpoint" / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(remove_shard, r"rank-00001\.safetensors is missing, expected \d+ bytes: ", id="a missing shard"),
        pytest.param(truncate_shard, r"rank-00001\.safetensors has \d+ bytes, expected \d+: ", id="a truncated shard"),
        pytest.param(flip_a_bit, r"rank-00001\.safetensors has sha256 .*, expected .*: ", id="a flipped bit"),
        pytest.param(add_foreign_shard, r"rank-00002\.safetensors is not in the manifest: ", id="a foreign shard"),
        pytest.param(swap_shards, r"rank-0000\d\.safetensors has .*, expected .*: ", id="shards that changed places"),
        pytest.param(drop_manifest, r"checkpoint/manifest\.json is missing", id="a checkpoint without its manifest"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_file_expected_found_and_remedy(
    make_config: Callable[..., StageConfig], damage: Callable[[Path], None], words: str
) -> None:
    config = make_config(2, damage=damage)
    with pytest.raises(CorruptArtifact, match=words) as caught:
        consolidate.run(config)
    assert "run" in caught.value.message
    assert not config.output_path.exists()


def drop_tensor(rank: int, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    if rank == 1:
        key = sorted(tensors)[-1]
        del tensors[key], header["tensors"][key]


def double_rows(rank: int, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    if rank == 1:
        header["tensors"][sorted(tensors)[-1]]["offset"][0] -= 1


def unknown_tensor(rank: int, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    if rank == 1:
        tensors["param/extra"] = torch.zeros(2, 2)
        header["tensors"]["param/extra"] = {"name": "extra", "kind": "param", "shape": [2, 2], "offset": [0, 0]}


def other_step(rank: int, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    header["step"] += rank


def other_world(rank: int, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    header["worldSize"] += rank


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            drop_tensor, r"param '.*v_proj\.lora_B\.weight' has 8 rows in all its shards, expected 16", id="gap"
        ),
        pytest.param(double_rows, r"row 7 of param .* is there twice", id="overlap"),
        pytest.param(unknown_tensor, "param of extra is foreign", id="a tensor that was not trained"),
        pytest.param(other_step, r"rank-00001\.safetensors says .* belongs to another checkpoint", id="another step"),
        pytest.param(other_world, r"rank-00001\.safetensors says .* belongs to another", id="another world size"),
    ],
)
def test_shards_that_do_not_add_up_are_refused(
    make_config: Callable[..., StageConfig],
    change: Callable[[int, dict[str, Any], dict[str, torch.Tensor]], None],
    words: str,
) -> None:
    with pytest.raises(CorruptArtifact, match=words):
        consolidate.run(make_config(2, change=change))


def other_rank(train: Path) -> None:
    path = train / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 8}))


def no_config(train: Path) -> None:
    (train / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(other_rank, "do not fit rank 8", id="a config of another rank"),
        pytest.param(no_config, "adapter_config.json is missing", id="no config"),
    ],
)
def test_an_adapter_that_does_not_fit_its_config_is_refused(
    make_config: Callable[..., StageConfig], spoil: Callable[[Path], None], words: str
) -> None:
    with pytest.raises(CorruptArtifact, match=words):
        consolidate.run(make_config(2, spoil))


def test_an_adapter_of_another_base_model_is_refused(
    make_config: Callable[..., StageConfig], tmp_path: Path, workspace: Path, adapter_artifacts: ModuleType
) -> None:
    config = make_config()
    other = tmp_path / "other"
    other.mkdir()
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}, other / "model.safetensors")
    (other / "config.json").write_text("{}")
    model = adapter_artifacts.copy_artifact(other, workspace / "other", "model")
    config = adapter_artifacts.stage_config(
        workspace, "consolidate", {}, [model, workspace / "train"], ["model", "train"]
    )
    with pytest.raises(CorruptArtifact, match="do not fit rank 4 and the base's"):
        consolidate.run(config)


def test_consolidating_and_merging_import_no_model_library() -> None:
    code = (
        "import sys; import finetune_trainer.stages.consolidate, finetune_trainer.stages.merge; "
        "print(sorted({'torch', 'transformers', 'peft', 'safetensors'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
