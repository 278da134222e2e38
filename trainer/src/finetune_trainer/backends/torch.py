"""The backend on PyTorch: CPU over gloo and NVIDIA GPUs over NCCL by the same code.

Data parallel, by one of two strategies of torch_strategies.py: each rank holds the whole model, or a share of all of
it (FSDP2). Which one is known from the start; everything here is the same for both.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from peft import PeftModel
from torch.nn import functional

from finetune_trainer import methods
from finetune_trainer.attention_masks import DocumentMasks
from finetune_trainer.backends import ADAM_BETAS, ADAM_EPSILON, IGNORED, MicroBatch, ModelPlan, ParameterFacts
from finetune_trainer.backends.torch_ranks import WRITING_TIMEOUT, ObjectChannel, TorchRanks, collective_timeout
from finetune_trainer.backends.torch_strategies import DDP, FSDP, TAIL, Replicas, Shards, Strategy
from finetune_trainer.checkpoint_writing import RankFile
from finetune_trainer.checkpoints import (
    FIRST_MOMENT,
    PARAMETER,
    RANDOM_STATE,
    SECOND_MOMENT,
    Checkpoint,
    LocalSlice,
)
from finetune_trainer.errors import StageError, UserError
from finetune_trainer.throughput import ModelSize, model_size, peak_flops

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class TorchBackend(TorchRanks):
    """See backends.Backend. `accelerator` is cpu or cuda, `strategy` what a rank holds: DDP or FSDP."""

    whole_rows = False
    reads_late = False
    is_tracing = False
    writes_beside_training = True
    checkpoint_format: str | None = None
    rounds_at_random: bool = False
    keeps_documents_apart = True

    def __init__(
        self, accelerator: str, strategy: str = DDP, stuck: Callable[[StageError], None] | None = None
    ) -> None:
        super().__init__(stuck)
        self.data_parallel_rank = self.rank
        self.data_parallel_size = self.world_size
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", local_rank) if accelerator == "cuda" else torch.device("cpu")
        self._sharded = strategy == FSDP
        self.model_size: ModelSize | None = None
        self.peak_flops: float | None = None
        self._host_buffers: dict[str, torch.Tensor] = {}

    # ---- process group

    def start(self) -> None:
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise UserError("NoDevice", "accelerator.type is cuda and this container sees no GPU: check the node")
            torch.cuda.set_device(self.device)
        if self.world_size == 1 and not self._sharded:
            return
        with self._guard("joining the process group"):
            # gloo beside nccl carries what is not on the device: broadcasts of objects would else take GPU memory
            kind = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            if self.world_size == 1:
                if not dist.is_initialized():
                    alone = dist.HashStore()  # type: ignore[attr-defined]
                    dist.init_process_group(kind, store=alone, rank=0, world_size=1)
                return
            store, rank, world_size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
            # The watch comes first, since it can tell who is missing.
            timeout = timedelta(seconds=2 * collective_timeout() + 60)
            dist.init_process_group(kind, store=store, rank=rank, world_size=world_size, timeout=timeout)
            group = dist.new_group(backend="gloo", timeout=WRITING_TIMEOUT)
            self.writers = ObjectChannel(self.rank, self.world_size, self._guard, " of a checkpoint's writing", group)
        self._meet(store)

    # ---- model

    def build(self, plan: ModelPlan) -> None:
        with self._guard("loading the model"):
            self._model = methods.load_trainable_model(
                plan.folder,
                plan.method,
                precision=plan.precision,
                seed=plan.seed,
                # Sharding takes the model there block by block.
                device=torch.device("cpu") if self._sharded else self.device,
                trust_remote_code=plan.trust_remote_code,
            )
            base = self._model.get_base_model() if isinstance(self._model, PeftModel) else self._model
            if plan.gradient_checkpointing:
                _checkpoint_gradients(base)
        self._model.train()
        self.model_size = model_size(self._model)
        if self.device.type == "cuda":
            self.peak_flops = peak_flops(torch.cuda.get_device_name(self.device), plan.precision)
        self._autocast = plan.precision == "bf16"
        self._keep_masks = plan.keep_masks
        self._document_masks = DocumentMasks(base)
        self._takes_positions = "position_ids" in inspect.signature(base.forward).parameters
        self._output = _OutputLayer(base.get_output_embeddings())
        self._named = methods.trainable_parameters(self._model)
        if self.world_size > 1 and not self._sharded:
            with self._collective("sharing the start"):
                for parameter in self._named.values():
                    dist.broadcast(parameter.data, src=0)
        self._strategy = self._spread(plan)
        decays = [p for name, p in self._named.items() if self._decays(name, p)]
        rest = [p for name, p in self._named.items() if not self._decays(name, p)]
        groups = [{"params": decays, "weight_decay": plan.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPSILON, fused=True
        )

    def parameters(self) -> dict[str, ParameterFacts]:
        return {
            name: ParameterFacts(tuple(p.shape), _DTYPES[p.dtype], self._decays(name, p))
            for name, p in self._named.items()
        }

    def layout(self) -> Mapping[str, Any]:
        return {}

    def adapter_config(self, source: str) -> bytes | None:
        return methods.encode_adapter_config(self._model, source)

    def device_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    # ---- one step

    def micro_step(self, batch: MicroBatch, scale: float, seed: int, *, last: bool) -> None:
        supervised = batch.targets != IGNORED
        if not supervised.any():  # the loss and its gradient are zero
            if not self._strategy.runs_every_micro_step:
                return
            supervised[0, 0] = True  # its target is still to be ignored
        with self._collective("a micro step") if self._sharded else self._guard("a micro step"):
            self._strategy.begin_micro_step(last=last)
            torch.manual_seed(seed)
            logits = self._logits(batch, supervised)
            targets = torch.from_numpy(batch.targets[supervised]).long().to(self.device)
            loss = scale * functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            self._strategy.tail[0] += loss.detach()

    def reduce(self, extras: Sequence[float]) -> tuple[float, list[float]]:
        if len(extras) > TAIL - 2:
            raise ValueError(f"{len(extras)} numbers, there is room for {TAIL - 2}")
        with self._collective("the reduction of the gradients"):
            tail = self._strategy.tail
            tail[1 : 1 + len(extras)] = torch.tensor(list(extras), dtype=torch.float32)
            self._strategy.reduce()
            summed = tail.tolist()
        return summed[0], summed[1 : 1 + len(extras)]

    def update(self, learning_rate: float, max_gradient_norm: float) -> float:
        with self._collective("the optimizer's step") if self._sharded else self._guard("the optimizer's step"):
            norm = self._strategy.gradient_norm()
            if not math.isfinite(norm):
                return norm
            if 0 < max_gradient_norm < norm:
                self._strategy.scale_gradients(max_gradient_norm / norm)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            self._strategy.clear()
        return norm

    def read(self, numbers: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return list(numbers)

    def held_out_loss(self, batches: Iterable[MicroBatch]) -> float:
        total = torch.zeros((), dtype=torch.float64)
        doing = "measuring the held-out loss"
        with torch.no_grad(), methods.deterministic(self._model):
            for batch in batches:
                supervised = batch.targets != IGNORED
                if not supervised.any():
                    if not self._strategy.runs_every_micro_step:
                        continue
                    supervised[0, 0] = True  # its target is still to be ignored
                with self._collective(doing) if self._sharded else self._guard(doing):
                    logits = self._logits(batch, supervised)
                    targets = torch.from_numpy(batch.targets[supervised]).long().to(self.device)
                    loss = functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
                    total += loss.double().cpu()
        if isinstance(self._strategy, Shards):
            self._strategy.reshard()
        if self.world_size > 1:
            with self._collective(doing):
                dist.all_reduce(total)
        return float(total)

    # ---- packing

    def packing_error(self, batch: MicroBatch, document: int) -> tuple[float, float]:
        row = slice(0, 1)
        inside = batch.segment_ids[0] == document
        columns = inside.nonzero()[0]
        of_document = inside[None, :]
        alone = MicroBatch(
            batch.input_ids[row, columns],
            batch.targets[row, columns],
            batch.position_ids[row, columns] - batch.position_ids[0, columns[0]],
            batch.segment_ids[row, columns],
        )
        other = batch.input_ids[row].copy()
        other[0, ~inside] = (other[0, ~inside] + 1) % self._model.get_input_embeddings().num_embeddings
        changed = MicroBatch(other, batch.targets[row], batch.position_ids[row], batch.segment_ids[row])
        packed = MicroBatch(batch.input_ids[row], batch.targets[row], batch.position_ids[row], batch.segment_ids[row])
        try:
            with torch.no_grad(), methods.deterministic(self._model), self._guard("the packing probe"):
                expected = self._logits(packed, of_document).float()
                largest = float(expected.abs().max())
                by_itself = self._logits(alone, np.ones_like(alone.input_ids, dtype=bool)).float()
                neighbours = self._logits(changed, of_document).float()
                return (
                    float((by_itself - expected).abs().max()) / largest,
                    float((neighbours - expected).abs().max()) / largest,
                )
        finally:
            if isinstance(self._strategy, Shards):
                self._strategy.reshard()

    # ---- checkpoints

    def snapshot(self) -> RankFile:
        return RankFile(self.rank, self.world_size, self.slices())

    def slices(self) -> list[LocalSlice]:
        """This rank's part of a checkpoint, copied to host memory; valid until the next call."""
        found = []
        with self._guard("copying the state to host memory"):
            for name, parameter in self._named.items():
                state = self._optimizer.state.get(parameter, {})
                tensors = {PARAMETER: parameter.data}
                tensors.update({kind: state[kind] for kind in (FIRST_MOMENT, SECOND_MOMENT) if kind in state})
                for kind, tensor in tensors.items():
                    (held, _), (start, stop) = self._rows(tensor)
                    if start < stop:
                        part = self._strategy.local(tensor)[start - held : stop - held]
                        offset = (start, *(0 for _ in tensor.shape[1:]))
                        found.append(self._host_slice(name, kind, part, tuple(tensor.shape), offset))
            for name, state in self._random_states().items():
                found.append(self._host_slice(name, RANDOM_STATE, state, tuple(state.shape), (0,)))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        return found

    def load(self, checkpoint: Checkpoint) -> None:
        with self._guard("loading the checkpoint"), torch.no_grad():
            for name, parameter in self._named.items():
                self._take(checkpoint, PARAMETER, name, parameter)
                if (FIRST_MOMENT, name) in checkpoint.tensors:
                    moments = {kind: torch.zeros_like(parameter) for kind in (FIRST_MOMENT, SECOND_MOMENT)}
                    for kind, moment in moments.items():
                        self._take(checkpoint, kind, name, moment)
                    # fused AdamW keeps its step count beside the parameter, as a float32
                    step = torch.tensor(float(checkpoint.step), dtype=torch.float32, device=self.device)
                    self._optimizer.state[parameter] = {"step": step, **moments}
            if checkpoint.world_size == self.world_size:
                for name in self._random_states():
                    stored = checkpoint.random_states.get((self.rank, name))
                    if stored is not None:
                        state = torch.frombuffer(bytearray(b"".join(stored.chunks())), dtype=torch.uint8)
                        if name == "cuda":
                            torch.cuda.set_rng_state(state, self.device)
                        else:
                            torch.set_rng_state(state)

    # ---- inside

    def _spread(self, plan: ModelPlan) -> Strategy:
        if not self._sharded:
            return Replicas(self._named, self.rank, self.world_size, self.device)
        with self._guard("sharding the model"):
            shards = Shards(
                self._model,
                self.rank,
                self.world_size,
                self.device,
                bf16=self._autocast,
                reduce_each_micro_step=plan.method.get("type") == "full",
            )
        # fully_shard has put a share in the place of each parameter, under the same name.
        self._named = methods.trainable_parameters(self._model)
        return shards

    def _rows(self, tensor: torch.Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows of dimension 0 that lie in this rank, and those of them that it saves."""
        rows = tensor.shape[0]
        return self._strategy.held_rows(rows), self._strategy.saved_rows(rows)

    def _take(self, checkpoint: Checkpoint, kind: str, name: str, into: torch.Tensor) -> None:
        """Fill this rank's rows of `into` from the checkpoint."""
        (start, stop), _ = self._rows(into)
        if start < stop:
            local = self._strategy.local(into)
            stored = torch.frombuffer(checkpoint.read_rows(kind, name, start, stop), dtype=local.dtype)
            local.copy_(stored.view(local.shape))

    def _host_slice(
        self, name: str, kind: str, part: torch.Tensor, shape: tuple[int, ...], offset: tuple[int, ...]
    ) -> LocalSlice:
        """A copy of `part` in host memory that is used again for the next checkpoint."""
        dtype = "U8" if kind == RANDOM_STATE else _DTYPES[part.dtype]
        key = f"{kind}/{name}"
        buffer = self._host_buffers.get(key)
        if buffer is None:
            buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=self.device.type == "cuda")
            self._host_buffers[key] = buffer
        if self.device.type == "cpu" and part.is_contiguous():
            # one thread: torch's share memory's bandwidth and wait for each other, which took twice the time
            np.copyto(_bytes_of(buffer), _bytes_of(part.detach()))
        else:
            buffer.copy_(part.detach(), non_blocking=True)

        def data() -> memoryview:
            return _bytes_of(buffer).data

        return LocalSlice(name, kind, dtype, shape, offset, tuple(part.shape), data)

    def _logits(self, batch: MicroBatch, wanted: npt.NDArray[np.bool_]) -> torch.Tensor:
        """(n, vocabulary) of the n `wanted` positions, a mask of (m, s), row by row; in the model's dtype."""
        arguments: dict[str, Any] = {
            "input_ids": torch.from_numpy(batch.input_ids).long().to(self.device),
            "use_cache": False,
        }
        # Without packing padding stands at the end, where no real token ever looks: causal attention is enough, and the
        # model's own positions are right. Given positions that restart in the padding, it would build a mask for it.
        if self._keep_masks:
            segments = torch.from_numpy(batch.segment_ids).to(self.device)
            arguments["attention_mask"] = self._document_masks(segments)
            if self._takes_positions:
                arguments["position_ids"] = torch.from_numpy(batch.position_ids).long().to(self.device)
        index = torch.from_numpy(np.flatnonzero(wanted)).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast), self._output.only(index):
            logits: torch.Tensor = self._model(**arguments).logits
        return logits if logits.dim() == 2 else logits.flatten(0, 1).index_select(0, index)

    @staticmethod
    def _decays(name: str, parameter: torch.Tensor) -> bool:
        """Weight decay is for matrices: not for biases and norms, which have one dimension."""
        return parameter.dim() > 1 and not name.endswith(".bias")

    def _random_states(self) -> dict[str, torch.Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states


class _OutputLayer:
    """Has a model's output layer see single positions: with a large vocabulary it is much of the time and the memory.

    transformers' own logits_to_keep takes the same columns of every row, and not every architecture has it. Where the
    layer is not called as usual, the model gives all logits, as without this.
    """

    def __init__(self, layer: torch.nn.Module | None) -> None:
        self._index: torch.Tensor | None = None
        if layer is not None:
            layer.register_forward_pre_hook(self._select)

    @contextmanager
    def only(self, index: torch.Tensor) -> Iterator[None]:
        """While this lasts, hidden states (m, s, h) become (n, h): those at `index` of the m x s positions."""
        self._index = index
        try:
            yield
        finally:
            self._index = None

    def _select(self, _layer: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._index is None or not inputs or inputs[0].dim() != 3:
            return None
        return (inputs[0].flatten(0, 1).index_select(0, self._index), *inputs[1:])


def _bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous tensor in host memory, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _checkpoint_gradients(model: Any) -> None:
    """Have each layer of `model` forget its activations and compute them again in the backward pass.

    Not by the reentrant way, which needs inputs that require gradients. Random states are put back for the second pass,
    so dropout is the same in both and the result is that of training without it.
    """
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(
            "MethodNotAvailable",
            f"training.gradientCheckpointing is true and {type(model).__name__} cannot do it ({error}): set it to "
            "false, and lower microBatchSize or use parallelism.strategy fsdp to save memory",
        ) from error
