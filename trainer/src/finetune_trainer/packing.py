"""Which documents share a row, which are held out, and in which order training reads the rows. Pure arithmetic.

prepare calls these; rows.py writes what they decide. All of it is the same on every machine and with every version of
numpy: nothing here draws from a library's random generator, and every sort is a stable one.

    bestFit   every document whole; as many in a row as fit, all documents taken together (best-fit decreasing)
    wrapped   the documents as one stream in their own order, cut where a row ends; only the last row is not full
    none      a document a row

Legend: N documents, R rows, P pieces. A piece is a document, or with `wrapped` the part of one that stands in one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

BEST_FIT = "bestFit"
WRAPPED = "wrapped"
NONE = "none"
PACKINGS = (BEST_FIT, WRAPPED, NONE)

_FEW = 1000
"""Documents of a small dataset, where one row more or less is a share that counts."""

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackedRows:
    """What stands in each row, from its first position on, as arrays.

    `starts` is (R + 1,): row r holds the pieces `starts[r]` to `starts[r + 1]`. `documents`, `begins`, `ends` are (P,):
    piece p is the tokens `begins[p]` to `ends[p]` of document `documents[p]`.
    """

    starts: Numbers
    documents: Numbers
    begins: Numbers
    ends: Numbers

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return int((self.ends - self.begins).sum())

    @property
    def cuts(self) -> int:
        """Places where a document goes on in another row."""
        return int(np.count_nonzero(self.begins))

    def row(self, number: int) -> list[tuple[int, int, int]]:
        """(document, begin, end) of every piece of one row, in its order."""
        pieces = slice(self.starts[number], self.starts[number + 1])
        arrays = (self.documents[pieces], self.begins[pieces], self.ends[pieces])
        return list(zip(*(array.tolist() for array in arrays), strict=True))


def pack_documents(
    packing: str, lengths: Sequence[int] | Numbers, row_length: int, numbers: Sequence[int] | Numbers | None = None
) -> PackedRows:
    """The rows of one of PACKINGS. `lengths` (N,) are in tokens; `numbers` (N,) name the documents, else 0 to N - 1.

    ValueError when a document is empty or, but with `wrapped`, has more than `row_length` tokens.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if packing not in PACKINGS:
        raise ValueError(f"packing is {packing!r}, expected one of {', '.join(PACKINGS)}")
    longest = sizes.max(initial=1) if packing == WRAPPED else row_length
    if len(sizes) and not 1 <= sizes.min() <= sizes.max() <= longest:
        raise ValueError(f"a document must have 1 to {longest} tokens, got {sizes.min()} to {sizes.max()}")
    if packing == WRAPPED:
        packed = _wrap(sizes, row_length)
    elif packing == BEST_FIT:
        packed = _whole(*_fewest_rows(sizes, row_length), sizes)
    else:
        packed = _whole(np.arange(len(sizes)), np.ones(len(sizes), dtype=np.int64), sizes)
    if numbers is None:
        return packed
    names = np.asarray(numbers, dtype=np.int64)
    return PackedRows(packed.starts, names[packed.documents], packed.begins, packed.ends)


def _whole(documents: Numbers, counts: Numbers, sizes: Numbers) -> PackedRows:
    """Rows of whole documents: `documents` row by row, `counts` of them in each row."""
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
    return PackedRows(starts, documents, np.zeros_like(documents), sizes[documents])


