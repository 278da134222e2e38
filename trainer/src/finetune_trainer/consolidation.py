"""Turns a sharded checkpoint into an adapter in peft's layout or a whole model, and proves that nothing is missing.

stages/consolidate.py and consolidate_checkpoint.py call this, with a checkpoint of our own or of neuronx-distributed's
format. Who opened it has verified every shard; here each parameter is streamed from its shards into its file, and the
result is held against the base model's own tensors. No model library is imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from finetune_trainer.adapters import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    INPUT_EMBEDDINGS,
    OUTPUT_LAYERS,
    AdapterMatch,
    AdapterTarget,
    match_adapter,
)
from finetune_trainer.artifacts import ArtifactWriter
from finetune_trainer.checkpoints import read_checkpoint
from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.model_files import ModelFiles, group_by_size, shard_name
from finetune_trainer.safetensors_stream import (
    ITEM_BYTES,
    SafetensorsWriter,
    TensorInfo,
    TensorPlan,
    TensorReader,
    some_names,
)
from finetune_trainer.streamed_files import StreamedFile
from finetune_trainer.tensor_dtypes import FLOAT_DTYPES, encode, round_in_place, to_float32

_METADATA = {"format": "pt"}
"""Loaders ask a safetensors file for this before they read it."""
_BUFFERS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
"""Ends of the names of what older files hold beside parameters: masks and frequencies, which nobody trains."""


class StoredParameter(Protocol):
    """A whole tensor of a checkpoint, in whatever pieces it is stored."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def chunks(self) -> Iterator[bytearray]:
        """The tensor's bytes in C order, in pieces of bounded size."""


