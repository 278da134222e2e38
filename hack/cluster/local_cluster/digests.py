"""Names for contents: the digest of files that a cached binary or an image tag is called by.

Independent of git, of modification times and of the folder that the tree lies in.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from .problem import ClusterProblem

_IGNORED_FOLDERS = {"__pycache__", ".git", ".mypy_cache", ".pytest_cache", ".ruff_cache", "build", "dist"}


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise ClusterProblem(f"{path}: no such file or folder, so no digest can be taken of it; check the path")
    for child in sorted(path.iterdir()):
        ignored = child.name in _IGNORED_FOLDERS or child.name.endswith((".egg-info", ".pyc"))
        if not ignored:
            yield from _files(child)


def content_digest(paths: Iterable[Path], salt: str = "") -> str:
    """sha256 in hex over names and contents. A folder counts by the paths inside it, a file by its own name."""
    total = hashlib.sha256(salt.encode())
    for root in paths:
        for file in _files(root):
            name = file.relative_to(root) if file != root else Path(root.name)
            contents = hashlib.sha256(file.read_bytes()).hexdigest()
            total.update(f"{name.as_posix()}\0{contents}\n".encode())
    return total.hexdigest()


def content_tag(paths: Iterable[Path], salt: str = "") -> str:
    """An image tag: the first 16 hex digits of the digest."""
    return content_digest(paths, salt)[:16]
