"""Keeps fetched files as an artifact that every job on the volume shares.

The artifact's name is the digest of what was listed (source, version, names, sizes, identities), so a changed source
gets a new name and an unchanged one is never fetched twice. One process fetches while others wait for its lock; a dead
one's lock is free at once, and what it brought so far is used by the next.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune_trainer.artifacts import new_artifact, remove_artifact, verify_artifact
from finetune_trainer.contract import digest_of
from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.json_files import is_plain_path
from finetune_trainer.locks import folder_lock
from finetune_trainer.sources.base import Listing, Source, SourceFile


def keep_files(
    source: Source,
    listing: Listing,
    files: Sequence[SourceFile],
    *,
    root: Path,
    kind: str,
    metadata: Mapping[str, Any],
    check: Callable[[Path], None],
) -> Path:
    """The folder under `root` of the artifact `kind` that holds `files` of `listing`, fetched when it is not there yet.

    `check` looks at the fetched folder before it is published and raises UserError when the files are not what is
    needed. An artifact that is there but damaged is fetched again. Raises what the source and `check` raise.
    """
    for file in files:
        if not is_plain_path(file.path):
            raise UserError("UnsafePath", f"{source.name} lists {file.path!r}, which is no plain relative path")
    identity = digest_of(
        {
            "source": source.name,
            "version": listing.version,
            "files": [[file.path, file.size, file.sha256 or file.identity] for file in files],
        }
    )
    path = root / identity.removeprefix("sha256:")[:16]
    total = sum(file.size for file in files)
    with folder_lock(path):
        if path.exists():
            try:
                verify_artifact(path)
            except CorruptArtifact as error:
                print(f"{kind} {source.name} is fetched again: {error.message}", flush=True)
                remove_artifact(path)
            else:
                print(f"{kind} {source.name}: already on the volume at {path}, verified", flush=True)
                return path
        print(f"{kind} {source.name} {listing.version}: fetching {len(files)} files, {total} bytes", flush=True)
        partial = path.with_name(f".{path.name}.partial")
        source.fetch(files, partial)
        check(partial)
        with new_artifact(path, kind) as writer:
            for file in files:
                _place(partial / file.path, writer.folder / file.path)
                if file.sha256 is not None:
                    _sync(writer.folder / file.path)
                    writer.record(file.path, file.size, file.sha256)
            writer.metadata.update(metadata)
        shutil.rmtree(partial)
        print(f"{kind} {source.name}: complete at {path}", flush=True)
    return path


def _place(source: Path, target: Path) -> None:
    """Give the file a second name, so that a kill while it is hashed costs no download; without links, move it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        source.rename(target)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
