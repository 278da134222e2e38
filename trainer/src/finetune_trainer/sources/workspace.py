"""workspace:///path: a folder or a file that already lies on the workspace volume.

Files are hard-linked into the artifact, so that a model is never copied yet its artifact is a folder of plain files
like any other: readers need no second place to look, and the artifact stays whole when the user removes the original.
Where the volume or its owner forbids links (a file of another user under fs.protected_hardlinks) they are copied. A
file that is later edited in place fails the artifact's verification.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from finetune_trainer.errors import RetryableError, UserError
from finetune_trainer.sources.base import Listing, SourceFile

_NO_LINKS = frozenset({errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS})


class WorkspaceSource:
    """A path below the mounted workspace. Links that lead out of the workspace are refused."""

    def __init__(self, source: str, *, workspace: Path) -> None:
        self.name = source
        path = source.removeprefix("workspace://")
        if not path.startswith("/") or not path.strip("/") or ".." in path.split("/"):
            raise UserError(
                "InvalidSource", f"{source!r} is no path on the workspace: write workspace:///folder, without '..'"
            )
        self._workspace = workspace.resolve()
        self._root = self._workspace / path.strip("/")

    def list_files(self) -> Listing:
        root = self._resolve(self._root)
        if root.is_file():
            return Listing(version="", files=(self._describe(root, root.name),))
        if not root.is_dir():
            raise UserError("SourceNotFound", f"{self.name}: there is no {self._root} on the workspace volume")
        files = []
        for folder, folders, names in os.walk(self._root, onerror=_raise):
            # hidden folders hold caches and our own temporary folders
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in names:
                path = Path(folder) / name
                resolved = self._resolve(path)
                if resolved.is_file():  # no pipe, socket or device, and no link to nothing
                    files.append(self._describe(resolved, path.relative_to(self._root).as_posix()))
        return Listing(version="", files=tuple(sorted(files, key=lambda file: file.path)))

    def read(self, file: SourceFile) -> bytes:
        return self._path(file).read_bytes()

    def fetch(self, files: Sequence[SourceFile], folder: Path) -> None:
        for file in files:
            source, target = self._path(file), folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(source, target)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                shutil.copyfile(source, target)
            if self._describe(target, file.path).size != file.size:
                raise RetryableError("SourceChanged", f"{self.name}: {file.path} changed while it was read")

    def _path(self, file: SourceFile) -> Path:
        root = self._resolve(self._root)
        return root if root.is_file() else self._resolve(self._root / file.path)

    def _describe(self, path: Path, name: str) -> SourceFile:
        facts = path.stat()
        return SourceFile(name, facts.st_size, f"{facts.st_ino}-{facts.st_mtime_ns}")

    def _resolve(self, path: Path) -> Path:
        resolved = path.resolve()
        if not resolved.is_relative_to(self._workspace):
            raise UserError(
                "UnsafePath", f"{self.name}: {path} leads to {resolved}, which is outside the workspace volume"
            )
        return resolved


def _raise(error: OSError) -> None:
    """A folder that cannot be listed must not look like one without files."""
    raise error