class TrainedParameters(Protocol):
    """A checkpoint of any format."""

    @property
    def path(self) -> Path: ...

    @property
    def step(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def parameters(self) -> Mapping[str, StoredParameter]:
        """The trained parameters by name, sorted: the model's own names, or peft's without the adapter's."""


@dataclass(frozen=True)
class Consolidated:
    """What was written: the adapter's targets in the base model, tensors, elements and bytes, weight files."""

    targets: tuple[AdapterTarget, ...]
    tensors: int
    parameters: int
    nbytes: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of the whole model under the base's own name: a parameter of the checkpoint, or the base's own bytes."""

    info: TensorInfo
    dtype: str
    parameter: StoredParameter | None

    @property
    def plan(self) -> TensorPlan:
        return TensorPlan(self.info.name, self.dtype, self.info.shape)


def prove_adapter(
    checkpoint: TrainedParameters, adapter_config: Mapping[str, Any], base: ModelFiles, model_config: Mapping[str, Any]
) -> AdapterMatch:
    """What the checkpoint's adapter changes in the base model, by names and shapes alone.

    Raises what match_adapter raises; CorruptArtifact too when the checkpoint holds no parameters.
    """
    return match_adapter(
        adapter_config,
        {name: tensor.shape for name, tensor in _parameters(checkpoint).items()},
        {name: tensor.shape for name, tensor in base.tensors.items()},
        model_config,
    )


def match_model(
    checkpoint: TrainedParameters, base: ModelFiles, model_config: Mapping[str, Any], dtype: str | None
) -> list[ModelTensor]:
    """Every tensor of the base's files with the checkpoint's parameter that replaces it, in the base's order.

    The checkpoint has the model's own names, tied weights once; the base's files may leave out the first component,
    have a tied output layer too, and hold buffers, which stay. Floats get the base's dtype, or `dtype`. CorruptArtifact
    lists parameters that the base lacks, base tensors that no parameter replaces, and shapes that differ.
    """
    found: dict[str, StoredParameter] = {}
    unknown = []
    for name, parameter in _parameters(checkpoint).items():
        at = next((candidate for candidate in (name, name.partition(".")[2]) if candidate in base.tensors), None)
        if at is None:
            unknown.append(name)
        elif base.tensors[at].shape != parameter.shape:
            raise CorruptArtifact(
                f"{checkpoint.path}: {name!r} has shape {list(parameter.shape)}, the base model's {at!r} has "
                f"{list(base.tensors[at].shape)}: it was trained on another model"
            )
        else:
            found[at] = parameter
    if unknown:
        raise CorruptArtifact(
            f"{checkpoint.path} has parameters that the base model's files lack: {some_names(unknown)}: it was trained "
            "on another model"
        )
    if model_config.get("tie_word_embeddings") is not False:
        _add_tied_output(found, base)
    missing = [name for name in base.tensors if name not in found and not _is_buffer(base.tensors[name])]
    if missing:
        raise CorruptArtifact(f"{checkpoint.path} lacks parameters of the base model: {some_names(missing)}")
    tensors = []
    for name, info in base.tensors.items():
        converted = dtype if dtype is not None and info.dtype in FLOAT_DTYPES else info.dtype
        parameter_of = found.get(name)
        if parameter_of is not None and {parameter_of.dtype, converted} - set(FLOAT_DTYPES):
            raise UserError(
                "UnsupportedDtype",
                f"{name!r} is {parameter_of.dtype} in the checkpoint and {converted} in the base model: only "
                f"{', '.join(FLOAT_DTYPES)} are written",
            )
        tensors.append(ModelTensor(info, converted, parameter_of))
    return tensors


def write_adapter(
    checkpoint: TrainedParameters,
    adapter_config: Mapping[str, Any],
    targets: Sequence[AdapterTarget],
    writer: ArtifactWriter,
) -> Consolidated:
    """Write adapter_model.safetensors and adapter_config.json into the artifact, one tensor after the other.

    The dtypes are the checkpoint's. Memory is a few chunks of one tensor.
    """
    parameters = checkpoint.parameters()
    plan = [TensorPlan(name, tensor.dtype, tensor.shape) for name, tensor in parameters.items()]
    with SafetensorsWriter(writer.folder / ADAPTER_WEIGHTS_NAME, plan, _METADATA, StreamedFile) as file:
        for name, tensor in parameters.items():
            file.write(name, tensor.chunks())
    writer.record(ADAPTER_WEIGHTS_NAME, file.size, file.sha256)
    # Whoever loads this wants answers, not gradients; peft reads the switch from here.
    config = {**adapter_config, "inference_mode": True}
    writer.write(ADAPTER_CONFIG_NAME, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return _consolidated(tuple(targets), plan, [ADAPTER_WEIGHTS_NAME])


def write_model(
    tensors: Sequence[ModelTensor], base: ModelFiles | None, max_shard_bytes: int, writer: ArtifactWriter
) -> Consolidated:
    """Write the weights of a whole model into the artifact, one tensor after the other, rounded once where they narrow.

    The base's shards are kept where each fits `max_shard_bytes`; without a base the tensors are all the checkpoint's.
    Memory is a few chunks. UserError when a value is not finite in the dtype that is written.
    """
    names = []
    for name, group in _shards(tensors, base, max_shard_bytes):
        plan = [tensor.plan for tensor in group]
        with SafetensorsWriter(writer.folder / name, plan, _METADATA, StreamedFile) as file:
            for tensor in group:
                file.write(tensor.info.name, _chunks(tensor, base))
        writer.record(name, file.size, file.sha256)
        names.append(name)
    return _consolidated((), [tensor.plan for tensor in tensors], names)


def open_trained(path: Path) -> TrainedParameters:
    """The checkpoint at `path`, of our own or of neuronx-distributed's format, with every tensor found and checked.

    Contents are taken for verified: by the manifest of the artifact that it is part of. Raises what read_checkpoint and
    open_neuron_checkpoint raise.
    """
    checkpoint = read_checkpoint(path, contents=False)
    if checkpoint.format is None:
        return checkpoint
    # Reading the vendor's files takes torch, which nothing else here does.
    from finetune_trainer.neuron_checkpoints import open_neuron_checkpoint

    return replace(open_neuron_checkpoint(path), step=checkpoint.step)


def own_tensors(checkpoint: TrainedParameters) -> list[ModelTensor]:
    """The checkpoint's parameters as the tensors of a model, under their own names and in their own dtypes."""
    return [
        ModelTensor(TensorInfo(name, parameter.dtype, parameter.shape, 0, 0), parameter.dtype, parameter)
        for name, parameter in _parameters(checkpoint).items()
    ]


def describe_targets(targets: tuple[AdapterTarget, ...]) -> dict[str, dict[str, Any]]:
    """The targets by base tensor as JSON for the manifest."""
    return {target.tensor: target.as_json() for target in targets}


def find_checkpoint(train_artifact: Path) -> Path:
    """Where a train artifact keeps its final checkpoint."""
    return train_artifact / "checkpoint"


def _parameters(checkpoint: TrainedParameters) -> Mapping[str, StoredParameter]:
    parameters = checkpoint.parameters()
    if not parameters:
        raise CorruptArtifact(f"{checkpoint.path} holds no trainable parameter: run train again")
    return parameters


def _add_tied_output(found: dict[str, StoredParameter], base: ModelFiles) -> None:
    """A stored output layer that the checkpoint lacks is the embedding, which the model has once: the same values."""
    embeddings = [name for name in found if name.split(".")[-2:-1] and name.split(".")[-2] in INPUT_EMBEDDINGS]
    for name in base.tensors:
        if name not in found and name.endswith(tuple(f"{layer}.weight" for layer in OUTPUT_LAYERS)):
            same = [at for at in embeddings if base.tensors[at].shape == base.tensors[name].shape]
            if len(same) == 1:
                found[name] = found[same[0]]


def _is_buffer(tensor: TensorInfo) -> bool:
    return tensor.dtype not in FLOAT_DTYPES or tensor.name.endswith(_BUFFERS)


def _shards(
    tensors: Sequence[ModelTensor], base: ModelFiles | None, max_shard_bytes: int
) -> list[tuple[str, list[ModelTensor]]]:
    if base is not None:
        by_name = {tensor.info.name: tensor for tensor in tensors}
        kept = [(shard.path.name, [by_name[name] for name in shard.tensors]) for shard in base.shards]
        if all(sum(tensor.plan.nbytes for tensor in group) <= max_shard_bytes for _, group in kept):
            return kept
    groups = group_by_size([tensor.plan.nbytes for tensor in tensors], max_shard_bytes)
    return [
        (shard_name(number, len(groups)), [tensors[at] for at in group]) for number, group in enumerate(groups, start=1)
    ]


def _chunks(tensor: ModelTensor, base: ModelFiles | None) -> Iterator[bytearray | memoryview]:
    if tensor.parameter is None:
        assert base is not None
        with TensorReader(base.shard_of[tensor.info.name].path) as reader:
            for chunk in reader.chunks(tensor.info):
                yield _converted(tensor, chunk, tensor.info.dtype)
        return
    for chunk in tensor.parameter.chunks():
        yield _converted(tensor, chunk, tensor.parameter.dtype)


def _converted(tensor: ModelTensor, chunk: bytearray, dtype: str) -> bytearray | memoryview:
    if dtype not in FLOAT_DTYPES:
        return chunk
    if dtype == tensor.dtype == "F32":
        values = np.frombuffer(chunk, dtype="<f4")
    else:
        values = to_float32(chunk, dtype, (len(chunk) // ITEM_BYTES[dtype],))
        if dtype != tensor.dtype:
            round_in_place(values, tensor.dtype)
    # The extremes are infinite, or no numbers, where any value is.
    if tensor.parameter is not None and len(values) and not np.isfinite((values.min(), values.max())).all():
        raise UserError(
            "WeightsNotFinite",
            f"{tensor.info.name!r} holds values that are infinite or no numbers in {tensor.dtype}: the training "
            "diverged (lower learningRate), or its values are too large for that dtype (merge.precision)",
        )
    return chunk if dtype == tensor.dtype else encode(values, tensor.dtype)


def _consolidated(targets: tuple[AdapterTarget, ...], plan: Sequence[TensorPlan], files: Sequence[str]) -> Consolidated:
    return Consolidated(
        targets=targets,
        tensors=len(plan),
        parameters=sum(math.prod(tensor.shape) for tensor in plan),
        nbytes=sum(tensor.nbytes for tensor in plan),
        files=tuple(files),
    )
