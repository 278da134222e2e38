"""What every source of files says about itself: a pinned listing, and how to fetch from it.

sources/__init__.py opens the right one; models.py and datasets.py choose files of its listing; store.py keeps the
chosen files as a shared artifact. A source knows nothing of models, datasets or artifacts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class SourceFile:
    """One file of a source: POSIX path under its root, bytes, and `identity`, which changes when the contents may have.

    `sha256` in hex is set where the source publishes it; fetch has then compared it with what arrived.
    """

    path: str
    size: int
    identity: str
    sha256: str | None = None


@dataclass(frozen=True)
class Listing:
    """All files of a source at one moment. `version` is recorded with the artifact (a hub's commit), "" if unknown."""

    version: str
    files: tuple[SourceFile, ...]


class Source(Protocol):
    """A place that files come from. Methods raise UserError (wrong name, no access) or RetryableError (network)."""

    @property
    def name(self) -> str:
        """The source as the spec wrote it, for messages."""

    def list_files(self) -> Listing:
        """Resolve the revision and list every file."""

    def read(self, file: SourceFile) -> bytes:
        """The contents of one small file of the listing."""

    def fetch(self, files: Sequence[SourceFile], folder: Path) -> None:
        """Bring `files` into `folder`, each whole and checked; what an earlier call already brought is kept."""
