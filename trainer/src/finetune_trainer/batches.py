"""Reads prepare's rows: which rows a step takes, how the global batch is cut into micro batches, what is supervised.

The training loop calls it. prepare has decided everything about the data; nothing is shuffled, padded or tokenised
here. A global batch is cut into equal chunks of rows; chunk number `accumulation * dp_size + dp_rank` is one micro
batch, so every split of a global batch into ranks and accumulation steps has the same chunks.

Legend: R rows, S positions a row, G global batch, m rows of a micro batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune_trainer.backends import IGNORED, MicroBatch, Tokens
from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.safetensors_stream import read_header

ROWS_NAME = "rows.safetensors"
VALIDATION_NAME = "validation.safetensors"
ORDER_NAME = "order.safetensors"
DATA_NAME = "data.json"

_LENGTH_MULTIPLE = 8
"""Rows are cut after their last token, at a multiple of this many positions: few distinct shapes, little padding."""
_SCAN_ROWS = 1024
_TELLING_TOKENS = 8


class Counts(NamedTuple):
    """Supervised tokens, tokens without padding, and the sum over documents of len^2, which is what they attend to."""

    supervised: int
    tokens: int
    attended: int


@dataclass(frozen=True)
class PreparedRows:
    """The rows of a prepare artifact, mapped from their files and read where they are used. Arrays are (R, S)."""

    input_ids: Tokens
    labels: Tokens
    position_ids: Tokens
    segment_ids: Tokens
    order: Tokens
    max_steps: int
    global_batch_size: int

    def rows_of(self, step: int) -> Tokens:
        """Row numbers (G,) that `step` (from 0) reads."""
        start = step * self.global_batch_size
        return self.order[start : start + self.global_batch_size]

    def counts(self, step: int) -> Counts:
        """What the whole global batch of `step` holds."""
        rows = self.rows_of(step)
        real = self.segment_ids[rows] != 0
        # positions restart at each document: the sum of 2 p + 1 over 0 to len - 1 is len^2
        attended = int((2 * self.position_ids[rows][real].astype(np.int64) + 1).sum())
        return Counts(int((self._targets(rows) != IGNORED).sum()), int(real.sum()), attended)

    def supervised_in_all(self) -> int:
        """Supervised tokens of all rows."""
        return int((self._targets(np.arange(self.input_ids.shape[0], dtype=np.int32)) != IGNORED).sum())

    def micro_batches(
        self, step: int, micro_batch_size: int, dp_rank: int, dp_size: int, *, whole: bool = False
    ) -> Iterator[tuple[int, MicroBatch]]:
        """(number of the chunk, its rows) for each accumulation step of data parallel rank `dp_rank`."""
        rows = self.rows_of(step)
        for chunk in range(dp_rank, self.global_batch_size // micro_batch_size, dp_size):
            yield chunk, self.batch(rows[chunk * micro_batch_size : (chunk + 1) * micro_batch_size], whole=whole)

    def batch(self, rows: Tokens, *, whole: bool = False) -> MicroBatch:
        """The rows (m,) as a micro batch, cut after the longest row's last token unless they are to be `whole`."""
        length = self.input_ids.shape[1]
        if not whole:
            used = (self.segment_ids[rows] != 0).any(axis=0).nonzero()[0]
            last = int(used[-1]) + 1 if len(used) else 1
            length = min(-(-last // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, length)
        return MicroBatch(
            input_ids=np.ascontiguousarray(self.input_ids[rows, :length]),
            targets=np.ascontiguousarray(self._targets(rows)[:, :length]),
            position_ids=np.ascontiguousarray(self.position_ids[rows, :length]),
            segment_ids=np.ascontiguousarray(self.segment_ids[rows, :length]),
        )

    def first_packed_row(self) -> int | None:
        """The first row that holds more than one document; None when no row does.

        Where there is one, it is a row whose first two documents have tokens enough to show that they see each other.
        """
        first = None
        for start in range(0, self.segment_ids.shape[0], _SCAN_ROWS):
            segments = self.segment_ids[start : start + _SCAN_ROWS]
            telling = ((segments == 1).sum(axis=1) >= _TELLING_TOKENS) & (
                (segments == 2).sum(axis=1) >= _TELLING_TOKENS
            )
            if telling.any():
                return start + int(telling.argmax())
            packed = (segments > 1).any(axis=1)
            if first is None and packed.any():
                first = start + int(packed.argmax())
        return first

    def _targets(self, rows: Tokens) -> Tokens:
        """Position j must predict the label of j + 1, if that is supervised and belongs to the same document."""
        labels, segments = self.labels[rows], self.segment_ids[rows]
        targets = np.full_like(labels, IGNORED)
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
        targets[:, :-1] = np.where(same, labels[:, 1:], IGNORED)
        return targets


def read_data(folder: Path) -> dict[str, Any]:
    """data.json of the prepare artifact in `folder`: what there is to know of the data besides the rows."""
    data: dict[str, Any] = json.loads((folder / DATA_NAME).read_bytes())
    return data


def open_rows(folder: Path, global_batch_size: int) -> PreparedRows:
    """The rows of the prepare artifact in `folder`; CorruptArtifact when files or shapes do not fit together."""
    arrays = _open_arrays(folder / ROWS_NAME)
    order = _map(folder / ORDER_NAME, "order")
    max_steps = read_data(folder)["maxSteps"]
    if order.shape != (max_steps * global_batch_size,):
        raise UserError(
            "BatchArithmetic",
            f"prepare ordered {order.shape[0]} rows for {max_steps} steps, and globalBatchSize {global_batch_size} "
            f"needs {max_steps * global_batch_size}: prepare and train must have the same batch sizes",
        )
    rows = arrays["input_ids"].shape[0]
    if len(order) and not (int(order.min()) >= 0 and int(order.max()) < rows):
        raise CorruptArtifact(f"{folder / ORDER_NAME} names rows {order.min()} to {order.max()}, there are {rows}")
    return PreparedRows(order=order, max_steps=max_steps, global_batch_size=global_batch_size, **arrays)


def open_validation_rows(folder: Path) -> PreparedRows:
    """The held-out rows of the prepare artifact in `folder`, maybe none; they have no order and no steps."""
    arrays = _open_arrays(folder / VALIDATION_NAME)
    return PreparedRows(order=np.zeros(0, dtype=np.int32), max_steps=0, global_batch_size=0, **arrays)


def held_out_batches(
    rows: PreparedRows, micro_batch_size: int, dp_rank: int, dp_size: int, *, whole: bool = False
) -> Iterator[MicroBatch]:
    """The share of all `rows` that data parallel rank `dp_rank` measures: of every rank as many, all of one size.

    Where rows run out a row comes again without a target, so that it counts for nothing.
    """
    count = rows.input_ids.shape[0]
    rounds = -(-count // (micro_batch_size * dp_size))
    for chunk in range(dp_rank, rounds * dp_size, dp_size):
        numbers = np.arange(chunk * micro_batch_size, (chunk + 1) * micro_batch_size, dtype=np.int32)
        batch = rows.batch(np.minimum(numbers, count - 1), whole=whole)
        batch.targets[numbers >= count] = IGNORED
        yield batch


def _open_arrays(path: Path) -> dict[str, Tokens]:
    arrays = {name: _map(path, name) for name in ("input_ids", "labels", "position_ids", "segment_ids")}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) != 1 or len(shapes["input_ids"]) != 2:
        raise CorruptArtifact(f"{path}: the arrays must have one shape (rows, positions), they have {shapes}")
    return arrays


def _map(path: Path, name: str) -> Tokens:
    header = read_header(path)
    info = header.tensor(name)
    if info.dtype != "I32":
        raise CorruptArtifact(f"{path}: {name!r} has dtype {info.dtype}, expected I32")
    if not info.elements:
        return np.zeros(info.shape, dtype=np.int32)
    return np.memmap(path, dtype="<i4", mode="r", offset=info.start, shape=info.shape)
