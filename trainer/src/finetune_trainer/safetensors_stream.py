"""Reads and writes safetensors files piece by piece, so that no stage holds a model in memory.

A safetensors file is eight bytes of header length (little endian), a JSON header, and the tensors' bytes back to back.
Consolidation, merging and evaluation call this. Standard library only: no arithmetic on values happens here
(tensor_dtypes does that), and nothing is trusted that a header says until it agrees with the file's size.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from finetune_trainer.artifacts import HashingFile
from finetune_trainer.errors import CorruptArtifact
from finetune_trainer.json_files import MAX_BYTES, is_count, parse_json
from finetune_trainer.streamed_files import StreamedFile

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one element by the dtype's name in the header."""

CHUNK_BYTES = 1 << 18
"""How much of a tensor is in memory at once where it is only copied: it fits a core's cache, which halves the time."""

_LENGTH_BYTES = 8
_MOST_DIMENSIONS = 64
_OTHER_FILES: Mapping[bytes, str] = {
    b"version ": "a pointer of git-lfs and not the file itself: fetch that with `git lfs pull`, or download it again",
    b"PK\x03\x04": "an archive of torch.save, which can run code when it is read: convert it to safetensors",
    b"\x80\x02": "a pickle, which can run code when it is read: convert it to safetensors",
}
"""How files begin that people take for safetensors."""
_METADATA_KEY = "__metadata__"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: where its bytes lie, counted from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a file says of itself: tensors by name in the order of their bytes, and its free-form metadata."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    size: int

    def tensor(self, name: str) -> TensorInfo:
        """The tensor `name`; CorruptArtifact lists what the file has instead."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CorruptArtifact(f"{self.path} has no tensor {name!r}; it has {some_names(self.tensors)}") from None


@dataclass(frozen=True)
class TensorPlan:
    """One tensor that a file will hold."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def read_header(path: Path) -> Header:
    """The header of the file at `path`, checked against the file's size.

    CorruptArtifact names the file, what was expected and what was found: a missing or cut file, a header that is no
    JSON, an unknown dtype, offsets that overlap, leave gaps or do not fit shape and dtype.
    """
    try:
        # Opening a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise _damaged(path, "it is no regular file")
            size = facts.st_size
            prefix = file.read(_LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < _LENGTH_BYTES or length > min(MAX_BYTES, size - _LENGTH_BYTES):
                for beginning, words in _OTHER_FILES.items():
                    if prefix.startswith(beginning):
                        raise CorruptArtifact(f"{path} is {words}")
                raise _damaged(path, f"a header of {length} bytes is announced in a file of {size} bytes")
            raw = file.read(length)
    except FileNotFoundError:
        raise CorruptArtifact(f"{path} is missing") from None
    except (IsADirectoryError, NotADirectoryError):
        raise _damaged(path, "it is a folder, or below a file") from None
    value = parse_json(raw, f"{path} is no whole safetensors file: its header")
    if not isinstance(value, dict):
        raise _damaged(path, "its header is no JSON object")
    data_start = _LENGTH_BYTES + length
    metadata = value.pop(_METADATA_KEY, {})
    if not isinstance(metadata, dict):
        raise _damaged(path, f"{_METADATA_KEY} of its header is no object")
    tensors = sorted((_tensor(path, name, entry, data_start) for name, entry in value.items()), key=_position)
    _check_layout(path, tensors, data_start, size)
    return Header(path, {tensor.name: tensor for tensor in tensors}, metadata, data_start, size)


def encode_header(plan: Sequence[TensorPlan], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file that holds the tensors of `plan` in this order, padded so that data starts at 8 n."""
    value: dict[str, Any] = {_METADATA_KEY: dict(metadata)} if metadata else {}
    offset = 0
    for tensor in plan:
        value[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw


class TensorReader:
    """Ranged reads of one file. Reads take no lock and may come from several threads."""

    def __init__(self, path: Path) -> None:
        self.header = read_header(path)
        self._file = path.open("rb", buffering=0)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def fileno(self) -> int:
        return self._file.fileno()

    def read(self, tensor: TensorInfo) -> bytearray:
        """All bytes of `tensor`."""
        return self.read_range(tensor.start, tensor.end)

    def read_range(self, start: int, end: int) -> bytearray:
        """The file's bytes from `start` to `end`; CorruptArtifact when the file became shorter meanwhile."""
        buffer = bytearray(end - start)
        self.read_into(memoryview(buffer), start)
        return buffer

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view` with the file's bytes from `start` on; CorruptArtifact when the file became shorter meanwhile."""
        done = 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], start + done)
            if count == 0:
                raise _damaged(self.header.path, f"it ends at byte {start + done}, expected {self.header.size} bytes")
            done += count

    def chunks(self, tensor: TensorInfo, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytearray]:
        """The bytes of `tensor` in pieces of at most `chunk_bytes`."""
        for start in range(tensor.start, tensor.end, chunk_bytes):
            yield self.read_range(start, min(start + chunk_bytes, tensor.end))


class SafetensorsWriter:
    """Writes one file tensor by tensor in the order of its plan, hashing on the way and fsyncing at the end.

    Use as a context manager; `size` and `sha256` (hex) are final after it. A tensor that is missing, out of order or of
    the wrong length is an error of the caller: ValueError. `open_file` makes the file: a StreamedFile is faster where
    what is written does not change before the end.
    """

    def __init__(
        self,
        path: Path,
        plan: Sequence[TensorPlan],
        metadata: Mapping[str, str],
        open_file: Callable[[Path], HashingFile | StreamedFile] = HashingFile,
    ) -> None:
        self._path = path
        self._left = list(reversed(plan))
        self._file = open_file(path)
        self._file.write(encode_header(plan, metadata))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._left:
            raise ValueError(f"{self._path}: tensor {self._left[-1].name!r} was planned and not written")

    @property
    def size(self) -> int:
        return self._file.size

    @property
    def sha256(self) -> str:
        return self._file.sha256

    def write(self, name: str, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
        """The next tensor of the plan, which must be `name`, in pieces that together have its length."""
        if not self._left or self._left[-1].name != name:
            raise ValueError(f"{self._path}: {name!r} is not the next tensor of the plan")
        planned = self._left.pop()
        before = self._file.size
        for chunk in chunks:
            self._file.write(chunk)
        if self._file.size - before != planned.nbytes:
            written = self._file.size - before
            raise ValueError(f"{self._path}: {name!r} got {written} bytes, its plan says {planned.nbytes}")


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"the header's entry of {name!r} lacks dtype, shape or data_offsets: {entry!r}") from None
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _damaged(path, f"{name!r} has the unknown dtype {dtype!r}")
    is_shape = isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS
    if not is_shape or not all(is_count(number) for number in [*shape, start, end]):
        raise _damaged(path, f"shape {shape!r} or offsets {start!r}, {end!r} of {name!r} are no counts")
    info = TensorInfo(name, dtype, tuple(shape), data_start + start, data_start + end)
    if info.nbytes != info.elements * ITEM_BYTES[dtype]:
        raise _damaged(path, f"{name!r} of {dtype} {shape} takes {info.nbytes} bytes by its offsets")
    return info


def _check_layout(path: Path, tensors: Sequence[TensorInfo], data_start: int, size: int) -> None:
    expected = data_start
    for tensor in tensors:
        if tensor.start != expected:
            raise _damaged(path, f"{tensor.name!r} begins at byte {tensor.start}, expected {expected}")
        expected = tensor.end
    if expected != size:
        raise _damaged(path, f"it has {size} bytes, its header describes {expected}")


def _damaged(path: Path, found: str) -> CorruptArtifact:
    return CorruptArtifact(f"{path} is no whole safetensors file: {found}; write or download it again")


def _position(tensor: TensorInfo) -> tuple[int, int]:
    return tensor.start, tensor.end


def some_names(names: Iterable[str], limit: int = 8) -> str:
    """The first names of a long list, for a message."""
    listed = sorted(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
