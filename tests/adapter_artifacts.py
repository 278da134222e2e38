"""Artifacts that the stages after training read, made without our own writers where those are under test.

`write_checkpoint` is an independent writer of the sharded checkpoint format, through the safetensors library: the
oracle for consolidation. `random_adapter` is peft's own adapter with B not zero, so that it changes the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune_trainer.artifacts import artifact_ref, new_artifact
from finetune_trainer.contract import ArtifactRef, StageConfig

Cut = Callable[[str, int, int], list[int]]
"""(tensor's name, rows, world size) -> world size + 1 row numbers at which it is cut."""


def even_cut(_name: str, rows: int, world_size: int) -> list[int]:
    """Equal shares; rank 0 alone has what is smaller than the world."""
    if rows < world_size:
        return [0, *[rows] * world_size]
    return [rank * rows // world_size for rank in range(world_size + 1)]


def write_checkpoint(
    folder: Path,
    parameters: Mapping[str, torch.Tensor],
    world_size: int,
    *,
    step: int = 3,
    cut: Cut = even_cut,
    change: Callable[[int, dict[str, Any], dict[str, torch.Tensor]], None] | None = None,
) -> Path:
    """A checkpoint of `parameters` with optimizer moments; `change` may spoil a rank's layout and tensors."""
    moments = {"param": parameters}
    moments["exp_avg"] = {name: torch.full_like(value, 0.5) for name, value in parameters.items()}
    with new_artifact(folder, "checkpoint") as writer:
        for rank in range(world_size):
            tensors, layout = {}, {}
            for kind, named in moments.items():
                for name, value in named.items():
                    rows = cut(name, value.shape[0], world_size)
                    if rows[rank] == rows[rank + 1]:
                        continue
                    tensors[f"{kind}/{name}"] = value[rows[rank] : rows[rank + 1]].clone()
                    offset = [rows[rank], *[0] * (value.dim() - 1)]
                    layout[f"{kind}/{name}"] = {
                        "name": name,
                        "kind": kind,
                        "shape": list(value.shape),
                        "offset": offset,
                    }
            header = {"version": 1, "rank": rank, "worldSize": world_size, "step": step, "tensors": layout}
            if change is not None:
                change(rank, header, tensors)
            file = writer.folder / f"rank-{rank:05d}.safetensors"
            save_file(tensors, file, metadata={"finetune": json.dumps(header)})
        state = {
            "version": 1,
            "step": step,
            "worldSize": world_size,
            "parameters": {name: {"shape": list(value.shape), "dtype": "F32"} for name, value in parameters.items()},
        }
        (writer.folder / "state.json").write_text(json.dumps(state))
    return folder


def random_adapter(model: Path, folder: Path, *, seed: int = 1, **lora: Any) -> Path:
    """An adapter folder written by peft for the model in `model`, with all that it trains random or moved at random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **lora}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and not any(part in name for part in (".lora_A.", ".lora_B.", ".lora_emb")):
                    parameter += 0.1 * torch.randn_like(parameter) * (parameter.std() if parameter.std() > 0 else 1.0)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def copy_artifact(source: Path, path: Path, kind: str) -> Path:
    """The files of `source` as an artifact at `path`."""
    with new_artifact(path, kind) as writer:
        shutil.copytree(source, writer.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md"))
    return path


def stage_config(
    workspace: Path, stage: str, spec: Mapping[str, Any], inputs: Sequence[Path], names: Sequence[str]
) -> StageConfig:
    """stage.json for a stage that writes to `workspace`/out/<stage> and reads the artifacts `inputs`."""
    refs: dict[str, ArtifactRef] = {
        name: artifact_ref(workspace, path) for name, path in zip(names, inputs, strict=True)
    }
    return StageConfig(stage, "image", spec, f"out/{stage}", inputs=refs, workspace=str(workspace))
