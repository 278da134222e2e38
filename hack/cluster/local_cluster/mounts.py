"""Mounts below the cluster's folders: pods' volumes and root file systems, network namespaces, BuildKit's layers."""

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

_MNT_DETACH = 2


def mounts_below(mountinfo: str, folders: Iterable[Path]) -> list[Path]:
    """Mount points in the folders, from the text of /proc/self/mountinfo, in the order in which to unmount them."""
    roots = tuple(folders)
    points = [Path(_unescape(line.split()[4])) for line in mountinfo.splitlines()]
    return [point for point in reversed(points) if any(point.is_relative_to(root) for root in roots)]


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def current(folders: Iterable[Path]) -> list[Path]:
    return mounts_below(Path("/proc/self/mountinfo").read_text(), folders)


def unmount_all(folders: Iterable[Path]) -> None:
    """Unmount everything below the folders, newest first; what is busy is detached and goes with its last user."""
    roots = tuple(folders)
    libc = ctypes.CDLL(None, use_errno=True)
    for _ in range(3):  # a mount can hide another at the same place
        points = current(roots)
        for point in points:
            if libc.umount2(os.fsencode(point), 0) != 0:
                libc.umount2(os.fsencode(point), _MNT_DETACH)
        if not points:
            return
