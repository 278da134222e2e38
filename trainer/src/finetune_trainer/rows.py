"""The files of prepare's artifact that hold tokens: rows.safetensors, validation.safetensors, order.safetensors.

Rows are gathered from the spool some at a time, so memory does not grow with the dataset beyond a few numbers a
document. train and evaluate read the files by the names and dtypes given here.

    rows, validation   input_ids, labels, position_ids, segment_ids: int32 (rows, row_length)
                       labels: IGNORED where nothing is learnt, else the token itself (the loss shifts by one)
                       segment_ids: 0 for padding, else the piece's number in its row, from 1
                       position_ids: restart at 0 with each piece, 0 for padding
    order              order: int32 (max_steps * global_batch_size,), row numbers in the order training reads them

A piece is a document, or the part of one that stands in this row (packing.PackedRows). The first token of a piece has
no predecessor in its row to be predicted from, so it is never a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.artifacts import ArtifactWriter
from finetune_trainer.packing import Numbers, PackedRows
from finetune_trainer.safetensors_stream import SafetensorsWriter, TensorPlan
from finetune_trainer.spool import IGNORED, DocumentSpool, Tokens, split

ROWS_FILE = "rows.safetensors"
VALIDATION_FILE = "validation.safetensors"
ORDER_FILE = "order.safetensors"

_INT32 = "I32"
_POSITIONS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class _Block:
    """Some rows one after the other: t tokens, p pieces. `filled` is (rows, row_length), true where a token stands.

    Of each piece: `sizes`, `starts` (its first of the t tokens), `sources` (its first in the spool's `stored`) and
    `numbers` (from 1 in its row), all (p,).
    """

    filled: npt.NDArray[np.bool_]
    sizes: Numbers
    starts: Numbers
    sources: Numbers
    numbers: Numbers

    def stored(self, spool: DocumentSpool) -> Tokens:
        """(t,) of the spool."""
        stored: Tokens = spool.stored[self._spread(self.sources - self.starts) + np.arange(self.sizes.sum())]
        return stored

    def tokens(self, spool: DocumentSpool) -> Tokens:
        return split(self.stored(spool))[0]

    def labels(self, spool: DocumentSpool) -> Tokens:
        labels = split(self.stored(spool))[1]
        labels[self.starts] = IGNORED
        return labels

    def positions(self, _spool: DocumentSpool) -> Numbers:
        return np.arange(self.sizes.sum()) - self._spread(self.starts)

    def segments(self, _spool: DocumentSpool) -> Numbers:
        return self._spread(self.numbers)

    def _spread(self, values: Numbers) -> Numbers:
        return np.repeat(values, self.sizes)


TENSORS: dict[str, Callable[[_Block, DocumentSpool], npt.NDArray[Any]]] = {
    "input_ids": _Block.tokens,
    "labels": _Block.labels,
    "position_ids": _Block.positions,
    "segment_ids": _Block.segments,
}


def write_rows(
    writer: ArtifactWriter, name: str, spool: DocumentSpool, rows: PackedRows, *, row_length: int, pad: int
) -> None:
    """Write `rows` of documents of `spool` as the file `name` of the artifact."""
    chunks = {key: gather_rows(key, spool, rows, row_length=row_length, pad=pad) for key in TENSORS}
    _write(
        writer,
        name,
        [TensorPlan(key, _INT32, (len(rows), row_length)) for key in TENSORS],
        {key: (values.data.cast("B") for values in some) for key, some in chunks.items()},
    )


def gather_rows(
    name: str, spool: DocumentSpool, rows: PackedRows, *, row_length: int, pad: int
) -> Iterator[npt.NDArray[np.int32]]:
    """The tensor `name`, one of TENSORS, some rows at a time: arrays of (some, row_length) in the order of rows."""
    padding = {"input_ids": pad, "labels": IGNORED}.get(name, 0)
    for block in _blocks(spool, rows, row_length):
        values = np.full(block.filled.shape, padding, dtype="<i4")
        values[block.filled] = TENSORS[name](block, spool)
        yield values


def count_supervised(spool: DocumentSpool, rows: PackedRows, row_length: int) -> Numbers:
    """(rows,) how many tokens of each row are labels."""
    counts = [np.zeros(0, dtype=np.int64)]
    for block in _blocks(spool, rows, row_length):
        learnt = np.zeros(block.filled.shape, dtype=np.bool_)
        learnt[block.filled] = block.labels(spool) != IGNORED
        counts.append(learnt.sum(axis=1))
    return np.concatenate(counts)


def write_order(writer: ArtifactWriter, order: Iterable[Tokens], count: int) -> None:
    """Write the arrays of `order`, together `count` numbers, as ORDER_FILE."""
    chunks = (part.astype("<i4").tobytes() for part in order)
    _write(writer, ORDER_FILE, [TensorPlan("order", _INT32, (count,))], {"order": chunks})


def _write(
    writer: ArtifactWriter, name: str, plan: list[TensorPlan], contents: dict[str, Iterator[bytes | memoryview]]
) -> None:
    with SafetensorsWriter(writer.folder / name, plan, {}) as file:
        for key, chunks in contents.items():
            file.write(key, chunks)
    writer.record(name, file.size, file.sha256)


def _blocks(spool: DocumentSpool, rows: PackedRows, row_length: int) -> Iterator[_Block]:
    at_once = max(1, _POSITIONS_AT_ONCE // row_length)
    for start in range(0, len(rows), at_once):
        bounds = rows.starts[start : start + at_once + 1]  # of pieces
        pieces = slice(int(bounds[0]), int(bounds[-1]))
        begins = rows.begins[pieces]
        sizes = rows.ends[pieces] - begins
        ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
        used = ends[bounds[1:] - bounds[0]] - ends[bounds[:-1] - bounds[0]]  # tokens of each row
        yield _Block(
            filled=np.arange(row_length) < used[:, None],
            sizes=sizes,
            starts=ends[:-1],
            sources=spool.offsets[rows.documents[pieces]] + begins,
            numbers=np.arange(1, len(sizes) + 1) - np.repeat(bounds[:-1] - bounds[0], np.diff(bounds)),
        )
