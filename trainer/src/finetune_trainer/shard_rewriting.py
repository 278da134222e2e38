"""Copies safetensors shards while low-rank deltas are added to some of their tensors, in one pass over the disk.

Merging calls rewrite(). Every byte is read once, hashed as input and as output, and written once: unchanged ranges go
from file to file inside the kernel, changed ones through float32. Memory is bounded by blocks in flight, never by a
tensor or a file.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from finetune_trainer.errors import CorruptArtifact
from finetune_trainer.safetensors_stream import CHUNK_BYTES, TensorInfo, TensorReader
from finetune_trainer.tensor_dtypes import Floats, RawBytes, encode, round_in_place, to_float32

_Done: TypeAlias = tuple[RawBytes, RawBytes, "Change | None"]
"""A block's bytes as they were and as they are now, and what its patch did."""

_CACHE_ELEMENTS = 1 << 17
"""Elements that are added at once: their float32 copies stay in a core's own cache."""
_HASH_BACKLOG = 3
"""Blocks that may wait for a hash; more would only hold memory."""
_NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})


@dataclass(frozen=True)
class Patch:
    """What is added to a matrix: scale * left @ right, with left (rows, rank) and right (rank, columns)."""

    tensor: TensorInfo
    left: Floats
    right: Floats
    scale: float

    def delta(self, first_row: int, last_row: int) -> Floats:
        """The addend of rows first_row to last_row, exclusive."""
        delta: Floats = self.left[first_row:last_row] @ self.right
        delta *= np.float32(self.scale)
        return delta


@dataclass
class Change:
    """What a patch did: elements whose value changed, sum of squares of the delta, largest |new - old|."""

    changed: int = 0
    delta_squares: float = 0.0
    max_difference: float = 0.0

    def add(self, other: Change) -> None:
        self.changed += other.changed
        self.delta_squares += other.delta_squares
        # max() would drop a NaN that comes second.
        self.max_difference = float(np.maximum(self.max_difference, other.max_difference))


@dataclass(frozen=True)
class Segment:
    """Source bytes from start to end. They go to `offset` of output number `output`; None means: only hash them.

    `patch` is a function so that a large adapter is read matrix by matrix, when its turn comes.
    """

    start: int
    end: int
    output: int | None
    offset: int
    patch: Callable[[], Patch] | None = None


@dataclass(frozen=True)
class Source:
    """One input shard, its segments in file order without gaps, and its sha256 where that is known."""

    path: Path
    segments: Sequence[Segment]
    sha256: str | None


@dataclass(frozen=True)
class Output:
    """One output shard. `header` is written first; empty where the source's header is copied as a segment."""

    path: Path
    header: bytes = b""


@dataclass(frozen=True)
class WrittenFile:
    """An output on disk, fsynced: its bytes and hex sha256."""

    path: Path
    size: int
    sha256: str


@dataclass
class Stream:
    """Sources that are read one after the other into outputs; independent streams run side by side."""

    sources: Sequence[Source]
    outputs: Sequence[Output]
    changes: dict[str, Change] = field(default_factory=dict)


