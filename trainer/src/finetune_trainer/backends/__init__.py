"""The small interface between the one training loop and the devices it runs on.

training.py drives a Backend and knows nothing of torch; each module of this package implements it for one family of
devices and is the only place that imports its vendor's library. open_backend chooses the module. Arrays that cross the
interface are numpy's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from finetune_trainer.artifacts import FileEntry
from finetune_trainer.checkpoints import Checkpoint
from finetune_trainer.errors import StageError
from finetune_trainer.throughput import ModelSize

IGNORED = -100
"""Target of a position that is not supervised."""

ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8
"""Of AdamW, in every backend."""

NEURON = "neuron"
"""The accelerator whose backend is backends/neuron.py; all others are backends/torch.py's."""

Tokens = npt.NDArray[np.int32]

Number = Any
"""A float; of a backend that reads late what stands for one until Backend.read()."""


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
class Placement:
    """What there is to know of the ranks before a model is loaded: spec.accelerator and spec.parallelism.

    `accelerator` is cpu, cuda or neuron. `instance_type`, such as ml.trn1.32xlarge, is set for neuron. World size =
    tensor parallel size x pipeline parallel size x data parallel size.
    """

    accelerator: str
    strategy: str = "ddp"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    instance_type: str | None = None


@dataclass(frozen=True)
class ModelPlan:
    """What a backend builds: the base model of `folder` with an adapter, and its AdamW.

    `method` is spec.method; `precision` is bf16 or fp32; `seed` is the job's, from which the adapter starts.
    `keep_masks` is true where rows hold several documents, which then must not attend to each other. `packing` is
    spec.dataset.packing, `row_length` that of every row. `trust_remote_code` lets Python code of the model's own folder
    run. `gradient_checkpointing` computes activations a second time in the backward pass instead of keeping them; it
    changes no result. `micro_batch_size` is in rows, `micro_steps` are those of a rank in an optimizer step and
    `max_gradient_norm` is what update() will be called with, for libraries that must know them beforehand.
    """

    folder: Path
    method: Mapping[str, Any]
    precision: str
    weight_decay: float
    seed: int
    keep_masks: bool
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    packing: str = "none"
    row_length: int = 0
    micro_batch_size: int = 1
    micro_steps: int = 1
    max_gradient_norm: float = 0.0


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


class Snapshot(Protocol):
    """One rank's part of a checkpoint, at the moment it was taken."""

    @property
    def extra(self) -> Mapping[str, Any]:
        """Fields of state.json beside the loop's own: "format" and what else that format must say of itself."""

    def write(self, folder: Path, step: int) -> list[FileEntry]:
        """Write this rank's files into `folder`, durable and read back; their entries, paths below `folder`.

        All ranks, and of all together each file once. CorruptArtifact when what was read back is not what was written.
        """


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
    whole_rows: bool
    """Whether every row must come at its full length, since another shape is another compiled program."""
    reads_late: bool
    """Whether loss and norm of a step are numbers only after read(), which waits for the device: at log lines and
    before checkpoints, never in between."""
    is_tracing: bool
    """Whether programs are extracted for a compiler and not run: every number is without meaning."""
    writes_beside_training: bool
    """Whether a snapshot may be written in a thread of its own. False where writing talks over the devices."""
    checkpoint_format: str | None
    """state.json's "format" of what snapshot() writes and load() reads; None is the format of checkpoints.py."""
    keeps_documents_apart: bool
    """After build(): whether documents of a packed row are kept apart. False where the spec declares that they see
    each other, on hardware that cannot do it otherwise."""

    @property
    def rounds_at_random(self) -> bool:
        """Whether the device rounds at random, so that the same program gives other last bits each time."""

    def start(self) -> None:
        """Join the process group. All ranks."""

    def stop(self) -> None:
        """Leave it, after the last collective. All ranks."""

    def build(self, plan: ModelPlan) -> None:
        """Load the base model, add the adapter, make the optimizer. All ranks end with equal parameters."""

    def parameters(self) -> dict[str, ParameterFacts]:
        """The trainable parameters by the name that checkpoints use, sorted. The same in every rank."""

    def layout(self) -> Mapping[str, Any]:
        """state.json's "layout": how ranks share the model, where a checkpoint is bound to it; empty where it is not.

        A checkpoint of another layout is refused with both values.
        """

    def device_memory(self) -> int | None:
        """Bytes of the device's memory that this rank held at most; None on the host's."""

    def adapter_config(self, source: str) -> bytes | None:
        """adapter_config.json as peft writes it, `source` as its base model; None when there is no adapter."""

    def micro_step(self, batch: MicroBatch, scale: float, seed: int, *, last: bool) -> None:
        """Add the gradient of `scale` times the summed loss of `batch`; `seed` fixes its dropout.

        `last` is true for the last one before reduce(). All ranks, and each as often.
        """

    def reduce(self, extras: Sequence[float]) -> tuple[Number, list[float]]:
        """Sum gradients, scaled loss and `extras` over all ranks since the last update. Returns loss and extras."""

    def update(self, learning_rate: float, max_gradient_norm: float) -> Number:
        """Clip the summed gradient (0 means no clipping), step, clear. Returns its norm before clipping.

        A norm that is no finite number changes nothing, unless the backend reads late: the caller must look at it.
        """

    def read(self, numbers: Sequence[tuple[Number, Number]]) -> list[tuple[float, float]]:
        """(loss, norm) of reduce() and update() as floats. All ranks."""

    def held_out_loss(self, batches: Iterable[MicroBatch]) -> float:
        """The summed loss of all ranks' `batches`, without dropout or gradient. All ranks, and each gives as many."""

    def packing_error(self, batch: MicroBatch, document: int) -> tuple[float, float]:
        """How far document `document` of the first row of `batch` depends on its neighbours.

        Returns the largest difference of its logits in the row against alone, and against the same row with other
        tokens in the other documents, both relative to the largest logit; or the same of its loss.
        """

    def snapshot(self) -> Snapshot:
        """This rank's part of a checkpoint: parameters, optimizer moments, random states. All ranks.

        Of a backend that writes beside training, a copy in host memory: training may go on while it is written, but it
        is valid only until the next call.
        """

    def load(self, checkpoint: Checkpoint) -> None:
        """Take parameters, moments and, where the world size is the same, random states from `checkpoint`. All ranks.

        CorruptArtifact, in every rank alike, before anything is overwritten where its files are not what they were.
        """

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`. All ranks."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in the order of ranks. All ranks."""


def open_backend(placement: Placement, stuck: Callable[[StageError], None] | None = None) -> Backend:
    """The backend of this rank, not started. Rank and world size come from torchrun's environment.

    `stuck` is told of a collective that waits in vain, in a thread of its own, and must end the process.
    """
    if placement.accelerator == NEURON:
        from finetune_trainer.backends.neuron import NeuronBackend

        return NeuronBackend(placement, stuck)
    from finetune_trainer.backends.torch import TorchBackend

    return TorchBackend(placement.accelerator, placement.strategy, stuck)
