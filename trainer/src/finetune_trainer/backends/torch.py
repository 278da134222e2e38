"""The backend on PyTorch: CPU over gloo and NVIDIA GPUs over NCCL by the same code.

Data parallel: each rank holds the whole model. The gradients of all trainable parameters lie in one flat float32
buffer, followed by the numbers that are summed with them, so a step has exactly one all-reduce, in a fixed order.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from finetune_trainer import lora
from finetune_trainer.attention_masks import document_mask
from finetune_trainer.backends import IGNORED, MicroBatch, ModelPlan, ParameterFacts
from finetune_trainer.checkpoints import (
    FIRST_MOMENT,
    PARAMETER,
    RANDOM_STATE,
    SECOND_MOMENT,
    Checkpoint,
    LocalSlice,
    slice_bounds,
)
from finetune_trainer.errors import DeviceOutOfMemory, HostOutOfMemory, RetryableError, UserError
from finetune_trainer.model_loading import load_causal_model
from finetune_trainer.throughput import ModelSize, model_size, peak_flops

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""After this long without an answer a peer counts as lost. A killed process is noticed at once: its sockets close."""

_EXTRAS = 8
"""Places behind the gradients for numbers that are summed with them; the first is the loss."""
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_HOST_MEMORY_WORDS = ("DefaultCPUAllocator", "Cannot allocate memory")
_PEER_WORDS = re.compile(
    r"Connection (closed|reset)|connection closed|Broken pipe|Timed out|timed out|timeout|Gloo|gloo|NCCL|"
    r"No route to host|Connection refused|connect"
)


