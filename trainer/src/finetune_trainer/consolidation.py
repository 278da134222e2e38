"""Turns a sharded checkpoint into one adapter in peft's file layout, and proves that nothing is missing.

stages/consolidate.py calls this. read_checkpoint has verified every shard before; here each parameter is streamed from
its slices into one file, and the result is held against the base model's own tensors. No model library is imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.adapters import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    AdapterMatch,
    AdapterTarget,
    match_adapter,
)
from finetune_trainer.artifacts import ArtifactWriter
from finetune_trainer.checkpoints import Checkpoint
from finetune_trainer.errors import CorruptArtifact
from finetune_trainer.model_files import ModelFiles
from finetune_trainer.safetensors_stream import SafetensorsWriter, TensorPlan

_METADATA = {"format": "pt"}
"""Loaders ask a safetensors file for this before they read it."""


@dataclass(frozen=True)
class Consolidated:
    """What was written: the adapter's targets in the base model, tensors, elements and bytes of its file."""

    targets: tuple[AdapterTarget, ...]
    tensors: int
    parameters: int
    nbytes: int


def prove_adapter(
    checkpoint: Checkpoint, adapter_config: Mapping[str, Any], base: ModelFiles, model_config: Mapping[str, Any]
) -> AdapterMatch:
    """What the checkpoint's adapter changes in the base model, by names and shapes alone.

    Raises what match_adapter raises; CorruptArtifact too when the checkpoint holds no parameters.
    """
    parameters = checkpoint.parameters()
    if not parameters:
        raise CorruptArtifact(f"{checkpoint.path} holds no trainable parameter: run train again")
    return match_adapter(
        adapter_config,
        {name: tensor.shape for name, tensor in parameters.items()},
        {name: tensor.shape for name, tensor in base.tensors.items()},
        model_config,
    )


def write_adapter(
    checkpoint: Checkpoint, adapter_config: Mapping[str, Any], targets: Sequence[AdapterTarget], writer: ArtifactWriter
) -> Consolidated:
    """Write adapter_model.safetensors and adapter_config.json into the artifact, one tensor after the other.

    The dtypes are the checkpoint's. Memory is one chunk of one tensor.
    """
    parameters = checkpoint.parameters()
    plan = [TensorPlan(name, tensor.dtype, tensor.shape) for name, tensor in parameters.items()]
    with SafetensorsWriter(writer.folder / ADAPTER_WEIGHTS_NAME, plan, _METADATA) as file:
        for name, tensor in parameters.items():
            file.write(name, tensor.chunks())
    writer.record(ADAPTER_WEIGHTS_NAME, file.size, file.sha256)
    # Whoever loads this wants answers, not gradients; peft reads the switch from here.
    config = {**adapter_config, "inference_mode": True}
    writer.write(ADAPTER_CONFIG_NAME, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return Consolidated(
        targets=tuple(targets),
        tensors=len(plan),
        parameters=sum(math.prod(tensor.shape) for tensor in plan),
        nbytes=sum(tensor.nbytes for tensor in plan),
    )


def describe_targets(targets: tuple[AdapterTarget, ...]) -> dict[str, dict[str, Any]]:
    """The targets by base tensor as JSON for the manifest."""
    return {target.tensor: target.as_json() for target in targets}


def find_checkpoint(train_artifact: Path) -> Path:
    """Where a train artifact keeps its final checkpoint."""
    return train_artifact / "checkpoint"
