"""Writes safetensors shards from others in one pass over the disk, while some of their tensors change on the way.

Merging calls rewrite(). A shard whose layout stays is cloned inside the kernel where the file system can share blocks;
elsewhere each block goes out again from the buffer that it was read into for its hash, which costs no more than a copy
inside the kernel. Every byte is read once, hashed as input where its digest is known and as output, and the disk is
kept at work while later blocks are computed. Memory is bounded by blocks in flight, never by a tensor or a file.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from finetune_trainer.errors import CorruptArtifact, RetryableError
from finetune_trainer.safetensors_stream import TensorReader
from finetune_trainer.streamed_files import HASH_BACKLOG, BackgroundHash, Flusher
from finetune_trainer.tensor_edits import Change, Edit

BLOCK_BYTES = 1 << 20
"""What goes from thread to thread at once: large enough that handing it over costs little."""
PIECE_BYTES = 1 << 18
"""What of a block is read, changed and written at once. It stays in a core's own cache: pieces of 1 MiB took 2.5 times
the processor time to copy, pieces of 4 MiB four times."""

_MOST_WORKERS = 8
"""Threads at most: four shards side by side are hashed at 6 GB/s, and 128 processors would only take memory."""

_FICLONE = 0x40049409

_View: TypeAlias = "memoryview[int]"


@dataclass(frozen=True)
class Segment:
    """Source bytes from start to end. They go to `offset` of output number `output`; None means: only hash them.

    `edit` is a function so that a large adapter is read matrix by matrix, when its turn comes. `again` marks bytes that
    an earlier segment has, which the source's hash leaves out.
    """

    start: int
    end: int
    output: int | None
    offset: int
    edit: Callable[[], Edit] | None = None
    again: bool = False


@dataclass(frozen=True)
class Source:
    """One input shard, its segments in file order without gaps, and its sha256 where that is known."""

    path: Path
    segments: Sequence[Segment]
    sha256: str | None


@dataclass(frozen=True)
class Output:
    """One output shard of `size` bytes. `header` is written first; empty where the source's is copied as a segment.

    `clone_of` is the source whose bytes it has at the same offsets, but for what edits change.
    """

    path: Path
    size: int
    header: bytes = b""
    clone_of: Path | None = None


@dataclass(frozen=True)
class WrittenFile:
    """An output on disk, fsynced: its bytes, hex sha256, and what edits did to its tensors, by the edits' names."""

    path: Path
    size: int
    sha256: str
    changes: dict[str, Change] = field(default_factory=dict)


@dataclass(frozen=True)
class Stream:
    """Sources that are read one after the other into outputs; independent streams run side by side."""

    sources: Sequence[Source]
    outputs: Sequence[Output]


@dataclass(frozen=True)
class Listener:
    """Who wants to know: `wrote` gets bytes as they are done, `finished` each output that is complete and fsynced.

    Both are called from several threads.
    """

    wrote: Callable[[int], None] = lambda _count: None
    finished: Callable[[WrittenFile], None] = lambda _file: None


def memory_bytes(cpus: int, streams: int, largest_row: int) -> int:
    """Upper bound of what rewrite() holds in buffers, edits' own data (adapter matrices) not counted."""
    at_once, workers = streams_at_once(cpus, streams), _workers(cpus)
    block = max(BLOCK_BYTES, largest_row)
    buffers = 2 * (at_once * (HASH_BACKLOG + 2) + _in_flight(cpus, streams) * at_once)
    # While an edit is at work it has about five float32 copies of a cache's share of its block.
    return buffers * block + workers * 10 * max(PIECE_BYTES, 2 * largest_row)


def rewrite(streams: Sequence[Stream], cpus: int, listener: Listener | None = None) -> list[WrittenFile]:
    """Run the streams with up to `cpus` threads at work; returns the written files in the streams' order.

    An exception in this thread, as a signal's handler raises it, or in a stream ends all of it within the time of a few
    blocks and leaves unfinished outputs behind. CorruptArtifact when a source does not have the sha256 that it should.
    """
    stop = threading.Event()
    listener = listener or Listener()
    with (
        ThreadPoolExecutor(max_workers=_workers(cpus), thread_name_prefix="block") as blocks,
        ThreadPoolExecutor(max_workers=streams_at_once(cpus, len(streams)), thread_name_prefix="shard") as shards,
    ):
        in_flight = _in_flight(cpus, len(streams))
        running = [shards.submit(_run_stream, stream, blocks, in_flight, listener, stop) for stream in streams]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
            failed = [error for future in running if future.done() and (error := future.exception())]
            if failed:
                raise failed[0]
            return [file for future in running for file in future.result()]
        finally:
            stop.set()
            for future in running:
                future.cancel()


