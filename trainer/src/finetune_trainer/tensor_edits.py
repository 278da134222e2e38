"""What a merge computes for one tensor: rows of the base's bytes in, rows of the merged tensor's bytes out.

merging.py makes an Edit for each tensor that changes value or dtype, shard_rewriting.py applies it block by block from
several threads. Sums are made in float32 and rounded once, to the dtype that is written. Nothing here reads or writes a
file but through the function that returns stored rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from finetune_trainer.safetensors_stream import ITEM_BYTES, TensorInfo
from finetune_trainer.tensor_dtypes import Floats, RawBytes, encode, round_in_place, to_float32

_CACHE_ELEMENTS = 1 << 15
"""Elements that are added at once: their float32 copies stay in a core's own cache."""

StoredRows = Callable[[int, int], Floats]
"""(first row, last row exclusive) -> float32 (rows, columns) of the values that replace the base's."""


@dataclass
class Change:
    """What an edit did: elements whose value changed, sum of squares of what was added, largest |new - old|.

    `max_difference` is infinite or NaN where a value cannot be held by the dtype that is written.
    """

    changed: int = 0
    delta_squares: float = 0.0
    max_difference: float = 0.0

    def add(self, other: Change) -> None:
        self.changed += other.changed
        self.delta_squares += other.delta_squares
        # max() would drop a NaN that comes second.
        self.max_difference = float(np.maximum(self.max_difference, other.max_difference))


@dataclass(frozen=True)
class Product:
    """scale * left @ right, with left (rows, rank) and right (rank, columns)."""

    left: Floats
    right: Floats
    scale: float

    def rows(self, first: int, last: int) -> Floats:
        delta: Floats = self.left[first:last] @ self.right
        delta *= np.float32(self.scale)
        return delta


@dataclass(frozen=True)
class Edit:
    """How `tensor` of the base becomes the tensor `name` of `dtype`, in this order: replace, add, scale, round.

    `stored` replaces the base's values, `product` is added to a matrix and `addend` (one value a row) to a vector.
    DoRA: with `magnitude` (one value a row) each row is then brought to that length; with `column_factor` (one value a
    column, made by column_factor) each column is multiplied. A tensor is seen as a matrix of shape[0] rows, a vector
    has one column.
    """

    name: str
    tensor: TensorInfo
    dtype: str
    stored: StoredRows | None = None
    product: Product | None = None
    addend: Floats | None = None
    magnitude: Floats | None = None
    column_factor: Floats | None = None
    rows: int = field(init=False)
    columns: int = field(init=False)

    def __post_init__(self) -> None:
        rows = self.tensor.shape[0] if self.tensor.shape else 1
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "columns", self.tensor.elements // rows if rows else 0)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the base's tensor."""
        return self.columns * ITEM_BYTES[self.tensor.dtype]

    @property
    def written_row_bytes(self) -> int:
        """Bytes of a row that is written."""
        return self.columns * ITEM_BYTES[self.dtype]

    @property
    def changes_values(self) -> bool:
        """False where the dtype alone changes."""
        return any(part is not None for part in (self.stored, self.product, self.addend))

    def apply(self, old: RawBytes, first_row: int, new: memoryview) -> Change:
        """Write the rows that follow from `old` (whole rows of the base, from `first_row` on) into `new`."""
        view = memoryview(old)
        rows = len(view) // self.row_bytes
        step = max(1, _CACHE_ELEMENTS // self.columns)
        change = Change()
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            here = view[begin * self.row_bytes : end * self.row_bytes]
            before = to_float32(here, self.tensor.dtype, (end - begin, self.columns))
            after, squares = self.compute(before, first_row + begin)
            new[begin * self.written_row_bytes : end * self.written_row_bytes] = self._round(after)
            change.add(self._compare(before, after, squares))
        return change

    def compute(self, before: Floats, first_row: int) -> tuple[Floats, float]:
        """The exact values of the rows from `first_row` on, in float32 as a new array, and the squares of the delta."""
        last_row = first_row + len(before)
        stored = None if self.stored is None else self.stored(first_row, last_row)
        squares = 0.0
        if self.product is not None:
            delta = self.product.rows(first_row, last_row)
            squares = float(np.vdot(delta, delta))
            after = np.add(before if stored is None else stored, delta, out=delta)
        else:
            after = before.copy() if stored is None else stored
        if self.addend is not None:
            after += self.addend[first_row:last_row, None]
        if self.magnitude is not None:
            # Lengths in float64: they scale every value of a row.
            lengths = np.sqrt(np.square(after).sum(axis=1, dtype=np.float64))
            with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros: the caller looks for NaN
                factors = (self.magnitude[first_row:last_row] / lengths).astype(np.float32)
                after *= factors[:, None]
        if self.column_factor is not None:
            after *= self.column_factor
        others = (self.stored, self.addend, self.magnitude, self.column_factor)
        plain = all(part is None for part in others)
        if self.changes_values and not plain:
            added = after - before
            squares = float(np.vdot(added, added))
        return after, squares

    def _round(self, after: Floats) -> memoryview:
        round_in_place(after, self.dtype)
        return encode(after, self.dtype)

    def _compare(self, before: Floats, after: Floats, squares: float) -> Change:
        if not self.changes_values:
            lost = np.isfinite(before) & ~np.isfinite(after)
            return Change(0, 0.0, float("inf") if lost.any() else 0.0)
        # Counting booleans is eight times faster than counting floats.
        changed = int(np.count_nonzero(after != before))
        difference = np.subtract(after, before, out=before)
        largest = float(np.maximum(difference.max(), -difference.min()))
        return Change(changed, squares, largest)


def column_factor(magnitude: Floats, edit: Edit, rows_of_base: Callable[[int, int], Floats], block_rows: int) -> Floats:
    """magnitude / length of each column of what `edit` computes without it: DoRA of a weight stored transposed.

    Takes a pass of its own over the base, `block_rows` at a time, since a column's length needs every row.
    """
    squares: npt.NDArray[np.float64] = np.zeros(edit.columns, dtype=np.float64)
    for first in range(0, edit.rows, block_rows):
        values, _ = edit.compute(rows_of_base(first, min(first + block_rows, edit.rows)), first)
        squares += np.square(values).sum(axis=0, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor: Floats = (magnitude / np.sqrt(squares)).astype(np.float32)
    return factor
