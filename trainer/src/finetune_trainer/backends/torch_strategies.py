"""What a data parallel rank holds of the model on PyTorch: all of it, or its share. spec.parallelism.strategy.

backends/torch.py drives one of the two classes here, which differ in where parameters and gradients lie and in when
the ranks talk. Both sum gradients and never average them, since the loss is divided by the supervised tokens of the
whole global batch before it is differentiated. Both cut a tensor along dimension 0 only, as checkpoints do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from finetune_trainer.checkpoints import slice_bounds

DDP = "ddp"
FSDP = "fsdp"

TAIL = 8
"""Numbers that are summed over the ranks with each step: the loss, at most six of the caller's, and one of ours."""

Parameters = Mapping[str, torch.nn.Parameter]


class Strategy(Protocol):
    """One rank's part of everything that trains. Row ranges are of dimension 0, (start, stop)."""

    tail: torch.Tensor
    """(TAIL,) float32 on the device; `tail[0]` is the scaled loss of this rank since the last update."""
    runs_every_micro_step: bool
    """Whether a micro step is a collective, so that one without anything to learn may not be left out."""

    def begin_micro_step(self, *, last: bool) -> None:
        """Say before a forward pass whether its gradient is the last of this step."""

    def reduce(self) -> None:
        """Sum gradients and `tail` over the ranks. All ranks."""

    def gradient_norm(self) -> float:
        """The norm of the whole summed gradient, the same in every rank. After reduce()."""

    def scale_gradients(self, factor: float) -> None:
        """Multiply every summed gradient by `factor`."""

    def clear(self) -> None:
        """Forget gradients and `tail`."""

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of a parameter, or of a tensor like it, that lie in this rank; writing to them is writing to it."""

    def held_rows(self, rows: int) -> tuple[int, int]:
        """Which of a tensor's `rows` rows lie in this rank."""

    def saved_rows(self, rows: int) -> tuple[int, int]:
        """Which of them this rank writes to a checkpoint: of all ranks together each row once."""


class Replicas:
    """Each rank has the whole model. One all-reduce a step, in a fixed order: all gradients and the tail in one buffer.

    The optimizer's step is the same in every rank, so equal parameters stay equal.
    """

    runs_every_micro_step = False

    def __init__(self, parameters: Parameters, rank: int, world_size: int, device: torch.device) -> None:
        self._rank, self._world_size = rank, world_size
        sizes = [parameter.numel() for parameter in parameters.values()]
        self.flat = torch.zeros(sum(sizes) + TAIL, dtype=torch.float32, device=device)
        self.gradient, self.tail = self.flat[:-TAIL], self.flat[-TAIL:]
        start = 0
        for parameter, size in zip(parameters.values(), sizes, strict=True):
            # autograd adds to an existing gradient in place, so everything lands in the flat buffer
            parameter.grad = self.flat[start : start + size].view_as(parameter)
            start += size

    def begin_micro_step(self, *, last: bool) -> None:
        pass

    def reduce(self) -> None:
        if self._world_size > 1:
            dist.all_reduce(self.flat)

    def gradient_norm(self) -> float:
        return float(torch.linalg.vector_norm(self.gradient))

    def scale_gradients(self, factor: float) -> None:
        self.gradient.mul_(factor)

    def clear(self) -> None:
        self.flat.zero_()

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    def held_rows(self, rows: int) -> tuple[int, int]:
        return 0, rows

    def saved_rows(self, rows: int) -> tuple[int, int]:
        return slice_bounds(rows, self._rank, self._world_size)


class Shards:
    """FSDP2: each rank has a share of every parameter, gradient and moment. A transformer block is whole while it runs.

    `model` is sharded in place, block by block, so that a rank never holds more than the model as it was loaded.
    With `reduce_each_micro_step` gradients of accumulation are shares too, at the price of a reduction each micro step;
    otherwise a rank keeps whole gradients until the last one, which is right where few parameters train.
    """

    runs_every_micro_step = True

    def __init__(
        self,
        model: torch.nn.Module,
        rank: int,
        world_size: int,
        device: torch.device,
        *,
        bf16: bool,
        reduce_each_micro_step: bool,
    ) -> None:
        self._model = model
        self._rank, self._world_size = rank, world_size
        self._reduce_each_micro_step = reduce_each_micro_step
        self.tail = torch.zeros(TAIL, dtype=torch.float32, device=device)
        mesh = init_device_mesh(device.type, (world_size,))
        # Weights travel and compute in bf16, gradients are summed in float32. Inputs stay as they are: autocast decides
        # there as it does without sharding, and position embeddings keep their precision.
        policy = (
            MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
            if bf16
            else MixedPrecisionPolicy(cast_forward_inputs=False)
        )
        for block in transformer_blocks(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in self._units:
            unit.set_gradient_divide_factor(1.0)  # a sum, not a mean
            unit.set_force_sum_reduction_for_comms(True)  # the other ways to do it are NCCL's alone
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def begin_micro_step(self, *, last: bool) -> None:
        for unit in self._units:
            unit.set_requires_gradient_sync(last or self._reduce_each_micro_step, recurse=False)

    def reduce(self) -> None:
        for parameter in self._trained:
            if parameter.grad is None:
                # No rank used it in this step. AdamW passes over what has no gradient; replicas have zeros there.
                parameter.grad = torch.zeros_like(parameter)
        norms = torch._foreach_norm(self._gradients())
        self.tail[-1] = torch.stack(norms).square().sum() if norms else 0.0
        dist.all_reduce(self.tail)

    def gradient_norm(self) -> float:
        return float(self.tail[-1].sqrt())

    def scale_gradients(self, factor: float) -> None:
        torch._foreach_mul_(self._gradients(), factor)

    def clear(self) -> None:
        for parameter in self._trained:
            parameter.grad = None
        self.tail.zero_()

    def reshard(self) -> None:
        """Give back what a forward pass without a backward pass left whole."""
        for unit in self._units:
            unit.reshard()

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def held_rows(self, rows: int) -> tuple[int, int]:
        share = -(-rows // self._world_size)  # FSDP2 cuts like torch.chunk: equal shares, what is left for the last
        return min(rows, self._rank * share), min(rows, (self._rank + 1) * share)

    def saved_rows(self, rows: int) -> tuple[int, int]:
        return self.held_rows(rows)

    def _gradients(self) -> list[torch.Tensor]:
        found = [self.local(parameter.grad) for parameter in self._trained if parameter.grad is not None]
        return [gradient for gradient in found if gradient.numel()]


def transformer_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated layers of a transformers model: those it names as not to be split, or else its longest module list.

    Empty when there is neither: the model is then one unit.
    """
    named: set[str] = set()
    for module in model.modules():
        named.update(getattr(module, "_no_split_modules", None) or ())
    blocks = _outermost(module for module in model.modules() if type(module).__name__ in named)
    if blocks:
        return blocks
    lists: Sequence[Any] = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def _outermost(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """Those of `modules` that are inside no other of them; a block of blocks is sharded once."""
    found: list[torch.nn.Module] = []
    inside: set[int] = set()
    for module in modules:  # parents come before their children
        if id(module) not in inside:
            found.append(module)
            inside.update(id(child) for child in module.modules())
    return found
