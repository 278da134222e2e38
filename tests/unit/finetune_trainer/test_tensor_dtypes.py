"""Conversion and rounding, bit for bit as torch does them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from finetune_trainer.tensor_dtypes import encode, round_in_place, rounding_step, to_float32

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def every_bfloat16_neighbourhood() -> torch.Tensor:
    """Each bfloat16, and the float32 values at, just below and just above the middle to its neighbour."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = (high[:, None] + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)).reshape(-1)
    values = torch.from_numpy(bits.view(np.float32))
    return values[torch.isfinite(values)]


@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_rounding_is_to_nearest_even_as_in_torch(dtype: str) -> None:
    values = every_bfloat16_neighbourhood()
    rounded = values.clone().numpy()
    round_in_place(rounded, dtype)
    assert bytes(encode(rounded, dtype)) == as_bytes(values.to(TORCH[dtype]))


@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_bytes_become_float32_and_back(dtype: str) -> None:
    values = torch.randn(6, 5).to(TORCH[dtype])
    widened = to_float32(as_bytes(values), dtype, (6, 5))
    assert torch.equal(torch.from_numpy(widened), values.float())
    assert bytes(encode(widened, dtype)) == as_bytes(values)


@pytest.mark.parametrize(("dtype", "step"), [("BF16", 2.0**-7), ("F16", 2.0**-10), ("F32", 2.0**-23)])
def test_the_rounding_step_at_one(dtype: str, step: float) -> None:
    assert rounding_step(np.array([1.0, 1.5, 2.0]), dtype).tolist() == [step, step, 2 * step]