class TorchBackend:
    """See backends.Backend. `accelerator` is cpu or cuda; rank and world size come from torchrun's environment."""

    def __init__(self, accelerator: str) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.data_parallel_rank = self.rank
        self.data_parallel_size = self.world_size
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", local_rank) if accelerator == "cuda" else torch.device("cpu")
        self._peers: list[str] = []
        self.model_size: ModelSize | None = None
        self.peak_flops: float | None = None

    # ---- process group

    def start(self) -> None:
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise UserError("NoDevice", "accelerator.type is cuda and this container sees no GPU: check the node")
            torch.cuda.set_device(self.device)
        if self.world_size == 1:
            return
        with self._guard("joining the process group"):
            dist.init_process_group(
                # gloo beside nccl carries what is not on the device: broadcasts of objects would else take GPU memory
                "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                timeout=COLLECTIVE_TIMEOUT,
            )
        self._peers = self.gather(socket.gethostname())

    def stop(self) -> None:
        if self.world_size > 1:
            with self._guard("leaving the process group"):
                dist.barrier()
                dist.destroy_process_group()

    def broadcast(self, value: Any) -> Any:
        if self.world_size == 1:
            return value
        box = [value]
        with self._guard("a broadcast"):
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        with self._guard("a gather"):
            dist.all_gather_object(gathered, value)
        return gathered

    # ---- model

    def build(self, plan: ModelPlan) -> None:
        with self._guard("loading the model"):
            dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
            base = load_causal_model(plan.folder, dtype=dtype, trust_remote_code=plan.trust_remote_code)
            base.config.use_cache = False
            self._model = lora.add_adapter(base, plan.method, plan.seed).to(self.device)
        self._model.train()
        self.model_size = model_size(self._model)
        if self.device.type == "cuda":
            self.peak_flops = peak_flops(torch.cuda.get_device_name(self.device), plan.precision)
        self._autocast = plan.precision == "bf16"
        self._keep_masks = plan.keep_masks
        arguments = inspect.signature(base.forward).parameters
        self._keeps_logits = "logits_to_keep" in arguments
        self._takes_positions = "position_ids" in arguments
        named = {lora.file_name(name): p for name, p in self._model.named_parameters() if p.requires_grad}
        self._named = dict(sorted(named.items()))
        self._make_flat_gradient()
        if self.world_size > 1:
            with self._guard("sharing the adapter's start"):
                for parameter in self._named.values():
                    dist.broadcast(parameter.data, src=0)
        decays = [p for name, p in self._named.items() if self._decays(name, p)]
        rest = [p for name, p in self._named.items() if not self._decays(name, p)]
        groups = [{"params": decays, "weight_decay": plan.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=_BETAS, eps=_EPSILON, fused=True
        )

    def parameters(self) -> dict[str, ParameterFacts]:
        return {
            name: ParameterFacts(tuple(p.shape), _DTYPES[p.dtype], self._decays(name, p))
            for name, p in self._named.items()
        }

    def adapter_config(self, source: str) -> bytes | None:
        return lora.encode_adapter_config(self._model, source)

    def device_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    # ---- one step

    def micro_step(self, batch: MicroBatch, scale: float, seed: int) -> None:
        positions = (batch.targets != IGNORED).any(axis=0).nonzero()[0]
        if not len(positions):
            return  # nothing supervised here: the loss and its gradient are zero
        with self._guard("a micro step"):
            torch.manual_seed(seed)
            logits = self._logits(batch, positions)
            targets = torch.from_numpy(batch.targets[:, positions]).long().to(self.device)
            loss = scale * functional.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            loss.backward()  # type: ignore[no-untyped-call]
            self._loss += loss.detach()

    def reduce(self, extras: Sequence[float]) -> tuple[float, list[float]]:
        if len(extras) >= _EXTRAS:
            raise ValueError(f"{len(extras)} numbers, there is room for {_EXTRAS - 1}")
        with self._guard("the reduction of the gradients"):
            self._tail[1 : 1 + len(extras)] = torch.tensor(list(extras), dtype=torch.float32)
            if self.world_size > 1:
                dist.all_reduce(self._flat)
            summed = self._tail.tolist()
        return summed[0], summed[1 : 1 + len(extras)]

    def update(self, learning_rate: float, max_gradient_norm: float) -> float:
        with self._guard("the optimizer's step"):
            gradient = self._flat[:-_EXTRAS]
            norm = float(torch.linalg.vector_norm(gradient))
            if not math.isfinite(norm):
                return norm
            if 0 < max_gradient_norm < norm:
                gradient.mul_(max_gradient_norm / norm)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            self._flat.zero_()
        return norm

    # ---- packing

    def packing_error(self, batch: MicroBatch, document: int) -> tuple[float, float]:
        row = slice(0, 1)
        inside = batch.segment_ids[0] == document
        columns = inside.nonzero()[0]
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
        self._model.eval()
        try:
            with torch.no_grad(), self._guard("the packing probe"):
                expected = self._logits(packed, columns).float()
                largest = float(expected.abs().max())
                everything = alone.input_ids.shape[1]
                by_itself = self._logits(alone, torch.arange(everything).numpy()).float()
                neighbours = self._logits(changed, columns).float()
                return (
                    float((by_itself - expected).abs().max()) / largest,
                    float((neighbours - expected).abs().max()) / largest,
                )
        finally:
            self._model.train()

    # ---- checkpoints

    def slices(self) -> list[LocalSlice]:
        found = []
        for name, parameter in self._named.items():
            state = self._optimizer.state.get(parameter, {})
            tensors = {PARAMETER: parameter.data}
            tensors.update({kind: state[kind] for kind in (FIRST_MOMENT, SECOND_MOMENT) if kind in state})
            for kind, tensor in tensors.items():
                start, stop = slice_bounds(tensor.shape[0], self.rank, self.world_size)
                if start < stop:
                    part, offset = tensor[start:stop], (start, *(0 for _ in tensor.shape[1:]))
                    found.append(_local_slice(name, kind, part, tuple(tensor.shape), offset))
        for name, state in self._random_states().items():
            found.append(_local_slice(name, RANDOM_STATE, state, tuple(state.shape), (0,)))
        return found

    def load(self, checkpoint: Checkpoint) -> None:
        with self._guard("loading the checkpoint"):
            for name, parameter in self._named.items():
                parameter.data.copy_(self._stored(checkpoint, PARAMETER, name, parameter))
                if (FIRST_MOMENT, name) in checkpoint.tensors:
                    self._optimizer.state[parameter] = {
                        # fused AdamW keeps its step count beside the parameter, as a float32
                        "step": torch.tensor(float(checkpoint.step), dtype=torch.float32, device=parameter.device),
                        FIRST_MOMENT: self._stored(checkpoint, FIRST_MOMENT, name, parameter).clone(),
                        SECOND_MOMENT: self._stored(checkpoint, SECOND_MOMENT, name, parameter).clone(),
                    }
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

    def _make_flat_gradient(self) -> None:
        sizes = [parameter.numel() for parameter in self._named.values()]
        self._flat = torch.zeros(sum(sizes) + _EXTRAS, dtype=torch.float32, device=self.device)
        self._tail = self._flat[-_EXTRAS:]
        self._loss = self._tail[0]
        start = 0
        for parameter, size in zip(self._named.values(), sizes, strict=True):
            # autograd adds to an existing gradient in place, so everything lands in the flat buffer
            parameter.grad = self._flat[start : start + size].view_as(parameter)
            start += size

    def _logits(self, batch: MicroBatch, positions: Any) -> torch.Tensor:
        """(m, len(positions), vocabulary), in the model's dtype. Only these positions pass the output layer."""
        arguments: dict[str, Any] = {
            "input_ids": torch.from_numpy(batch.input_ids).long().to(self.device),
            "use_cache": False,
        }
        # Without packing padding stands at the end, where no real token ever looks: causal attention is enough, and the
        # model's own positions are right. Given positions that restart in the padding, it would build a mask for it.
        if self._keep_masks:
            segments = torch.from_numpy(batch.segment_ids).to(self.device)
            arguments["attention_mask"] = document_mask(segments)
            if self._takes_positions:
                arguments["position_ids"] = torch.from_numpy(batch.position_ids).long().to(self.device)
        columns = torch.from_numpy(positions).to(self.device)
        if self._keeps_logits:
            arguments["logits_to_keep"] = columns
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            logits: torch.Tensor = self._model(**arguments).logits
        return logits if self._keeps_logits else logits[:, columns]

    @staticmethod
    def _decays(name: str, parameter: torch.Tensor) -> bool:
        """Weight decay is for matrices: not for biases and norms, which have one dimension."""
        return parameter.dim() > 1 and not name.endswith(".bias")

    def _random_states(self) -> dict[str, torch.Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _stored(self, checkpoint: Checkpoint, kind: str, name: str, like: torch.Tensor) -> torch.Tensor:
        raw = checkpoint.read(kind, name)
        return torch.frombuffer(raw, dtype=like.dtype).view(like.shape).to(like.device)

    @contextmanager
    def _guard(self, doing: str) -> Iterator[None]:
        """Turn the errors that torch has for memory and peers into ours; others pass."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise DeviceOutOfMemory(
                "OutOfDeviceMemory", f"{_first_line(error)} during {doing}: lower microBatchSize or maxLength"
            ) from error
        except MemoryError as error:
            raise HostOutOfMemory("OutOfHostMemory", f"out of memory during {doing}: raise the memory limit") from error
        except RuntimeError as error:
            text = str(error)
            if any(word in text for word in _HOST_MEMORY_WORDS):
                raise HostOutOfMemory(
                    "OutOfHostMemory", f"{_first_line(error)} during {doing}: raise the stage's memory limit"
                ) from error
            if isinstance(error, dist.DistError) or _PEER_WORDS.search(text):
                raise RetryableError("PeerLost", self._peer_message(doing, text)) from error
            raise

    def _peer_message(self, doing: str, text: str) -> str:
        others = [f"rank {rank} ({host})" for rank, host in enumerate(self._peers) if rank != self.rank]
        known = ", ".join(others) if others else "another rank"
        return (
            f"rank {self.rank} of {self.world_size} lost {known} during {doing} ({_first_line(text)[:200]}): "
            "look at the other pods for the cause; the next attempt goes on from the last checkpoint"
        )


def _local_slice(
    name: str, kind: str, part: torch.Tensor, shape: tuple[int, ...], offset: tuple[int, ...]
) -> LocalSlice:
    dtype = "U8" if kind == RANDOM_STATE else _DTYPES[part.dtype]

    def data() -> memoryview:
        return part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return LocalSlice(name, kind, dtype, shape, offset, tuple(part.shape), data)


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
