"""The files of prepare's artifact that hold tokens: rows.safetensors, validation.safetensors, order.safetensors.

Documents are spooled to a temporary file while they are tokenised and written out row by row, so memory does not grow
with the dataset beyond a few numbers a document. train and evaluate read the files by the names and dtypes given here.

    rows, validation   input_ids, labels, position_ids, segment_ids: int32 (rows, row_length)
                       labels: IGNORED where nothing is learnt, else the token itself (the loss shifts by one)
                       segment_ids: 0 for padding, else the document's number in its row, from 1
                       position_ids: restart at 0 with each document, 0 for padding
    order              order: int32 (max_steps * global_batch_size,), row numbers in the order training reads them
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from finetune_trainer.artifacts import ArtifactWriter
from finetune_trainer.safetensors_stream import SafetensorsWriter, TensorPlan

ROWS_FILE = "rows.safetensors"
VALIDATION_FILE = "validation.safetensors"
ORDER_FILE = "order.safetensors"
IGNORED = -100

_INT32 = "I32"
_ROWS_AT_ONCE = 256

Tokens = npt.NDArray[np.int32]
_Fill = Callable[[int, int], "Tokens | int | range"]


class DocumentSpool:
    """Documents in a temporary file under `folder`, which has no name and goes with the process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by close()
        self._offsets = array("q", [0])
        self._learnt = array("i")
        self._learnt_offsets = array("q", [0])
        self._tokens: Tokens | None = None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def add(self, tokens: Sequence[int], learnt: Iterable[tuple[int, int]]) -> None:
        """Append a document. `learnt` are the ranges (first, end) of the tokens that are labels, ascending, from 1 on.

        The first token of a document is never a label: in a packed row it would be learnt from the document before.
        """
        self._file.write(np.asarray(tokens, dtype="<i4").tobytes())
        self._offsets.append(self._offsets[-1] + len(tokens))
        for first, end in learnt:
            self._learnt.extend((first, end))
        self._learnt_offsets.append(len(self._learnt))

    def length(self, number: int) -> int:
        return self._offsets[number + 1] - self._offsets[number]

    def learnt(self, number: int) -> list[tuple[int, int]]:
        """The ranges of the document's tokens that are labels, as add() got them."""
        numbers = self._learnt[self._learnt_offsets[number] : self._learnt_offsets[number + 1]]
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def supervised(self, number: int) -> int:
        """Tokens of the document that are learnt."""
        return sum(end - first for first, end in self.learnt(number))

    def tokens(self, number: int) -> Tokens:
        """(length,) int32. After the first call nothing can be added."""
        if self._tokens is None:
            self._file.flush()
            empty = self._offsets[-1] == 0
            self._tokens = np.empty(0, "<i4") if empty else np.memmap(self._file, dtype="<i4", mode="r")
        return self._tokens[self._offsets[number] : self._offsets[number + 1]]

    def labels(self, number: int) -> Tokens:
        """(length,) int32: the token itself where it is learnt, IGNORED elsewhere."""
        tokens = self.tokens(number)
        values = np.full(len(tokens), IGNORED, dtype="<i4")
        for first, end in self.learnt(number):
            values[first:end] = tokens[first:end]
        return values

    def largest_token(self) -> int:
        return max((int(self.tokens(number).max()) for number in range(len(self))), default=0)

    def close(self) -> None:
        self._tokens = None
        self._file.close()


def write_rows(
    writer: ArtifactWriter, name: str, spool: DocumentSpool, rows: Sequence[Sequence[int]], *, row_length: int, pad: int
) -> None:
    """Write `rows` (lists of document numbers of `spool`) as the file `name` of the artifact."""
    fills: dict[str, tuple[int, _Fill]] = {
        "input_ids": (pad, lambda number, _position: spool.tokens(number)),
        "labels": (IGNORED, lambda number, _position: spool.labels(number)),
        "position_ids": (0, lambda number, _position: range(spool.length(number))),
        "segment_ids": (0, lambda _number, position: position + 1),
    }
    _write(
        writer,
        name,
        [TensorPlan(key, _INT32, (len(rows), row_length)) for key in fills],
        {key: _row_bytes(spool, rows, row_length, padding, fill) for key, (padding, fill) in fills.items()},
    )


def write_order(writer: ArtifactWriter, order: Iterable[Tokens], count: int) -> None:
    """Write the arrays of `order`, together `count` numbers, as ORDER_FILE."""
    chunks = (part.astype("<i4").tobytes() for part in order)
    _write(writer, ORDER_FILE, [TensorPlan("order", _INT32, (count,))], {"order": chunks})


def _write(writer: ArtifactWriter, name: str, plan: list[TensorPlan], contents: dict[str, Iterator[bytes]]) -> None:
    with SafetensorsWriter(writer.folder / name, plan, {}) as file:
        for key, chunks in contents.items():
            file.write(key, chunks)
    writer.record(name, file.size, file.sha256)


def _row_bytes(
    spool: DocumentSpool, rows: Sequence[Sequence[int]], row_length: int, padding: int, fill: _Fill
) -> Iterator[bytes]:
    """One tensor of a rows file in pieces of some rows: `padding` where no document is."""
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[start : start + _ROWS_AT_ONCE]
        values = np.full((len(some), row_length), padding, dtype="<i4")  # (rows, row_length)
        for row, numbers in zip(values, some, strict=True):
            begin = 0
            for position, number in enumerate(numbers):
                end = begin + spool.length(number)
                row[begin:end] = fill(number, position)
                begin = end
        yield values.tobytes()
