"""Turns the bytes of a tensor into float32 and back, for bfloat16 too, which numpy does not know.

Merging calls this on blocks that fit a cache. Rounding is to nearest, ties to even, once, like every framework's.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]
RawBytes: TypeAlias = "bytes | bytearray | memoryview[int]"

FLOAT_DTYPES = ("BF16", "F16", "F32")
"""Dtypes (safetensors' names) that a delta can be added to. Quantised and 8-bit weights need their own rule."""

_CARRIERS: dict[str, Any] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
_SIGNIFICANT_BITS = {"BF16": 8, "F16": 11, "F32": 24}
"""Bits of a significand, the hidden one included."""
_SMALLEST_STEP = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149}


def to_float32(data: RawBytes, dtype: str, shape: tuple[int, ...]) -> Floats:
    """A new float32 array of `shape` with the values of `data`, elements of `dtype`."""
    carrier = np.frombuffer(data, dtype=_CARRIERS[dtype]).reshape(shape)
    if dtype == "BF16":
        widened = carrier.astype(np.uint32)
        np.left_shift(widened, 16, out=widened)
        return widened.view(np.float32)
    return carrier.astype(np.float32)


def round_in_place(values: Floats, dtype: str) -> None:
    """Round each of `values` (contiguous) to the nearest number of `dtype`, ties to even.

    What is beyond the range of `dtype` becomes an infinity; a NaN may become anything. Callers look for both.
    """
    if dtype == "BF16":
        bits = values.reshape(-1).view(np.uint32)
        # Adding half a step less one, and one more where the last kept bit is odd, carries exactly when it should.
        carry = np.right_shift(bits, 16)
        np.bitwise_and(carry, 1, out=carry)
        np.add(carry, 0x7FFF, out=carry)
        np.add(bits, carry, out=bits)
        np.bitwise_and(bits, 0xFFFF0000, out=bits)
    elif dtype == "F16":
        with np.errstate(over="ignore"):
            values[...] = values.astype(np.float16)


def encode(values: Floats, dtype: str) -> memoryview:
    """The bytes of `values` (contiguous), numbers that `dtype` holds exactly, as elements of it."""
    flat = values.reshape(-1)
    if dtype == "BF16":
        return np.right_shift(flat.view(np.uint32), 16).astype("<u2").data.cast("B")
    return flat.astype(_CARRIERS[dtype], copy=False).data.cast("B")


def rounding_step(magnitude: npt.NDArray[np.float64], dtype: str) -> npt.NDArray[np.float64]:
    """The distance between neighbouring numbers of `dtype` at each magnitude (absolute values)."""
    _, exponent = np.frexp(magnitude)
    return np.maximum(np.ldexp(1.0, exponent - _SIGNIFICANT_BITS[dtype]), _SMALLEST_STEP[dtype])
