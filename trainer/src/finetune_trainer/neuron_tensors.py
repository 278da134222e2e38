"""A whole tensor out of the ranks' pieces: a few rows at a time, after its copies on other ranks were compared.

neuron_checkpoints.py makes them for the model, neuron_optimizer.py for the optimizer's moments and masters;
consolidation.py reads them as it reads its own checkpoints' tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from finetune_trainer.errors import UserError
from finetune_trainer.neuron_layout import Copy, Piece, PlannedTensor
from finetune_trainer.safetensors_stream import CHUNK_BYTES

Bytes = npt.NDArray[np.uint8]


class TensorSource(Protocol):
    """Where the ranks' tensors are read."""

    def tensor(self, piece: Piece) -> torch.Tensor:
        """The whole tensor that the piece is of."""

    def where(self, piece: Piece) -> str:
        """Its file, for messages."""

    def let_go(self) -> None:
        """What was read is not needed any more."""


@dataclass(frozen=True)
class NeuronTensor:
    """A whole tensor under Hugging Face's or peft's name, to be read like a checkpoints.StoredTensor.

    Where `apart` is a set, the name of a tensor whose copies differ goes there and the first copy is taken.
    """

    plan: PlannedTensor
    source: TensorSource
    apart: set[str] | None = None

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def dtype(self) -> str:
        return self.plan.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.plan.shape

    def chunks(self) -> Iterator[bytearray]:
        """The tensor's bytes in C order, in pieces of bounded size.

        UserError (DivergingCopies) names the ranks whose copies of it differ; CorruptArtifact a damaged file.
        """
        for copy in self.plan.copies:
            row = _first_difference(_piece_bytes(self.source, copy.first), _piece_bytes(self.source, copy.other))
            if row is not None and self.apart is None:
                raise self._diverging(copy, row)
            if row is not None and self.apart is not None:
                self.apart.add(self.name)
        if self.plan.axis == 0:
            for piece in self.plan.pieces:
                yield from _blocks([_piece_bytes(self.source, piece)])
        else:
            yield from _blocks([_piece_bytes(self.source, piece) for piece in self.plan.pieces])
        self.source.let_go()

    def _diverging(self, copy: Copy, row: int) -> UserError:
        first, other = copy.first, copy.other
        stages = f" of pipeline ranks {first.pp_rank} and {other.pp_rank}" if first.pp_rank != other.pp_rank else ""
        return UserError(
            "DivergingCopies",
            f"{self.name!r} is not the same on tensor parallel ranks {first.tp_rank} and {other.tp_rank}{stages} (row "
            f"{row} of their copies in {self.source.where(first)} and {self.source.where(other)}): the ranks trained "
            "apart and none of them has the model. The vendor's code does that to keys and values on trn2 where there "
            "are more tensor parallel ranks than KV heads, to norms and LoRA's A in bf16 without sequence parallelism, "
            "and to Qwen3's norms of queries and keys: train again without these",
        )


def _piece_bytes(source: TensorSource, piece: Piece) -> Bytes:
    """The piece as rows of bytes, which are rows of dimension 0 whichever dimension it is cut along."""
    tensor = source.tensor(piece)
    if not tensor.numel():
        return np.empty((0, 0), np.uint8)
    rows = tensor.shape[0] if tensor.dim() else 1
    whole: Bytes = tensor.contiguous().reshape(rows, -1).view(torch.uint8).numpy()
    if piece.axis == 0:
        return whole[piece.start : piece.start + piece.length]
    width = whole.shape[1] // tensor.shape[1]
    return whole[:, piece.start * width : (piece.start + piece.length) * width]


def _blocks(columns: Sequence[Bytes]) -> Iterator[bytearray]:
    """The rows of pieces that lie side by side, a few at a time."""
    rows, width = len(columns[0]), sum(part.shape[1] for part in columns)
    step = max(1, CHUNK_BYTES // max(1, width))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        block = bytearray(count * width)
        view = np.frombuffer(block, np.uint8).reshape(count, width)
        at = 0
        for part in columns:
            view[:, at : at + part.shape[1]] = part[start : start + count]
            at += part.shape[1]
        yield block


def _first_difference(one: Bytes, other: Bytes) -> int | None:
    """The first row in which two pieces that should hold the same values do not."""
    step = max(1, CHUNK_BYTES // max(1, one.shape[1]))
    for start in range(0, len(one), step):
        block, copy = one[start : start + step], other[start : start + step]
        if not np.array_equal(block, copy):
            return start + int(np.nonzero((block != copy).any(axis=1))[0][0])
    return None
