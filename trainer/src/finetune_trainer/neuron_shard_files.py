"""The files of neuronx-distributed's ranks: which there are, that nothing in them can run, and the tensors in them.

neuron_checkpoints.py and neuron_optimizer.py call this. Files are read with weights_only, and the only class that is
allowed beside torch's own is a stand-in for the reference to a tensor with a file of its own: the vendor calls that
format xser, `X.pt` with references, `X.pt.info.pt` with types and shapes, `X.pt.tensors/tensor_<number>.pt`. Files are
mapped and not loaded, and give back what was read of them, so nothing of a model's size is resident.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import re
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.json_files import is_count
from finetune_trainer.neuron_layout import TensorFacts
from finetune_trainer.safetensors_stream import some_names

_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.float32: "F32", torch.int64: "I64", torch.float64: "F64",
}  # fmt: skip
_SHARD = re.compile(r"dp_rank_(?P<dp>\d{2,4})_tp_rank_(?P<tp>\d{2,4})_pp_rank_(?P<pp>\d{2,4})\.pt")
_TENSOR = re.compile(r"tensor_(?P<number>\d{1,9})\.pt")
_INFO, _TENSORS = ".info.pt", ".tensors"
_REFERENCE = "torch_xla.utils.serialization.TensorReference"
_UNSAFE = re.compile(r"(unsupported (global|class)|trying to call reduce|can only (build|create)).*", re.IGNORECASE)
"""What torch says of a pickle that names classes or functions which weights_only does not let through."""

Rank = tuple[int, int, int]
"""(data, tensor, pipeline parallel rank), as in a file's name."""


class TensorReference:
    """Stands for torch_xla's class of that name: tensor `tid` has a file of its own."""

    tid: int


@dataclass(frozen=True)
class ShardFile:
    """One rank's file of tensors by name: types and shapes, and the tensors, mapped, or their own files' numbers."""

    path: Path
    facts: Mapping[str, TensorFacts]
    mapped: Mapping[str, torch.Tensor]
    numbers: Mapping[str, int]

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor `key`, mapped. CorruptArtifact when its own file is damaged or another tensor's."""
        if key in self.numbers:
            return read_referred(self.path, self.numbers[key], self.facts[key])
        return self.mapped[key]


def open_shard_file(path: Path) -> ShardFile:
    """The index of one rank's model file; reads no values. CorruptArtifact when it has no tensors by name."""
    value = load_file(path)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise CorruptArtifact(f"{path} holds no tensors by name")
    if not has_own_files(path):
        mapped = {key: as_tensor(leaf, path) for key, leaf in value.items()}
        return ShardFile(path, {key: tensor_facts(tensor, path) for key, tensor in mapped.items()}, mapped, {})
    numbers = {key: reference_number(leaf, path) for key, leaf in value.items()}
    facts = referred_facts(path, set(numbers.values()))
    return ShardFile(path, {key: facts[number] for key, number in numbers.items()}, {}, numbers)


def scan_ranks(folder: Path) -> dict[Rank, Path]:
    """The ranks' files in `folder`; CorruptArtifact for anything else in it, which belongs to another checkpoint."""
    if not folder.is_dir():
        raise CorruptArtifact(f"{folder} is missing: copy the whole checkpoint")
    found, others = {}, []
    for path in sorted(folder.iterdir()):
        match = _SHARD.fullmatch(path.name)
        if "_ep_rank_" in path.name:
            raise UserError(
                "UnsupportedShards", f"{path} is of a model with expert parallelism, which is not supported"
            )
        if match is not None and path.is_file():
            found[int(match["dp"]), int(match["tp"]), int(match["pp"])] = path
        else:
            others.append(path)
    beside = {path.name + suffix for path in found.values() for suffix in (_INFO, _TENSORS)}
    for path in others:
        if path.name not in beside:
            raise CorruptArtifact(f"{path} is foreign: it is no rank's file of this checkpoint; remove it")
    return found


def rank_file_name(rank: Rank) -> str:
    """How the vendor names a rank's file."""
    return "dp_rank_{:02d}_tp_rank_{:02d}_pp_rank_{:02d}.pt".format(*rank)


def check_contents(folder: Path) -> None:
    """Compare each file's bytes with the checksums that its archive has of them: a changed bit is loaded silently."""
    paths = sorted(path for path in folder.rglob("*.pt") if path.is_file())
    with ThreadPoolExecutor(max_workers=4) as pool:
        for path, problem in zip(paths, pool.map(_archive_damage, paths), strict=True):
            if problem:
                raise CorruptArtifact(f"{path} is damaged ({problem}): copy it again, or use an earlier checkpoint")