def _wrap(sizes: Numbers, row_length: int) -> PackedRows:
    """One stream of all documents, cut at every `row_length` tokens."""
    bounds = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
    total = int(bounds[-1])
    rows = -(-total // row_length)
    row_ends = np.arange(1, rows + 1, dtype=np.int64) * row_length
    begins = np.union1d(bounds[:-1], row_ends[:-1])  # in the stream, ascending
    ends = np.concatenate([begins[1:], np.array([total] if total else [], dtype=np.int64)])
    documents = np.searchsorted(bounds, begins, side="right") - 1
    starts = np.searchsorted(begins, np.arange(rows + 1, dtype=np.int64) * row_length)
    return PackedRows(starts, documents, begins - bounds[documents], ends - bounds[documents])


def _fewest_rows(sizes: Numbers, row_length: int) -> tuple[Numbers, Numbers]:
    """(documents row by row, documents of each row) of best fit, for few documents also of first fit if that is better.

    Best-fit decreasing is not the better of the two for every order of every handful of documents.
    """
    documents, counts = _best_fit(sizes, row_length)
    if len(sizes) <= _FEW and len(counts) * row_length - int(sizes.sum()) >= row_length:
        others, other_counts = _first_fit(sizes, row_length)
        if len(other_counts) < len(counts):
            return others, other_counts
    return documents, counts


def _best_fit(sizes: Numbers, row_length: int) -> tuple[Numbers, Numbers]:
    """Best-fit decreasing over all documents: the longest first, each into the fullest row that still has room for it.

    Documents of one length are dealt out together: all rows with the same room left get as many as go in. A bit a room
    in one integer finds the smallest room that is enough. So the work in Python is a few steps a length, whatever the
    number of documents; the rest is numpy's.
    """
    order = np.argsort(-sizes, kind="stable")
    row_of = np.empty(len(sizes), dtype=np.int64)  # of the documents in this order
    by_room: list[list[tuple[int, int]]] = [[] for _ in range(row_length + 1)]  # ranges of rows
    rooms = 0  # bit r is set where by_room[r] is not empty
    rows = done = 0
    counts = np.bincount(sizes, minlength=1)
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            enough = rooms >> length
            if enough:
                room = length + (enough & -enough).bit_length() - 1
                first, end = by_room[room].pop()
                if not by_room[room]:
                    rooms &= ~(1 << room)
            else:
                room, first = row_length, rows
                rows = end = first + -(-left // (row_length // length))
            each = room // length
            full = min(end - first, left // each)
            dealt = [(first, first + full, each)]
            if first + full < end and left - full * each:
                # the last ones of this length, too few to fill their row as the others are
                dealt.append((first + full, first + full + 1, left - full * each))
            for start, stop, some in dealt:
                if start < stop:
                    number = (stop - start) * some
                    row_of[done : done + number] = np.repeat(np.arange(start, stop), some)
                    done, left, first = done + number, left - number, stop
                    by_room[room - some * length].append((start, stop))
                    rooms |= 1 << (room - some * length)
            if first < end:
                by_room[room].append((first, end))
                rooms |= 1 << room
    return order[np.argsort(row_of, kind="stable")], np.bincount(row_of, minlength=rows)


def _first_fit(sizes: Numbers, row_length: int) -> tuple[Numbers, Numbers]:
    """First fit in the documents' own order: each into the first row that has room for it."""
    room: list[int] = []
    row_of = np.empty(len(sizes), dtype=np.int64)
    for number, length in enumerate(sizes.tolist()):
        row = next((row for row, left in enumerate(room) if left >= length), len(room))
        if row == len(room):
            room.append(row_length)
        room[row] -= length
        row_of[number] = row
    return np.argsort(row_of, kind="stable"), np.bincount(row_of, minlength=len(room))


def split_validation(keys: Sequence[int] | npt.NDArray[np.uint64], percent: float) -> tuple[Numbers, Numbers]:
    """(training, validation) document numbers, each ascending.

    `keys` are one 64-bit hash a document, of its text and the job's seed. The documents with the smallest keys are held
    out: at least `percent` of a hundred of them where that is above 0, whole groups of equal keys, so that no document
    of which a copy was trained on is held out.
    """
    values = np.asarray(keys, dtype=np.uint64)
    wanted = ceil(len(values) * Fraction(str(percent)) / 100)
    if wanted == 0:
        return np.arange(len(values), dtype=np.int64), np.zeros(0, dtype=np.int64)
    held_out = values <= np.sort(values, kind="stable")[wanted - 1]
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def count_steps(rows: int, global_batch_size: int, *, max_steps: int | None, epochs: float | None) -> int:
    """Optimizer steps of the whole job: `max_steps`, or the least number that reads every row `epochs` times.

    steps = ceil(rows * epochs / global_batch_size). The last step is always a whole batch: what it lacks is taken from
    the beginning of one more epoch.
    """
    if max_steps is not None:
        return max_steps
    return max(1, ceil(rows * Fraction(str(epochs)) / global_batch_size))


def iterate_order(rows: int, count: int, seed: int) -> Iterator[npt.NDArray[np.int32]]:
    """The first `count` row numbers in reading order, an array an epoch: each is another permutation of all rows."""
    epoch = 0
    while count > 0:
        order = _permutation(rows, seed, epoch)[:count]
        yield order
        count -= len(order)
        epoch += 1


def _permutation(rows: int, seed: int, epoch: int) -> npt.NDArray[np.int32]:
    keys = _splitmix64(np.arange(rows, dtype=np.uint64), seed=seed, stream=epoch)
    return np.argsort(keys, kind="stable").astype(np.int32)


def _splitmix64(values: npt.NDArray[np.uint64], *, seed: int, stream: int) -> npt.NDArray[np.uint64]:
    """The splitmix64 mixer over `values`, keyed twice: by the seed and by the stream."""
    keyed: Any = values
    with np.errstate(over="ignore"):
        for key in (seed, stream, 0):
            keyed = keyed + np.uint64((key * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) % 2**64)
            keyed = (keyed ^ (keyed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            keyed = (keyed ^ (keyed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            keyed = keyed ^ (keyed >> np.uint64(31))
    result: npt.NDArray[np.uint64] = keyed
    return result
