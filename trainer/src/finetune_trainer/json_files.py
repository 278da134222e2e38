"""JSON that comes from outside: read in bounded memory, and whatever is wrong with it is an error that names the file.

Readers of manifests, indexes, configurations, checkpoints and safetensors headers call this, so that no file can end a
stage with anything but a StageError. Standard library only.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from finetune_trainer.errors import CorruptArtifact

MAX_BYTES = 100_000_000
"""Of any JSON text that is read: safetensors' own bound on its header, and far above every other file here."""

_LONGEST_PATH = 512
_LONGEST_NAME = 240
"""Bytes of one component of a path; file systems take 255, and temporary names add to it."""


def read_json_file(path: Path) -> Any:
    """The JSON value in `path`; raises what read_small_file raises, and CorruptArtifact when it is no JSON."""
    return parse_json(read_small_file(path), str(path))


def read_small_file(path: Path) -> bytes:
    """The bytes of `path`.

    FileNotFoundError passes, for the caller knows what the file is for; CorruptArtifact when it is no regular file or
    longer than MAX_BYTES.
    """
    try:
        facts = path.stat()
    except (NotADirectoryError, ValueError) as error:
        raise CorruptArtifact(f"{path} is no path of a file: {error}") from error
    if not stat.S_ISREG(facts.st_mode):
        raise CorruptArtifact(f"{path} is no regular file: put the file itself there")
    if facts.st_size > MAX_BYTES:
        raise CorruptArtifact(f"{path} has {facts.st_size} bytes, more than the {MAX_BYTES} that any such file needs")
    with path.open("rb") as file:
        return file.read(MAX_BYTES)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, none where there is no file; a line that a kill has cut is left out."""
    if not path.is_file():
        return []
    lines = []
    for raw in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(raw)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def parse_json(text: bytes | bytearray | str, where: str) -> Any:
    """The JSON value in `text`; CorruptArtifact says why `where` holds none."""
    if not text:
        raise CorruptArtifact(f"{where} is no JSON: it is empty")
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise CorruptArtifact(f"{where} is no JSON: byte {error.start} is no UTF-8 text") from error
    except ValueError as error:
        raise CorruptArtifact(f"{where} is no JSON: {error}") from error
    except RecursionError:
        raise CorruptArtifact(f"{where} is no JSON that can be read: it is nested too deep") from None


def is_plain_path(value: Any) -> bool:
    """True for a relative POSIX path of plain names: nothing absolute, no `..`, nothing a file system cannot hold."""
    if not isinstance(value, str) or not value or len(value) > _LONGEST_PATH or "\0" in value:
        return False
    try:
        parts = value.encode().split(b"/")
    except UnicodeEncodeError:
        return False
    return all(part not in (b"", b".", b"..") and len(part) <= _LONGEST_NAME for part in parts)


def is_count(value: Any) -> bool:
    """True for a whole number of at least 0 that fits 63 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
