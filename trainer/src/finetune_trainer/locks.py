"""File locks on the shared volume, which the system lets go of when their holder dies.

artifacts.py marks live writers with them; the sources let one process fetch a shared model while others wait. X"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL})


@dataclass(frozen=True)
class Attempt:
    """Outcome of try_lock: the descriptor that holds the lock, or None with the reason in `held_elsewhere`."""

    descriptor: int | None
    held_elsewhere: bool


def try_lock(path: Path) -> Attempt:
    """Take the lock file `path` (created when missing) without waiting. On a volume without flock: (None, False)."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return Attempt(None, held_elsewhere=True)
    except OSError as error:
        os.close(descriptor)
        if error.errno in _UNSUPPORTED:
            return Attempt(None, held_elsewhere=False)
        raise
    if not _is_current(descriptor, path):
        # Whoever held it before has deleted the file: this lock guards nothing.
        os.close(descriptor)
        return Attempt(None, held_elsewhere=True)
    return Attempt(descriptor, held_elsewhere=False)


def release_lock(descriptor: int | None) -> None:
    """Let go of what try_lock returned; None is fine."""
    if descriptor is not None:
        os.close(descriptor)


@contextmanager
def shared_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path` during the block, together with all who hold it so; waits for one who has it alone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        yield
    finally:
        os.close(descriptor)


@contextmanager
def folder_lock(path: Path) -> Iterator[None]:
    """Hold the lock of the folder `path` (a hidden sibling file, which stays) during the block; waits for its holder.

    Not reentrant: a second folder_lock of one path in one process waits for itself.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_path = path.with_name(f".{path.name}.lock")
    descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is working on {path}", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            print(f"no file locks under {path.parent} ({error.strerror}): another job may do the same work", flush=True)
        yield
    finally:
        os.close(descriptor)


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
