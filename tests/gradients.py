"""The gradient of a global batch as a backend makes it: what tests of the backends compare, on every device."""

from __future__ import annotations

import pytest
import torch

from finetune_trainer.backends.torch import TorchBackend
from finetune_trainer.batches import PreparedRows
from finetune_trainer.training import chunk_seed


def gradient(
    backend: TorchBackend, rows: PreparedRows, micro_batch_size: int, dp_size: int
) -> tuple[torch.Tensor, float]:
    """The summed gradient of step 0 and its loss when dp_size ranks share it; here one process plays all of them."""
    supervised = rows.counts(0).supervised
    chunks = [pair for dp_rank in range(dp_size) for pair in rows.micro_batches(0, micro_batch_size, dp_rank, dp_size)]
    for number, (chunk, batch) in enumerate(chunks, start=1):
        backend.micro_step(batch, 1.0 / supervised, chunk_seed(3, 0, chunk), last=number == len(chunks))
    loss, _ = backend.reduce([0.0])
    strategy = backend._strategy
    gradients = [parameter.grad for parameter in backend._named.values() if parameter.grad is not None]
    summed = torch.cat([strategy.local(entry).flatten().clone() for entry in gradients])
    assert float(summed.norm()) == pytest.approx(strategy.gradient_norm(), rel=1e-5)
    strategy.clear()
    return summed, loss


def assert_same_gradient(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-6 of its length, as a whole."""
    assert float((found - expected).norm() / expected.norm()) <= 1e-6
