"""The small interface between the one training loop and the devices it runs on.

training.py drives a Backend and knows nothing of torch; each module of this package implements it for one family of
devices and is the only place that imports its vendor's library. Arrays that cross the interface are numpy's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from finetune_trainer.checkpoints import Checkpoint, LocalSlice
from finetune_trainer.throughput import ModelSize

IGNORED = -100
"""Target of a position that is not supervised."""

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward and backward pass, all (m, s).

    `targets[i, j]` is the token that position j of row i must predict, or IGNORED. `segment_ids` number the documents
    of a row from 1, 0 is padding; `position_ids` restart at each document.
    """

    input_ids: Tokens
    targets: Tokens
    position_ids: Tokens
    segment_ids: Tokens


@dataclass(frozen=True)
class ModelPlan:
    """What a backend builds: the base model of `folder` with an adapter, and its AdamW.

    `method` is spec.method; `precision` is bf16 or fp32; `seed` is the job's, from which the adapter starts.
    `keep_masks` is true where rows hold several documents, which then must not attend to each other.
    `trust_remote_code` lets Python code of the model's own folder run. `gradient_checkpointing` computes activations a
    second time in the backward pass instead of keeping them; it changes no result.
    """

    folder: Path
    method: Mapping[str, Any]
    precision: str
    weight_decay: float
    seed: int
    keep_masks: bool
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class ParameterFacts:
    """One trainable parameter: global shape, dtype by safetensors' name, whether weight decay applies."""

    shape: tuple[int, ...]
    dtype: str
    decays: bool


class Channel(Protocol):
    """Talk between the ranks. Both methods are collectives, and calls of one channel come from one thread."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`. All ranks."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in the order of ranks. All ranks."""


class Backend(Protocol):
    """One rank's devices, its part of the model, and its talk with the other ranks.

    Every method that says "all ranks" is a collective: every rank must call it in the same order. A peer that is gone
    raises RetryableError, memory that runs out HostOutOfMemory or DeviceOutOfMemory.
    """

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    model_size: ModelSize | None
    """Set by build(), as is peak_flops; None where it cannot be told."""
    peak_flops: float | None
    """What this rank's device can do at most, in operations a second at the plan's precision; None if not known."""
    writers: Channel
    """Of its own, for the thread that writes checkpoints while the main thread trains. After start()."""

    def start(self) -> None:
        """Join the process group. All ranks."""

    def stop(self) -> None:
        """Leave it, after the last collective. All ranks."""

    def build(self, plan: ModelPlan) -> None:
        """Load the base model, add the adapter, make the optimizer. All ranks end with equal parameters."""

    def parameters(self) -> dict[str, ParameterFacts]:
        """The trainable parameters by the name that checkpoints use, sorted."""

    def device_memory(self) -> int | None:
        """Bytes of the device's memory that this rank held at most; None on the host's."""

    def adapter_config(self, source: str) -> bytes | None:
        """adapter_config.json as peft writes it, `source` as its base model; None when there is no adapter."""

    def micro_step(self, batch: MicroBatch, scale: float, seed: int, *, last: bool) -> None:
        """Add the gradient of `scale` times the summed loss of `batch`; `seed` fixes its dropout.

        `last` is true for the last one before reduce(). All ranks, and each as often.
        """

    def reduce(self, extras: Sequence[float]) -> tuple[float, list[float]]:
        """Sum gradients, scaled loss and `extras` over all ranks since the last update. Returns loss and extras."""

    def update(self, learning_rate: float, max_gradient_norm: float) -> float:
        """Clip the summed gradient (0 means no clipping), step, clear. Returns its norm before clipping.

        A norm that is no finite number changes nothing: the caller must look at it.
        """

    def packing_error(self, batch: MicroBatch, document: int) -> tuple[float, float]:
        """How far document `document` of the first row of `batch` depends on its neighbours.

        Returns the largest difference of its logits in the row against alone, and against the same row with other
        tokens in the other documents, both relative to the largest logit.
        """

    def slices(self) -> list[LocalSlice]:
        """This rank's part of a checkpoint, copied to host memory: parameters, optimizer moments, random states.

        Training may go on while they are written, but they are valid only until the next call.
        """

    def load(self, checkpoint: Checkpoint) -> None:
        """Take parameters, moments and, where the world size is the same, random states from `checkpoint`."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`. All ranks."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in the order of ranks. All ranks."""