def streams_at_once(cpus: int, streams: int) -> int:
    """How many outputs are written side by side."""
    return max(1, min(streams, _workers(cpus) // 2))


def _workers(cpus: int) -> int:
    return max(2, min(cpus, _MOST_WORKERS))


def _in_flight(cpus: int, streams: int) -> int:
    """Blocks of a stream that are read, changed or written at once."""
    return max(2, _workers(cpus) // streams_at_once(cpus, streams))


class _Buffer:
    """Bytes of a block, given back for the next one when every user has released them."""

    def __init__(self, data: bytearray, length: int, free: list[bytearray]) -> None:
        self._data = data
        self._free = free
        self._users = 1
        self._lock = threading.Lock()
        self.view: _View = memoryview(data)[:length]

    def share(self) -> _Buffer:
        with self._lock:
            self._users += 1
        return self

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
        self.view.release()
        self._free.append(self._data)


class _Buffers:
    """Memory that is used again: fresh pages for each block would cost as much as copying it."""

    def __init__(self) -> None:
        # The last one given back is the likeliest to be in a cache still.
        self._free: list[bytearray] = []

    def take(self, length: int) -> _Buffer:
        try:
            data = self._free.pop()
        except IndexError:
            data = bytearray()
        if len(data) < length:
            data = bytearray(max(length, BLOCK_BYTES))
        return _Buffer(data, length, self._free)


class _OutputFile:
    """An output being written. Until its first changed byte its hash is the source's, which saves a hash of those."""

    def __init__(self, output: Output, stack: ExitStack) -> None:
        self.path = output.path
        self.left = output.size
        self.changes: dict[str, Change] = {}
        self.done: WrittenFile | None = None
        self.has_header = bool(output.header)
        self._size = output.size
        self._stack = stack
        self._file = stack.enter_context(output.path.open("xb", buffering=0))
        self._flusher = Flusher(self._file.fileno())
        stack.callback(self._flusher.close)
        self.cloned = output.clone_of is not None and _clone(output.clone_of, self._file.fileno())
        self.hash: BackgroundHash | None = None
        if output.header:
            self.own_hash(BackgroundHash()).update(output.header)
            self.write(memoryview(output.header), 0)
            self.progress(0, len(output.header))

    def own_hash(self, state: BackgroundHash) -> BackgroundHash:
        self._stack.callback(state.close)
        self.hash = state
        return state

    def write(self, view: _View, offset: int) -> None:
        while len(view):
            count = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[count:], offset + count

    def progress(self, offset: int, count: int) -> None:
        """Note `count` bytes from `offset` on that are in the file."""
        self.left -= count
        self._flusher.wrote(offset, count)

    def finish(self, source_digest: str) -> WrittenFile:
        """`source_digest` is the digest of the last source, which is this file's too where nothing differed."""
        digest = self.hash.hexdigest() if self.hash is not None else source_digest
        os.fsync(self._file.fileno())
        self.done = WrittenFile(self.path, self._size, digest, self.changes)
        self._flusher.close()
        return self.done


def _clone(source: Path, target: int) -> bool:
    """Make the open file `target` share the blocks of `source`; False where the file system cannot."""
    with source.open("rb") as file:
        try:
            fcntl.ioctl(target, _FICLONE, file.fileno())
        except OSError:
            return False  # whatever it was, writing the bytes will tell
    return True


@dataclass(frozen=True)
class _Block:
    """A piece of a segment, small enough to be held: edited blocks are whole rows from first_row on."""

    start: int
    end: int
    output: int | None
    offset: int
    edit: Edit | None = None
    first_row: int = 0
    again: bool = False


@dataclass(frozen=True)
class _Done:
    """A block's bytes as they were and as they are now, and what its edit did. Both are the receiver's to release."""

    old: _Buffer
    new: _Buffer
    change: Change | None


def _run_stream(
    stream: Stream, pool: ThreadPoolExecutor, in_flight: int, listener: Listener, stop: threading.Event
) -> list[WrittenFile]:
    buffers = _Buffers()
    with ExitStack() as stack:
        outputs = [_OutputFile(output, stack) for output in stream.outputs]
        for source in stream.sources:
            digest = _run_source(source, outputs, pool, buffers, in_flight, listener, stop)
            if source.sha256 is not None and digest != source.sha256:
                raise CorruptArtifact(
                    f"{source.path} has sha256 {digest}, expected {source.sha256}: delete the base model's folder on "
                    "the workspace volume and run prepare again"
                )
            # A shard that its source was copied to is only now known to be right. One with a header of its own is
            # finished before its sources are: whoever goes on from there reads those, and so proves them, again.
            for output in outputs:
                if output.left == 0 and output.done is None:
                    listener.finished(output.finish(digest))
        return [output.done for output in outputs if output.done is not None]


def _run_source(
    source: Source,
    outputs: list[_OutputFile],
    pool: ThreadPoolExecutor,
    buffers: _Buffers,
    in_flight: int,
    listener: Listener,
    stop: threading.Event,
) -> str:
    """Copy one source; returns its sha256, "" where it is neither known nor an output's."""
    pending: deque[tuple[_Block, Future[_Done]]] = deque()
    with TensorReader(source.path) as reader, ExitStack() as stack:
        digest = BackgroundHash()
        stack.callback(digest.close)
        # Blocks that are still at work use the open files: they must end before those are closed.
        stack.callback(_drain, pending)
        complete = True

        def settle() -> None:
            nonlocal complete
            block, future = pending.popleft()
            done = future.result()
            output = None if block.output is None else outputs[block.output]
            if output is not None and block.edit is not None and output.hash is None:
                output.own_hash(digest.fork())
            if source.sha256 is not None or any(other.hash is None for other in outputs):
                if not block.again:
                    _add(digest, done.old)
            else:
                complete = False
            if output is not None:
                if block.edit is not None and done.change is not None:
                    output.changes.setdefault(block.edit.name, Change()).add(done.change)
                if output.hash is not None:
                    _add(output.hash, done.new)
                output.progress(block.offset, len(done.new.view))
                listener.wrote(len(done.new.view))
                if output.left == 0 and output.has_header:
                    listener.finished(output.finish(""))
            done.old.release()
            done.new.release()

        for block in _blocks(source.segments):
            if stop.is_set():
                raise RetryableError("Terminated", f"stopped while {source.path.name} was being rewritten")
            if len(pending) >= in_flight:
                settle()
            output = None if block.output is None else outputs[block.output]
            pending.append((block, pool.submit(_do_block, block, reader, output, buffers)))
        while pending:
            settle()
        return digest.hexdigest() if complete else ""


def _add(digest: BackgroundHash, buffer: _Buffer) -> None:
    buffer.share()
    digest.update(buffer.view, buffer.release)


def _drain(pending: deque[tuple[_Block, Future[_Done]]]) -> None:
    futures = [future for _, future in pending if not future.cancel()]
    wait(futures)


def _do_block(block: _Block, reader: TensorReader, output: _OutputFile | None, buffers: _Buffers) -> _Done:
    old = buffers.take(block.end - block.start)
    if block.edit is None:
        for start, end in _ranges(0, len(old.view), PIECE_BYTES):
            piece = old.view[start:end]
            reader.read_into(piece, block.start + start)
            if output is not None and not output.cloned:
                output.write(piece, block.offset + start)
        return _Done(old, old.share(), None)
    assert output is not None
    edit, change = block.edit, Change()
    rows = len(old.view) // edit.row_bytes
    new = buffers.take(rows * edit.written_row_bytes)
    step = max(1, PIECE_BYTES // max(edit.row_bytes, edit.written_row_bytes))
    for row in range(0, rows, step):
        last = min(row + step, rows)
        before = old.view[row * edit.row_bytes : last * edit.row_bytes]
        after = new.view[row * edit.written_row_bytes : last * edit.written_row_bytes]
        reader.read_into(before, block.start + row * edit.row_bytes)
        change.add(edit.apply(before, block.first_row + row, after))
        output.write(after, block.offset + row * edit.written_row_bytes)
    return _Done(old, new, change)


def _blocks(segments: Sequence[Segment]) -> Iterator[_Block]:
    for segment in segments:
        if segment.edit is None or segment.start == segment.end:
            for start, end in _ranges(segment.start, segment.end, BLOCK_BYTES):
                offset = segment.offset + start - segment.start
                yield _Block(start, end, segment.output, offset, again=segment.again)
            continue
        edit = segment.edit()
        step = max(1, BLOCK_BYTES // max(edit.row_bytes, edit.written_row_bytes))
        for row in range(0, edit.rows, step):
            last = min(row + step, edit.rows)
            yield _Block(
                segment.start + row * edit.row_bytes,
                segment.start + last * edit.row_bytes,
                segment.output,
                segment.offset + row * edit.written_row_bytes,
                edit,
                row,
                segment.again,
            )


def _ranges(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Pieces that end at multiples of `size`."""
    while start < end:
        stop = min((start // size + 1) * size, end)
        yield start, stop
        start = stop
