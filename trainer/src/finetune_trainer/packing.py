"""Which documents share a row, which are held out, and in which order training reads the rows. Pure arithmetic.

prepare calls these; rows.py writes what they decide. All of it is the same on every machine and with every version of
numpy: nothing here draws from a library's random generator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

BEST_FIT = "bestFit"
NONE = "none"
PACKINGS = (BEST_FIT, NONE)


def pack_documents(packing: str, lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows as lists of document numbers. `lengths` are in tokens, each between 1 and `row_length` (else ValueError)."""
    if any(not 1 <= length <= row_length for length in lengths):
        raise ValueError(f"a document must have 1 to {row_length} tokens")
    return _best_fit(lengths, row_length) if packing == BEST_FIT else [[number] for number in range(len(lengths))]


def _best_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Best-fit decreasing over all documents: the longest first, each into the fullest row that still has room for it.

    Rows are kept by the room they have left. One bit a room in an integer finds the smallest room that is enough, so
    that a document costs a few machine operations whatever the number of rows.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0  # bit r is set where by_room[r] is not empty
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[number]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(number)
        left = room - length
        by_room[left].append(row)
        rooms |= 1 << left
    return rows


def split_validation(keys: Sequence[int], percent: float) -> tuple[list[int], list[int]]:
    """(training, validation) document numbers, each ascending.

    `keys` are one 64-bit hash a document, of its text and the job's seed. The documents with the smallest keys are held
    out: at least `percent` of a hundred of them where that is above 0, whole groups of equal keys, so that no document
    of which a copy was trained on is held out.
    """
    wanted = ceil(len(keys) * Fraction(str(percent)) / 100)
    if wanted == 0:
        return list(range(len(keys))), []
    limit = sorted(keys)[wanted - 1]
    held_out = [number for number, key in enumerate(keys) if key <= limit]
    training = [number for number, key in enumerate(keys) if key > limit]
    return training, held_out


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