def load_file(path: Path) -> Any:
    """What torch.save wrote to `path`, its tensors mapped, references in place of those with files of their own.

    CorruptArtifact when it is missing, cut short or something else; UserError (UnsafePickle) when it holds code.
    """
    try:
        with torch.serialization.safe_globals([(TensorReference, _REFERENCE)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CorruptArtifact(f"{path} is missing: copy the whole checkpoint") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        # Bytes of any kind reach torch's readers of archives and pickles, which raise nearly anything.
        words = str(error).strip()
        unsafe = _UNSAFE.search(words)
        if unsafe is not None:
            raise UserError(
                "UnsafePickle",
                f"{path} holds more than tensors ({unsafe[0][:160]}), which could run code when it is read: it is not "
                "read",
            ) from error
        first = words.splitlines()[0][:200] if words else "empty"
        raise CorruptArtifact(
            f"{path} is no whole file of torch.save ({type(error).__name__}: {first}): copy it again, or use an "
            "earlier checkpoint"
        ) from error


def has_own_files(path: Path) -> bool:
    """Whether the tensors of a rank's file have files of their own."""
    return path.with_name(path.name + _TENSORS).is_dir()


def references(value: Any) -> Iterator[TensorReference]:
    """All references in nested dictionaries and sequences."""
    if isinstance(value, TensorReference):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from references(inner)


def reference_number(leaf: Any, path: Path) -> int:
    """The number of a tensor's own file; CorruptArtifact when `leaf` is no reference."""
    number = getattr(leaf, "tid", None)
    if not isinstance(leaf, TensorReference) or not is_count(number):
        raise CorruptArtifact(f"{path} holds {type(leaf).__name__} where a reference to a tensor's file is expected")
    return int(leaf.tid)


def referred_facts(path: Path, numbers: Collection[int]) -> dict[int, TensorFacts]:
    """Type and shape of the tensors `numbers` of a rank's file, each in its own file, and no other is there."""
    folder = path.with_name(path.name + _TENSORS)
    present = set()
    for entry in sorted(folder.iterdir()):
        match = _TENSOR.fullmatch(entry.name)
        if match is None or int(match["number"]) not in numbers:
            raise CorruptArtifact(f"{entry} is foreign: {path.name} refers to no such tensor; remove it")
        present.add(int(match["number"]))
    missing = set(numbers) - present
    if missing:
        raise CorruptArtifact(f"{folder} lacks {_file_names(missing)}: copy the whole checkpoint")
    info_path = path.with_name(path.name + _INFO)
    if not info_path.is_file():
        # neuronx-distributed up to 0.6 writes none.
        return {number: _facts_in(_own_path(path, number)) for number in numbers}
    info = load_file(info_path)
    try:
        if set(info) != set(numbers):
            raise ValueError(f"it has {len(info)} tensors")
        if any(entry.get("expert_model_parallel") for entry in info.values()):
            raise UserError(
                "UnsupportedShards", f"{info_path} is of a model with expert parallelism, which is not supported"
            )
        return {
            number: TensorFacts(_DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])))
            for number, entry in info.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptArtifact(
            f"{info_path} does not describe the {len(numbers)} tensors of {path.name}: {type(error).__name__}: {error}"
        ) from error


def read_referred(path: Path, number: int, facts: TensorFacts) -> torch.Tensor:
    """Tensor `number` of a rank's file, mapped; CorruptArtifact when it is not what the rank's files say."""
    own = _own_path(path, number)
    value = as_tensor(load_file(own), own)
    found = tensor_facts(value, own)
    if found != facts:
        raise CorruptArtifact(
            f"{own} holds {found.dtype} {list(found.shape)}, expected {facts.dtype} {list(facts.shape)}: it is another "
            "checkpoint's"
        )
    return value


def as_tensor(value: Any, path: Path) -> torch.Tensor:
    """`value` if it is a dense tensor; CorruptArtifact else."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        raise CorruptArtifact(f"{path} holds {type(value).__name__} where a dense tensor is expected")
    return value.detach()


def give_back(mapped: torch.Tensor) -> None:
    """Give back the memory that reading a mapped tensor took; what is read again comes from the file again.

    Only for tensors that load_file gave: the pages of any other would be lost.
    """
    start = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if end > start and madvise is not None and mapped.is_contiguous():
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def tensor_facts(tensor: torch.Tensor, path: Path) -> TensorFacts:
    """Type and shape; UserError when safetensors has no such type."""
    if tensor.dtype not in _DTYPES:
        raise UserError("UnsupportedDtype", f"{path} holds {tensor.dtype}, which safetensors files cannot hold")
    return TensorFacts(_DTYPES[tensor.dtype], tuple(tensor.shape))


def _facts_in(path: Path) -> TensorFacts:
    return tensor_facts(as_tensor(load_file(path), path), path)


def _own_path(path: Path, number: int) -> Path:
    return path.with_name(path.name + _TENSORS) / f"tensor_{number}.pt"


def _file_names(numbers: Iterable[int]) -> str:
    return some_names(f"tensor_{number}.pt" for number in numbers)


def _archive_damage(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        return f"no whole archive of torch.save: {error}"
    return f"the checksum of {broken} is wrong" if broken else ""
