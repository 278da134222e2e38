"""Tokenised documents on the workspace, between reading the dataset and writing rows.

documents.py fills a DocumentSpool, rows.py writes rows out of it. Memory holds a few numbers a document and the tokens
of one chunk, whatever the size of the dataset. A spool with a key survives its process: chunks that were committed are
there again when the next attempt opens it, so that prepare goes on where it was killed.

    tokens.bin      int32, all documents in their order; a token that is learnt is stored as its bitwise complement
    documents.bin   a document: 64-bit key, length (int64)
    journal.jsonl   first line: what the spool was made from; then a line a chunk: its documents, tokens, sha256 of its
                    part of the two files, and the caller's note

Nothing is fsynced: what a node's crash took is found by its sha256, and then the whole spool is thrown away.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.contract import canonical_json
from finetune_trainer.errors import UserError
from finetune_trainer.locks import release_lock, try_lock

IGNORED = -100
"""Label of a token that is not learnt."""

Tokens = npt.NDArray[np.int32]

_VERSION = 1
_TOKENS = "tokens.bin"
_DOCUMENTS = "documents.bin"
_JOURNAL = "journal.jsonl"
_DOCUMENT = np.dtype([("key", "<u8"), ("length", "<i8")])
_SCAN_TOKENS = 1 << 20


class DocumentSpool:
    """Documents, numbered from 0 in the order of add(). Use as a context manager, or call close().

    Without a `key` the documents lie in a file under `folder` that has no name and goes with the process. With one they
    lie in `folder` itself: `notes` are then those of the chunks that an earlier process with an equal key committed.
    The folder goes at the end of the block, and stays when it ends in an error that another attempt may not have.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any] | None = None) -> None:
        self.notes: list[Any] = []
        self._lengths = array("q")
        self._keys = array("Q")
        self._supervised = array("q")
        self._pending = array("i")
        self._pending_learnt = array("q")
        self._committed = 0  # documents
        self._tokens: Tokens | None = None
        self._offsets: npt.NDArray[np.int64] | None = None
        self._folder: Path | None = None
        self._lock: int | None = None
        self._files: list[IO[bytes]] = []
        if key is not None and self._claim(folder):
            self._open_kept({"key": canonical_json(key).decode(), "version": _VERSION})
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._files = [tempfile.TemporaryFile(dir=folder if key is None else folder.parent)]  # noqa: SIM115

    def __enter__(self) -> DocumentSpool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(keep=error is not None and not isinstance(error, UserError))

    def __len__(self) -> int:
        return len(self._lengths)

    # ---- writing

    def add(self, tokens: Sequence[int], learnt: Iterable[tuple[int, int]], key: int = 0) -> None:
        """Append a document. `learnt` are the ranges (first, end) of the tokens that are labels, ascending, from 1 on.

        The first token of a document is never a label: in a packed row it would be learnt from the document before.
        `key` is a 64-bit number of the caller's.
        """
        if self._tokens is not None:
            raise ValueError("the spool is being read: nothing can be added any more")
        start = len(self._pending)
        self._pending.fromlist(tokens if isinstance(tokens, list) else list(tokens))
        for first, end in learnt:
            self._pending_learnt.extend((start + first, start + end))
        self._lengths.append(len(tokens))
        self._keys.append(key)

    def commit(self, note: Any = None) -> None:
        """Write what was added since the last commit as one chunk, with the caller's JSON `note`."""
        lengths = np.asarray(self._lengths[self._committed :], dtype=np.int64)
        chunk = np.frombuffer(self._pending, dtype=np.int32).astype("<i4")
        bounds = np.asarray(self._pending_learnt, dtype=np.int64).reshape(-1, 2)
        steps = np.bincount(bounds[:, 0], minlength=len(chunk) + 1) - np.bincount(
            bounds[:, 1], minlength=len(chunk) + 1
        )
        chunk ^= -np.cumsum(steps[: len(chunk)], dtype=np.int32)  # 0 or -1, and xor with -1 is the complement
        documents = np.empty(len(lengths), dtype=_DOCUMENT)
        documents["key"], documents["length"] = self._keys[self._committed :], lengths
        self._files[0].write(chunk.tobytes())
        if self._folder is not None:
            self._files[1].write(documents.tobytes())
            facts = {"documents": len(lengths), "tokens": len(chunk), "sha256": _digest(chunk, documents), "note": note}
            for file in self._files[:2]:
                file.flush()
            self._files[2].write(json.dumps(facts).encode() + b"\n")
            self._files[2].flush()
        self._note_chunk(chunk, lengths)
        self._pending = array("i")
        self._pending_learnt = array("q")

    # ---- reading

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(documents,) tokens of each."""
        return np.asarray(self._lengths, dtype=np.int64)

    @property
    def keys(self) -> npt.NDArray[np.uint64]:
        """(documents,) what add() got."""
        return np.asarray(self._keys, dtype=np.uint64)

    @property
    def supervised_counts(self) -> npt.NDArray[np.int64]:
        """(documents,) tokens of each that are learnt."""
        self._read()
        return np.asarray(self._supervised, dtype=np.int64)

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """(documents + 1,) where each begins in `stored`."""
        self._read()
        assert self._offsets is not None
        return self._offsets

    @property
    def stored(self) -> Tokens:
        """(tokens,) every document's tokens, mapped from the file; a learnt one as its complement (see split)."""
        return self._read()

    def length(self, number: int) -> int:
        return self._lengths[number]

    def tokens(self, number: int) -> Tokens:
        """(length,) int32. After the first call nothing can be added."""
        return split(self._document(number))[0]

    def labels(self, number: int) -> Tokens:
        """(length,) int32: the token itself where it is learnt, IGNORED elsewhere."""
        return split(self._document(number))[1]

    def learnt(self, number: int) -> list[tuple[int, int]]:
        """The ranges of the document's tokens that are labels, as few as there can be."""
        marks = np.concatenate(([False], self._document(number) < 0, [False]))
        bounds = np.flatnonzero(marks[1:] != marks[:-1]).tolist()
        return list(zip(bounds[::2], bounds[1::2], strict=True))

    def supervised(self, number: int) -> int:
        """Tokens of the document that are learnt."""
        return int(self.supervised_counts[number])

    def largest_token(self) -> int:
        stored = self._read()
        parts = (stored[start : start + _SCAN_TOKENS] for start in range(0, len(stored), _SCAN_TOKENS))
        return max((int(split(part)[0].max()) for part in parts), default=0)

    def close(self, *, keep: bool = False) -> None:
        """Close the files; with `keep` a spool that has a key stays for the next attempt, else it is removed."""
        self._tokens = None
        for file in self._files:
            file.close()
        if self._folder is not None:
            if not keep:
                shutil.rmtree(self._folder, ignore_errors=True)
                _lock_path(self._folder).unlink(missing_ok=True)
            release_lock(self._lock)
        self._folder = self._lock = None

    # ---- inside

    def _read(self) -> Tokens:
        if self._tokens is None:
            if len(self._lengths) > self._committed:
                self.commit()
            self._files[0].flush()
            self._offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.lengths)])
            empty = self._offsets[-1] == 0
            self._tokens = np.empty(0, "<i4") if empty else np.memmap(self._files[0], dtype="<i4", mode="r")
        return self._tokens

    def _document(self, number: int) -> Tokens:
        return self.stored[self.offsets[number] : self.offsets[number + 1]]

    def _note_chunk(self, chunk: Tokens, lengths: npt.NDArray[np.int64]) -> None:
        until = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(chunk < 0, dtype=np.int64)])
        ends = np.cumsum(lengths)
        self._supervised.frombytes((until[ends] - until[ends - lengths]).tobytes())
        self._committed += len(lengths)

    def _claim(self, folder: Path) -> bool:
        """Whether `folder` is this process' alone. Where nobody can tell (no file locks), it is not."""
        folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(_lock_path(folder))
        if lock.descriptor is None:
            why = "another process has it" if lock.held_elsewhere else "the volume has no file locks"
            print(f"documents are not kept for the next attempt, {why}: {folder}", flush=True)
            return False
        self._folder, self._lock = folder, lock.descriptor
        return True

    def _open_kept(self, made_from: Mapping[str, Any]) -> None:
        """Open the files of the claimed folder after their last whole chunk, or empty when they are not to be used."""
        assert self._folder is not None
        paths = [self._folder / name for name in (_TOKENS, _DOCUMENTS, _JOURNAL)]
        try:
            sizes = self._load(paths, made_from)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if paths[2].exists():
                print(f"what an earlier attempt left in {self._folder} is thrown away: {error}", flush=True)
            self._lengths, self._keys, self._supervised, self._committed = array("q"), array("Q"), array("q"), 0
            self.notes = []
            sizes = [0, 0, 0]
        for path, size in zip(paths, sizes, strict=True):
            path.touch()
            file = path.open("r+b")
            file.truncate(size)
            file.seek(size)
            self._files.append(file)
        if sizes[2] == 0:
            self._files[2].write(json.dumps(made_from).encode() + b"\n")

    def _load(self, paths: Sequence[Path], made_from: Mapping[str, Any]) -> list[int]:
        """Take over the chunks that are whole; bytes used of each file. ValueError says why none can be used."""
        # A line that the kill cut off has no end; what the other files have beyond the last whole one is cut as well.
        lines = paths[2].read_bytes().split(b"\n")[:-1]
        if not lines or json.loads(lines[0]) != made_from:
            raise ValueError("it was made from other inputs")
        with paths[0].open("rb") as token_file, paths[1].open("rb") as document_file:
            for number, line in enumerate(lines[1:], start=1):
                facts = json.loads(line)
                chunk = np.frombuffer(token_file.read(4 * facts["tokens"]), dtype="<i4")
                documents = np.frombuffer(document_file.read(_DOCUMENT.itemsize * facts["documents"]), dtype=_DOCUMENT)
                if _digest(chunk, documents) != facts["sha256"] or documents["length"].sum() != len(chunk):
                    raise ValueError(f"chunk {number} of {len(lines) - 1} is damaged")
                self._lengths.frombytes(np.ascontiguousarray(documents["length"]).tobytes())
                self._keys.frombytes(np.ascontiguousarray(documents["key"]).tobytes())
                self._note_chunk(chunk, documents["length"])
                self.notes.append(facts["note"])
            return [token_file.tell(), document_file.tell(), sum(len(line) + 1 for line in lines)]


def split(stored: Tokens) -> tuple[Tokens, Tokens]:
    """(tokens, labels) of a part of DocumentSpool.stored, each of its shape."""
    tokens = stored ^ (stored >> 31)
    return tokens, np.where(stored < 0, tokens, np.int32(IGNORED))


def _digest(chunk: Tokens, documents: npt.NDArray[Any]) -> str:
    digest = hashlib.sha256(chunk.tobytes())
    digest.update(documents.tobytes())
    return digest.hexdigest()


def _lock_path(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")
