"""Stands in the place of finetune_trainer/backends/neuron.py in the rehearsal's image: CPUs, and the vendor's files.

tests/rehearsal/Dockerfile puts it there. The arithmetic is TorchBackend's: the ranks of a tensor and pipeline parallel
group hold the whole model and compute the same, and gradients are summed over data parallel ranks only. What the
trainer around it meets is the vendor's: programs of fixed shapes that are extracted, found in the cache or compiled,
numbers that are known late and worthless while programs are extracted, bf16 weights with float32 masters in the
checkpoint, each rank's shards in neuronx-distributed's layout, written by all ranks while training stands still.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import neuron_shards
import torch
import torch.distributed as dist
from neuron_vendor import graphs

from finetune_trainer.artifacts import FileEntry, hash_file, verify_artifact
from finetune_trainer.backends import MicroBatch, ModelPlan, ParameterFacts, Placement
from finetune_trainer.backends.torch import TorchBackend
from finetune_trainer.backends.torch_strategies import DDP, Replicas
from finetune_trainer.checkpoints import FIRST_MOMENT, NEURON_FORMAT, NEURON_SIZES, SECOND_MOMENT, Checkpoint
from finetune_trainer.errors import CorruptArtifact, StageError
from finetune_trainer.neuron_checkpoints import open_neuron_checkpoint
from finetune_trainer.neuron_optimizer import MASTER, open_optimizer

HOLD_ENV = "REHEARSAL_HOLD"
"""Its value is a file and a step: after it ranks stand still as long as the file is there, for a fault to come."""

_DTYPES = {"fp32": (torch.float32, "F32"), "bf16": (torch.bfloat16, "BF16")}


@dataclass(frozen=True)
class _Late:
    """A number that the device has not told yet: no arithmetic, no comparison, no printing as a number."""

    value: float


class _DataParallel(Replicas):
    """Gradients are summed over the ranks of one group."""

    def __init__(self, parameters: Any, rank: int, size: int, device: torch.device, group: Any) -> None:
        super().__init__(parameters, rank, size, device)
        self._group = group

    def reduce(self) -> None:
        dist.all_reduce(self.flat, group=self._group)


class NeuronBackend(TorchBackend):
    """See backends.Backend, and above.

    Ranks are dealt as neuronx-distributed does: tensor parallel ones are neighbours, pipeline
    parallel ones lie furthest apart.
    """

    whole_rows = True
    reads_late = True
    writes_beside_training = False
    checkpoint_format: str | None = NEURON_FORMAT
    rounds_at_random = False
    keeps_documents_apart = True

    def __init__(self, placement: Placement, stuck: Callable[[StageError], None] | None = None) -> None:
        super().__init__("cpu", DDP, stuck)
        self.placement = placement
        self.tp, self.pp = placement.tensor_parallel_size, placement.pipeline_parallel_size
        self.data_parallel_size = self.world_size // (self.tp * self.pp)
        self.tp_rank = self.rank % self.tp
        self.data_parallel_rank = self.rank // self.tp % self.data_parallel_size
        self.pp_rank = self.rank // (self.tp * self.data_parallel_size)
        self.is_tracing = os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY") == "1"
        self._programs: set[str] = set()
        self._updates = 0

    def start(self) -> None:
        super().start()
        for pp_rank in range(self.pp):
            for tp_rank in range(self.tp):
                first = pp_rank * self.tp * self.data_parallel_size + tp_rank
                ranks = [first + number * self.tp for number in range(self.data_parallel_size)]
                group = dist.new_group(ranks, backend="gloo")
                if self.rank in ranks:
                    self._group = group

    def build(self, plan: ModelPlan) -> None:
        super().build(plan)
        self.plan = plan
        self.config: dict[str, Any] = json.loads((plan.folder / "config.json").read_text())
        self.dtype, self.dtype_name = _DTYPES[plan.precision]

    def parameters(self) -> dict[str, ParameterFacts]:
        """In the dtype of the weights; what TorchBackend trains are their masters."""
        return {
            name: ParameterFacts(facts.shape, self.dtype_name, facts.decays)
            for name, facts in super().parameters().items()
        }

    def layout(self) -> Mapping[str, Any]:
        sizes = self.tp, self.pp, self.data_parallel_size
        return dict(zip(NEURON_SIZES, sizes, strict=True))

    # ---- one step

    def micro_step(self, batch: MicroBatch, scale: float, seed: int, *, last: bool) -> None:
        self._run("micro-step", _shape(batch))
        self._hold()
        super().micro_step(batch, scale, seed, last=last)

    def reduce(self, extras: Sequence[float]) -> tuple[Any, list[float]]:
        everywhere = torch.tensor(list(extras), dtype=torch.float64)
        with self._collective("the sum of what every rank wants"):
            dist.all_reduce(everywhere)
        loss, _ = super().reduce([])
        return _Late(math.nan if self.is_tracing else loss), everywhere.tolist()

    def update(self, learning_rate: float, max_gradient_norm: float) -> Any:
        # torch_xla makes constants of 0 and 1, so that a rate of 0 is a program of its own.
        self._run("update", f"clip-{max_gradient_norm > 0}", f"still-{learning_rate == 0}")
        norm = super().update(learning_rate, max_gradient_norm)
        self._updates += 1
        return _Late(math.nan if self.is_tracing else norm)

    def read(self, numbers: Sequence[tuple[Any, Any]]) -> list[tuple[float, float]]:
        return [(loss.value, norm.value) for loss, norm in numbers]

    def held_out_loss(self, batches: Iterable[MicroBatch]) -> float:
        held = list(batches)
        if held:
            self._run("held-out-loss", _shape(held[0]))
        loss = super().held_out_loss(held) / (self.tp * self.pp)
        return math.nan if self.is_tracing else loss

    # ---- checkpoints

    def snapshot(self) -> _Shards:
        """Taken at once, since training stands still until it is written."""
        masters = {name: parameter.detach() for name, parameter in self._named.items()}
        states = {name: self._optimizer.state[parameter] for name, parameter in self._named.items()}
        optimizer = {
            kind: {name: state[kind] for name, state in states.items()} for kind in (FIRST_MOMENT, SECOND_MOMENT)
        }
        weights = {name: master.to(self.dtype) for name, master in masters.items()}
        return _Shards(self, weights, {**optimizer, MASTER: masters})

    def load(self, checkpoint: Checkpoint) -> None:
        self._verify(checkpoint)
        names = [checkpoint.state["optimizerNames"][str(pp_rank)] for pp_rank in range(self.pp)]
        state = open_optimizer(open_neuron_checkpoint(checkpoint.path), names)
        kinds = {kind: state.tensors(kind) for kind in (MASTER, FIRST_MOMENT, SECOND_MOMENT)}
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(_whole(kinds[MASTER][name], parameter))
                step = torch.tensor(float(checkpoint.step))
                moments = {kind: _whole(kinds[kind][name], parameter) for kind in (FIRST_MOMENT, SECOND_MOMENT)}
                self._optimizer.state[parameter] = {"step": step, **moments}
        self._updates = checkpoint.step

    # ---- inside

    def _spread(self, plan: ModelPlan) -> Any:
        del plan
        rank, size = self.data_parallel_rank, self.data_parallel_size
        return _DataParallel(self._named, rank, size, self.device, self._group)

    def _run(self, program: str, *facts: str) -> None:
        """Run a program of the device: one for each set of shapes, types and sizes, as the compiler sees them."""
        method, config = self.plan.method, self.config
        lora = method.get("lora") or {}
        words = [
            program,
            *facts,
            self.plan.precision,
            f"tp{self.tp}-pp{self.pp}-dp{self.data_parallel_size}",
            "-".join([str(method["type"]), str(lora.get("rank", "")), *lora.get("targetModules", ())]),
            f"hidden{config['hidden_size']}-layers{config['num_hidden_layers']}",
        ]
        name = " ".join(words)
        if name not in self._programs:
            graphs.run_graph(name)
            self._programs.add(name)

    def _hold(self) -> None:
        path, _, step = os.environ.get(HOLD_ENV, "").partition(" ")
        while path and self._updates == int(step) and not self.is_tracing and Path(path).exists():
            time.sleep(0.05)

    def _verify(self, checkpoint: Checkpoint) -> None:
        """Every rank reads every file, and all of them refuse what one of them refuses."""
        problem = ""
        try:
            verify_artifact(checkpoint.path)
        except CorruptArtifact as error:
            problem = error.message
        for rank, told in enumerate(self.gather(problem)):
            if told:
                raise CorruptArtifact(f"rank {rank}: {told}")


@dataclass(frozen=True)
class _Shards:
    """See backends.Snapshot: whole tensors, of which write() cuts this rank's part."""

    backend: NeuronBackend
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Mapping[str, torch.Tensor]]

    @property
    def extra(self) -> Mapping[str, Any]:
        backend = self.backend
        adapter = self._adapter_config()
        layout = neuron_shards.ShardLayout(backend.config, backend.tp, backend.pp, adapter_config=adapter)
        names = {str(rank): layout.optimizer_names(self.weights, rank) for rank in range(backend.pp)}
        return {"format": NEURON_FORMAT, "layout": backend.layout(), "optimizerNames": names}

    def write(self, folder: Path, step: int) -> list[FileEntry]:
        backend, adapter = self.backend, self._adapter_config()
        neuron_shards.write_rank(
            folder,
            self.weights,
            backend.config,
            tp=backend.tp,
            pp=backend.pp,
            dp=backend.data_parallel_size,
            tp_rank=backend.tp_rank,
            pp_rank=backend.pp_rank,
            dp_rank=backend.data_parallel_rank,
            adapter_config=adapter,
            optimizer=self.optimizer,
            optimizer_step=step,
        )
        written = _files(folder, backend)
        backend.gather(None)  # now every rank has written
        if backend.rank == 0:
            there = {path for path in folder.rglob("*") if path.is_file()}
            neuron_shards.write_marks(folder, backend.config, adapter_config=adapter)
            written |= {path for path in folder.rglob("*") if path.is_file()} - there
            print(f"rehearsal: the parameters of step {step} have sha256 {self._digest()}", flush=True)
        return [_entry(path, folder) for path in sorted(written)]

    def _adapter_config(self) -> dict[str, Any] | None:
        encoded = self.backend.adapter_config("base")
        return None if encoded is None else json.loads(encoded)  # type: ignore[no-any-return]

    def _digest(self) -> str:
        """Over names, dtypes, shapes and bytes of the whole weights, by name: what consolidate has to arrive at."""
        total = hashlib.sha256()
        for name, weight in sorted(self.weights.items()):
            data = weight.contiguous().view(torch.uint8).numpy().tobytes()
            total.update(f"{name} {self.backend.dtype_name} {list(weight.shape)}\n".encode() + data)
        return total.hexdigest()


def _files(folder: Path, backend: NeuronBackend) -> set[Path]:
    """The files of this rank: its shards, and the metadata of its pipeline rank where it is the first of it."""
    of_rank = f"_tp_rank_{backend.tp_rank:02d}_pp_rank_{backend.pp_rank:02d}.pt"
    found = {
        path
        for path in folder.rglob("*")
        if path.is_file()
        and f"dp_rank_{backend.data_parallel_rank:02d}{of_rank}" in path.relative_to(folder).as_posix()
    }
    if backend.data_parallel_rank == backend.tp_rank == 0:
        found |= set(folder.rglob(f"mp_metadata_pp_rank_{backend.pp_rank}.json"))
    return found


def _shape(batch: MicroBatch) -> str:
    return "x".join(map(str, batch.input_ids.shape))


def _entry(path: Path, folder: Path) -> FileEntry:
    return FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, hash_file(path, sync=True))


def _whole(stored: Any, like: torch.Tensor) -> torch.Tensor:
    data = bytearray(b"".join(stored.chunks()))
    return torch.frombuffer(data, dtype=torch.float32).view(like.shape).clone()
