"""What a file that is written as a stream needs beside the writing: its sha256, and a disk that is never idle.

shard_rewriting.py uses the parts, consolidation writes whole files with StreamedFile. Hash and disk work on threads of
their own: hashlib and the system calls let go of the interpreter lock. Standard library only.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

HASH_BACKLOG = 6
"""Pieces that may wait for a hash; more would only hold memory."""
_FLUSH_BYTES = 32 << 20
_FLUSH_BACKLOG = 3
"""Windows of written bytes that the disk may be behind: what a stop or the final fsync has to wait for."""

_SYNC_FILE_RANGE_WAIT_BEFORE, _SYNC_FILE_RANGE_WRITE, _SYNC_FILE_RANGE_WAIT_AFTER = 1, 2, 4

RawBytes: TypeAlias = "bytes | bytearray | memoryview[int]"


class BackgroundHash:
    """A sha256 that is computed on a thread of its own, in the order of the updates."""

    def __init__(self, state: hashlib._Hash | None = None) -> None:
        self._state = state if state is not None else hashlib.sha256()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash")
        self._waiting: deque[Future[None]] = deque()

    def update(self, data: RawBytes, done: Callable[[], None] | None = None) -> None:
        """Add `data`, which must not change before `done` is called; waits while too many pieces are behind."""
        if len(self._waiting) >= HASH_BACKLOG:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._add, data, done))

    def fork(self) -> BackgroundHash:
        """A hash that goes on from the same beginning."""
        self._settle()
        return BackgroundHash(self._state.copy())

    def hexdigest(self) -> str:
        self._settle()
        return self._state.hexdigest()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _add(self, data: RawBytes, done: Callable[[], None] | None) -> None:
        self._state.update(data)
        if done is not None:
            done()

    def _settle(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()


class Flusher:
    """Sends written bytes to the disk on a thread of its own, so that the disk works while later ones are computed.

    It keeps few of them behind: what is dirty counts as the pod's memory, and a stop has to wait for it.
    """

    def __init__(self, fileno: int) -> None:
        self._fileno = fileno
        self._call = getattr(ctypes.CDLL(None), "sync_file_range", None)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flush")
        self._waiting: deque[Future[None]] = deque()
        self._begin = self._end = 0

    def wrote(self, offset: int, count: int) -> None:
        """Note `count` bytes from `offset` on that were written; waits while the disk is too far behind."""
        if offset != self._end:
            self._flush()
            self._begin = offset
        self._end = offset + count
        if self._end - self._begin >= _FLUSH_BYTES:
            self._flush()
            self._begin = self._end

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _flush(self) -> None:
        if self._call is None or self._end == self._begin:
            return
        if len(self._waiting) >= _FLUSH_BACKLOG:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write_back, self._begin, self._end - self._begin))

    def _write_back(self, offset: int, count: int) -> None:
        # Its outcome does not matter: fsync tells of errors, and a file system may not know the call.
        flags = _SYNC_FILE_RANGE_WAIT_BEFORE | _SYNC_FILE_RANGE_WRITE | _SYNC_FILE_RANGE_WAIT_AFTER
        assert self._call is not None
        self._call(self._fileno, ctypes.c_int64(offset), ctypes.c_int64(count), flags)


class StreamedFile:
    """A new file that is hashed and sent to the disk while it is written. Sequential writes only; close() fsyncs.

    What is written must not change before close(). `size` in bytes and `sha256` in hex are valid after it.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._hash = BackgroundHash()
        self._flusher = Flusher(self._file.fileno())
        self.size = 0
        self.sha256 = ""

    def write(self, data: RawBytes) -> int:
        view = memoryview(data)
        self._hash.update(data)
        while len(view):
            view = view[os.write(self._file.fileno(), view) :]
        self._flusher.wrote(self.size, len(data))
        self.size += len(data)
        return len(data)

    def close(self) -> None:
        if not self._file.closed:
            self.sha256 = self._hash.hexdigest()
            self._flusher.close()
            self._hash.close()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> StreamedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
