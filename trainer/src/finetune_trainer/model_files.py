"""Where a model folder of the hub's layout keeps its tensors: one model.safetensors, or shards with an index.

Consolidation proves an adapter against these headers, merging walks them in order. Only headers are read here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.json_files import is_plain_path, read_json_file
from finetune_trainer.safetensors_stream import Header, TensorInfo, read_header, some_names

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"

_QUANTIZED_SUFFIXES = (
    ".SCB", ".weight_format", ".absmax", ".quant_map", ".qweight", ".qzeros", ".weight_scale",
    ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4",
)  # fmt: skip
"""Ends of the names of tensors that only quantised weights have: bitsandbytes, GPTQ, AWQ, compressed-tensors."""
_WEIGHT_SUFFIXES = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf", ".onnx", ".tflite"
)  # fmt: skip
_NOT_THE_MODEL = frozenset({"README.md"})
"""A base's model card describes the base; a tuned model gets its own."""


@dataclass(frozen=True)
class ModelFiles:
    """The shards of a model in the order of their names, and every tensor by name with its shard."""

    folder: Path
    shards: tuple[Header, ...]
    tensors: Mapping[str, TensorInfo]
    shard_of: Mapping[str, Header]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_model_files(folder: Path) -> ModelFiles:
    """The headers of the model in `folder`.

    UserError when it has no safetensors weights; CorruptArtifact when a shard is missing or damaged, when a tensor is
    in two shards, or when the index and the shards do not say the same.
    """
    index_path = folder / INDEX_NAME
    # Where both are there transformers takes the single file: what was trained must be what is merged.
    if (folder / SINGLE_NAME).is_file():
        weight_map = None
        names = [SINGLE_NAME]
    elif index_path.is_file():
        weight_map = read_weight_map(index_path)
        names = sorted(set(weight_map.values()))
    else:
        raise UserError(
            "NoSafetensors",
            f"{folder} has neither {INDEX_NAME} nor {SINGLE_NAME}: convert the model to safetensors first, "
            "other weight formats can run code when they are read",
        )
    shards = tuple(read_header(folder / name) for name in names)
    tensors: dict[str, TensorInfo] = {}
    shard_of: dict[str, Header] = {}
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if name in shard_of:
                raise CorruptArtifact(f"{folder}: {name!r} is in {shard_of[name].path.name} and in {shard.path.name}")
            tensors[name] = tensor
            shard_of[name] = shard
    if weight_map is not None:
        _check_index(index_path, weight_map, shard_of)
    return ModelFiles(folder, shards, tensors, shard_of)


def read_model_config(folder: Path) -> Mapping[str, Any]:
    """config.json of the model; CorruptArtifact when it is missing or no JSON object."""
    return read_json_object(folder / CONFIG_NAME, "a model folder needs it beside its weights")


def check_unquantized(folder: Path, tensors: Iterable[str] = ()) -> None:
    """UserError when config.json, or the names of the tensors, say that the weights in `folder` are quantised."""
    names = [name for name in tensors if name.endswith(_QUANTIZED_SUFFIXES)]
    settings = read_model_config(folder).get("quantization_config")
    if settings or names:
        kind = settings.get("quant_method") if isinstance(settings, Mapping) else settings
        found = f"it has {some_names(names, limit=2)}" if names else f"quantization_config of config.json says {kind}"
        raise UserError(
            "QuantizedBaseModel",
            f"{folder.name} holds quantised weights ({found}), and nothing trained can be added to rounded weights: "
            "name the model that they were made from; method.quantization int8 or nf4 trains on it in as little "
            "memory, and an adapter that was trained so fits it",
        )


def shard_name(number: int, count: int) -> str:
    """The file name of shard `number`, from 1, of `count`."""
    return SINGLE_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def group_by_size(sizes: Sequence[int], limit: int) -> list[range]:
    """Runs of numbers whose sizes, in order, fit `limit` together; a larger one is alone."""
    groups = []
    begin = total = 0
    for number, size in enumerate(sizes):
        if number > begin and total + size > limit:
            groups.append(range(begin, number))
            begin, total = number, 0
        total += size
    return [*groups, range(begin, len(sizes))]


def read_json_object(path: Path, why: str) -> dict[str, Any]:
    """The JSON object in `path`; CorruptArtifact when it is none. `why` says what a missing file is needed for."""
    try:
        value = read_json_file(path)
    except FileNotFoundError:
        raise CorruptArtifact(f"{path} is missing: {why}") from None
    if not isinstance(value, dict):
        raise CorruptArtifact(f"{path} is no JSON object")
    return value


def is_companion_file(name: str) -> bool:
    """True for what belongs beside a model's weights: configuration, tokenizer, code, licence. No subfolders."""
    return not (name.startswith(".") or "/" in name or name in _NOT_THE_MODEL or name.endswith(_WEIGHT_SUFFIXES))


def read_weight_map(path: Path) -> Mapping[str, str]:
    """The index at `path`: the file that holds each tensor, all of them beside the index. CorruptArtifact else."""
    weight_map = read_json_object(path, "it says which file holds which tensor").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptArtifact(f"{path}: its weight_map is no object with entries")
    for tensor, file in weight_map.items():
        # An index comes from outside: a name with a folder in it could point anywhere.
        if not is_plain_path(file) or "/" in file or not file.endswith(".safetensors"):
            raise CorruptArtifact(f"{path}: {tensor!r} is said to be in {file!r}, expected a *.safetensors beside it")
    return weight_map


def _check_index(path: Path, weight_map: Mapping[str, str], shard_of: Mapping[str, Header]) -> None:
    missing = [name for name in weight_map if name not in shard_of]
    if missing:
        raise CorruptArtifact(f"{path} lists {some_names(missing)}, which no shard holds: download the model again")
    unknown = [name for name in shard_of if name not in weight_map]
    if unknown:
        raise CorruptArtifact(f"{path} does not list {some_names(unknown)}, which the shards hold")
    for name, file in weight_map.items():
        if shard_of[name].path.name != file:
            raise CorruptArtifact(f"{path} says {name!r} is in {file}, it is in {shard_of[name].path.name}")