def rewrite(streams: Sequence[Stream], cpus: int) -> list[WrittenFile]:
    """Run the streams with about `cpus` threads at work; fills each stream's `changes` by tensor name.

    CorruptArtifact when a source does not have the sha256 that it should have.
    """
    with (
        ThreadPoolExecutor(max_workers=max(2, cpus), thread_name_prefix="block") as blocks,
        ThreadPoolExecutor(max_workers=max(1, min(len(streams), cpus // 2)), thread_name_prefix="shard") as shards,
    ):
        done = list(shards.map(lambda stream: _run_stream(stream, blocks, in_flight=max(2, cpus)), streams))
    return [file for files in done for file in files]


class _Hash:
    """A sha256 that is computed on a thread of its own, in the order of the updates."""

    def __init__(self, state: hashlib._Hash | None = None) -> None:
        self._state = state if state is not None else hashlib.sha256()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash")
        self._waiting: deque[Future[None]] = deque()

    def update(self, data: RawBytes) -> None:
        if len(self._waiting) >= _HASH_BACKLOG:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._state.update, data))

    def fork(self) -> _Hash:
        """A hash that goes on from the same beginning."""
        self._settle()
        return _Hash(self._state.copy())

    def hexdigest(self) -> str:
        self._settle()
        return self._state.hexdigest()

    def close(self) -> None:
        self._pool.shutdown()

    def _settle(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()


class _OutputFile:
    """An output being written. Until its first changed byte its hash is the source's, which saves a hash of those."""

    def __init__(self, output: Output, stack: ExitStack) -> None:
        self.path = output.path
        self._stack = stack
        self._file = stack.enter_context(output.path.open("xb", buffering=0))
        self.fileno = self._file.fileno()
        self.hash: _Hash | None = None
        if output.header:
            self.own_hash(_Hash())
            self.write(output.header, 0)
            self.update(output.header)

    def own_hash(self, state: _Hash) -> None:
        self._stack.callback(state.close)
        self.hash = state

    def update(self, data: RawBytes) -> None:
        if self.hash is not None:
            self.hash.update(data)

    def write(self, data: RawBytes, offset: int) -> None:
        view = memoryview(data)
        while len(view):
            count = os.pwrite(self.fileno, view, offset)
            view, offset = view[count:], offset + count

    def copy(self, source: int, data: RawBytes, start: int, offset: int) -> None:
        """The source's bytes from `start`, which `data` holds too, to `offset`: within the kernel where it can."""
        done = 0
        while done < len(data):
            try:
                count = os.copy_file_range(source, self.fileno, len(data) - done, start + done, offset + done)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                count = 0
            if count == 0:
                self.write(memoryview(data)[done:], offset + done)
                return
            done += count

    def finish(self, source_digest: str) -> WrittenFile:
        """`source_digest` is the digest of the last source, which is this file's too where nothing differed."""
        os.fsync(self.fileno)
        digest = self.hash.hexdigest() if self.hash is not None else source_digest
        return WrittenFile(self.path, os.fstat(self.fileno).st_size, digest)


@dataclass(frozen=True)
class _Block:
    """A piece of a segment, small enough to be held: patched blocks are whole rows from first_row on."""

    start: int
    end: int
    output: int | None
    offset: int
    patch: Patch | None = None
    first_row: int = 0


def _run_stream(stream: Stream, pool: ThreadPoolExecutor, in_flight: int) -> list[WrittenFile]:
    with ExitStack() as stack:
        outputs = [_OutputFile(output, stack) for output in stream.outputs]
        digest = ""
        for source in stream.sources:
            digest = _run_source(source, outputs, stream.changes, pool, in_flight)
            if source.sha256 is not None and digest != source.sha256:
                raise CorruptArtifact(
                    f"{source.path} has sha256 {digest}, expected {source.sha256}: delete the base model's folder on "
                    "the workspace volume and run prepare again"
                )
        return [output.finish(digest) for output in outputs]


def _run_source(
    source: Source, outputs: list[_OutputFile], changes: dict[str, Change], pool: ThreadPoolExecutor, in_flight: int
) -> str:
    """Copy one source; returns its sha256."""
    pending: deque[tuple[_Block, Future[_Done]]] = deque()
    with TensorReader(source.path) as reader, ExitStack() as stack:
        digest = _Hash()
        stack.callback(digest.close)
        # Blocks that are still at work use the open files: they must end before those are closed.
        stack.callback(_drain, pending)

        def settle() -> None:
            block, future = pending.popleft()
            old, new, change = future.result()
            output = None if block.output is None else outputs[block.output]
            if change is not None and block.patch is not None and output is not None:
                changes.setdefault(block.patch.tensor.name, Change()).add(change)
                if output.hash is None:
                    output.own_hash(digest.fork())
            digest.update(old)
            if output is not None:
                output.update(new)

        for block in _blocks(source.segments):
            if len(pending) >= in_flight:
                settle()
            output = None if block.output is None else outputs[block.output]
            pending.append((block, pool.submit(_do_block, block, reader, output)))
        while pending:
            settle()
        return digest.hexdigest()


def _drain(pending: deque[tuple[_Block, Future[_Done]]]) -> None:
    futures = [future for _, future in pending if not future.cancel()]
    wait(futures)


def _do_block(block: _Block, reader: TensorReader, output: _OutputFile | None) -> _Done:
    old = reader.read_range(block.start, block.end)
    if output is None:
        return old, old, None
    if block.patch is None:
        output.copy(reader.fileno(), old, block.start, block.offset)
        return old, old, None
    new, change = add_rows(block.patch, old, block.first_row)
    output.write(new, block.offset)
    return old, new, change


def add_rows(patch: Patch, old: RawBytes, first_row: int) -> tuple[bytearray, Change]:
    """`old` (whole rows of the patched tensor from first_row on) with the delta added in float32 and rounded once."""
    dtype, columns = patch.tensor.dtype, patch.tensor.shape[1]
    row_bytes = patch.tensor.nbytes // patch.tensor.shape[0]
    rows = len(old) // row_bytes
    step = max(1, _CACHE_ELEMENTS // columns)
    new, change = bytearray(len(old)), Change()
    view = memoryview(old)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        here = slice(begin * row_bytes, end * row_bytes)
        before = to_float32(view[here], dtype, (end - begin, columns))
        delta = patch.delta(first_row + begin, first_row + end)
        squares = float(np.vdot(delta, delta))
        after = np.add(before, delta, out=delta)
        round_in_place(after, dtype)
        new[here] = encode(after, dtype)
        difference = np.subtract(after, before, out=before)
        largest = float(np.maximum(difference.max(), -difference.min()))
        change.add(Change(int(np.count_nonzero(difference)), squares, largest))
    return new, change


def _blocks(segments: Sequence[Segment]) -> Iterator[_Block]:
    for segment in segments:
        if segment.patch is None:
            for start, end in _ranges(segment.start, segment.end):
                yield _Block(start, end, segment.output, segment.offset + start - segment.start)
            continue
        patch = segment.patch()
        rows, row_bytes = patch.tensor.shape[0], patch.tensor.nbytes // patch.tensor.shape[0]
        step = max(1, CHUNK_BYTES // row_bytes)
        for row in range(0, rows, step):
            begin, end = row * row_bytes, min(row + step, rows) * row_bytes
            yield _Block(segment.start + begin, segment.start + end, segment.output, segment.offset + begin, patch, row)


def _ranges(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Pieces that end at multiples of CHUNK_BYTES: aligned pieces can share their blocks on some file systems."""
    while start < end:
        stop = min((start // CHUNK_BYTES + 1) * CHUNK_BYTES, end)
        yield start, stop
        start = stop
