"""The backend on AWS Trainium: the vendor's model, adapter, optimizer and checkpoints under our own training loop.

optimum-neuron's model and LoRA layers, neuronx-distributed's tensor, pipeline and data parallelism with ZeRO-1 (bf16
weights, float32 masters), torch_xla's lazy tensors. neuron_config.py has every argument that is set, neuron_model.py
what is computed beside the vendor's code, neuron_checkpointing.py writes and loads. docs/design/0024 says what of it
ran where: nothing here has seen a chip; all of it runs on CPU, where NXD_CPU_MODE=1 puts gloo and the host in the place
of the devices.

On a device tensors are promises: what is computed between two mark_step is one compiled program, and reading a number
waits for all of them. So shapes never change, numbers that do (learning rate, scale, seed) go in as data, and loss and
norm are read at log lines and before checkpoints only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from finetune_trainer import methods
from finetune_trainer.backends import IGNORED, MicroBatch, ModelPlan, ParameterFacts, Placement
from finetune_trainer.backends.neuron_checkpointing import NeuronSnapshot, RankState, load_snapshot
from finetune_trainer.backends.neuron_config import (
    ADAPTER,
    attention_of,
    check_vendor,
    distributed_arguments,
    optimizer_arguments,
    training_arguments,
)
from finetune_trainer.backends.neuron_model import (
    PEFT_PREFIX,
    additive_mask,
    count_copies,
    decays,
    is_partial,
    norm_counting_copies_once,
    pad_batches,
    parameter_facts,
    reduce_input_gradient,
    shifted_labels,
    start_adapter,
)
from finetune_trainer.backends.torch_ranks import WRITING_TIMEOUT, ObjectChannel, TorchRanks, collective_timeout
from finetune_trainer.checkpoints import NEURON_FORMAT, NEURON_SIZES, Checkpoint
from finetune_trainer.errors import StageError, UserError
from finetune_trainer.neuron_rules import neuron_targets
from finetune_trainer.neuron_stack import instance_family
from finetune_trainer.spec_rules import FLASH_TOKENS
from finetune_trainer.throughput import ModelSize, model_size, peak_flops

_EXTRACT = "NEURON_EXTRACT_GRAPHS_ONLY"
_ROUNDING = "NEURON_RT_STOCHASTIC_ROUNDING_EN"
_RANKS_OF_DEVICE = {"trn1": 2, "trn1n": 2, "trn2": 4}
"""Ranks that share one device, whose peak throughput.py has: two cores, or four pairs of cores."""


@dataclass(frozen=True)
class _LateLoss:
    """The summed loss of a step so far, on the device, and what it is to be multiplied with."""

    total: torch.Tensor
    scale: float


class NeuronBackend(TorchRanks):
    """See backends.Backend."""

    whole_rows = True
    reads_late = True
    writes_beside_training = False  # the vendor's writer meets the other ranks over the devices' process group
    checkpoint_format: str | None = NEURON_FORMAT
    device_memory_words = ("RESOURCE_EXHAUSTED", "NRT_RESOURCE", "Failed to allocate")

    def __init__(self, placement: Placement, stuck: Callable[[StageError], None] | None = None) -> None:
        super().__init__(stuck)
        self._placement = placement
        self._tp_size, self._pp_size = placement.tensor_parallel_size, placement.pipeline_parallel_size
        self.data_parallel_size = max(1, self.world_size // (self._tp_size * self._pp_size))
        self.data_parallel_rank = self._tp_rank = self._pp_rank = 0  # until start()
        self.model_size: ModelSize | None = None
        self.peak_flops: float | None = None
        self.is_tracing = os.environ.get(_EXTRACT) == "1"
        self.keeps_documents_apart = True
        self._waiting: list[tuple[MicroBatch, int]] = []
        self._engine: Any = None
        self._total = torch.zeros(())
        self._scale = 0.0

    # ---- process group

    def start(self) -> None:
        check_vendor()
        from neuronx_distributed.parallel_layers import layers, parallel_state
        from neuronx_distributed.trainer import neuronx_distributed_config
        from neuronx_distributed.utils import cpu_mode

        layers._linear_autograd_bwd_grad_reduce = reduce_input_gradient  # with bf16 the vendor's loses its result
        self._on_host = cpu_mode()
        # Before there is a process group: afterwards it makes the groups of ranks once more.
        self._settings = neuronx_distributed_config(
            **distributed_arguments(tensor_parallel_size=self._tp_size, pipeline_parallel_size=self._pp_size)
        )
        if self._on_host:
            self.device = torch.device("cpu")
        else:
            import torch_xla.core.xla_model as xm
            import torch_xla.distributed.xla_backend  # noqa: F401 - registers the process group's kind

            self.device = xm.xla_device()
        with self._guard("joining the process group"):
            kind = "gloo" if self._on_host else "xla"
            if self.world_size == 1:
                store: Any = dist.HashStore()  # type: ignore[attr-defined]
            else:
                store = next(dist.rendezvous("env://"))[0]  # type: ignore[attr-defined]
            timeout = timedelta(seconds=2 * collective_timeout() + 60)
            dist.init_process_group(kind, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout)
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=self._tp_size, pipeline_model_parallel_size=self._pp_size
            )
            # Objects go from host to host: on the devices each would be a program of its own.
            group = dist.new_group(backend="gloo", timeout=WRITING_TIMEOUT)
        self._channel = ObjectChannel(self.rank, self.world_size, self._collective, "", group)
        self.writers = self._channel
        self._tp_group = parallel_state.get_tensor_model_parallel_group()
        self._tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self._pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        self.data_parallel_rank = parallel_state.get_data_parallel_rank()
        self.data_parallel_size = parallel_state.get_data_parallel_size()
        if self.world_size > 1:
            self._meet(store)

    def stop(self) -> None:
        if dist.is_initialized():
            from neuronx_distributed.trainer.checkpoint import finalize_checkpoint

            finalize_checkpoint()  # whatever the vendor still writes would be lost with the process
            self.gather(None)
            if self._watch:
                self._watch.close()
            if self._on_host:
                dist.destroy_process_group()

    # ---- model

    def build(self, plan: ModelPlan) -> None:
        method = methods.parse_method(plan.method)
        self._plan = plan
        fits = plan.row_length <= FLASH_TOKENS and self._pp_size == 1
        if plan.keep_masks and not fits:
            if plan.packing != "wrapped":
                raise UserError(
                    "PackingNotSupported",
                    f"dataset.packing is {plan.packing}, rows have {plan.row_length} tokens and "
                    f"pipelineParallelSize is {self._pp_size}: documents of a row are kept apart by a mask, which "
                    f"flash attention (rows above {FLASH_TOKENS} tokens) and pipeline stages do not take; use packing "
                    "none, or wrapped, in whose rows documents see what stands before them",
                )
            if self.rank == 0:
                print("packing is wrapped: documents of a row see what stands before them in it", flush=True)
        self._masks = plan.keep_masks and fits
        self.keeps_documents_apart = not plan.keep_masks or fits
        with self._guard("loading the model"):
            self._core = self._load(plan, method)
            self._engine = self._cut_into_stages() if self._pp_size > 1 else None
        self._make_optimizer(plan)
        self._measure(plan, method)
        if self._engine is not None:
            self._warm_up(plan)

    def parameters(self) -> dict[str, ParameterFacts]:
        return self._facts

    def layout(self) -> Mapping[str, Any]:
        sizes = (self._tp_size, self._pp_size, self.data_parallel_size)
        return dict(zip(NEURON_SIZES, sizes, strict=True))

    def device_memory(self) -> int | None:
        return None  # the runtime tells it to its own monitor only

    def adapter_config(self, source: str) -> bytes | None:
        configs = getattr(self._core, "peft_config", None)
        if configs is None:
            return None
        from optimum.neuron.models.training import to_original_peft_config_for_model

        config = to_original_peft_config_for_model(self._core.base_model, configs[ADAPTER], inplace=False)
        return methods.encode_peft_config(config, source)

    # ---- one step

    def micro_step(self, batch: MicroBatch, scale: float, seed: int, *, last: bool) -> None:
        self._scale = scale
        if self._engine is not None:
            self._waiting.append((batch, seed))
            if last:
                self._run_pipeline()
            return
        with self._guard("a micro step"):
            self._seed(seed)
            # The vendor averages gradients over data parallel ranks; ours are a sum.
            factor = self._number(scale * self.data_parallel_size)
            loss = self._loss(batch)
            (loss * factor).backward()  # type: ignore[no-untyped-call]
            self._total = self._total + loss.detach()
            self._mark_step()

    def reduce(self, extras: Sequence[float]) -> tuple[_LateLoss, list[float]]:
        # Gradients are summed inside update(). What the hosts have to say does not wait for the devices.
        sums = [math.fsum(column) for column in zip(*self.gather(list(extras)), strict=True)] if extras else []
        return _LateLoss(self._total, self._scale), sums

    def update(self, learning_rate: float, max_gradient_norm: float) -> torch.Tensor:
        if max_gradient_norm != self._plan.max_gradient_norm:
            raise ValueError(f"the optimizer was made to clip at {self._plan.max_gradient_norm}")
        with self._guard("the optimizer's step"):
            for gradient in self._gradients(self._partial):
                dist.all_reduce(gradient, group=self._tp_group)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            norm: torch.Tensor = self._optimizer.grad_norm
            self._optimizer.zero_grad()
            self._total = self._number(0.0)
            self._mark_step()
        return norm

    def read(self, numbers: Sequence[tuple[_LateLoss, torch.Tensor]]) -> list[tuple[float, float]]:
        with self._collective("reading loss and norm"):
            own = [(self._share(float(loss.total.cpu()) * loss.scale), float(norm.cpu())) for loss, norm in numbers]
        ranks = self.gather(own)
        # The norm is the whole gradient's in every rank.
        return [(math.fsum(rank[at][0] for rank in ranks), norm) for at, (_, norm) in enumerate(ranks[0])]

    def held_out_loss(self, batches: Iterable[MicroBatch]) -> float:
        total = self._number(0.0)
        with self._guard("measuring the held-out loss"), self._evaluating(), torch.no_grad():
            if self._engine is not None:
                for group in pad_batches(batches, self._plan.micro_steps):
                    total = total + self._pipeline_loss(self._engine.run_eval, group)
            else:
                for batch in batches:
                    total = total + self._loss(batch)
                    self._mark_step()
        return math.fsum(self.gather(self._share(float(total.cpu()))))

    @property
    def rounds_at_random(self) -> bool:
        """Whether the device rounds float32 to bf16 at random, so that no program gives the same bits twice."""
        return not self._on_host and os.environ.get(_ROUNDING) == "1"

    # ---- packing

    def packing_error(self, batch: MicroBatch, document: int) -> tuple[float, float]:
        """Told by the document's loss: that needs no program but the one that measures the held-out loss."""
        inside = batch.segment_ids[0] == document
        other = batch.input_ids[0].copy()
        other[~inside] = (other[~inside] + 1) % self._core.config.vocab_size
        first = int(inside.argmax())
        moved = [np.roll(row, -first) for row in (batch.input_ids[0], batch.targets[0], batch.segment_ids[0])]
        there = moved[2] == document
        places = np.arange(len(there), dtype=np.int32) * there
        packed = (batch.input_ids[0], batch.targets[0], batch.position_ids[0], batch.segment_ids[0])
        changed = (other, *packed[1:])
        alone = (moved[0], np.where(there, moved[1], IGNORED), places, there.astype(np.int32))
        with self._guard("the packing probe"), self._evaluating(), torch.no_grad():
            expected = self._document_loss(packed, inside)
            by_itself = self._document_loss(alone, there)
            neighbours = self._document_loss(changed, inside)
        if self.is_tracing:  # none of them means anything, and any may be zero
            return 0.0, 0.0
        return abs(by_itself - expected) / expected, abs(neighbours - expected) / expected

    # ---- checkpoints

    def snapshot(self) -> NeuronSnapshot:
        return NeuronSnapshot(self._state())

    def load(self, checkpoint: Checkpoint) -> None:
        with self._guard("loading the checkpoint"):
            load_snapshot(self._state(), checkpoint)
            self._mark_step()

    # ---- inside: making

    def _load(self, plan: ModelPlan, method: methods.Method) -> Any:
        """The vendor's model on the host, with its adapter, what does not train frozen."""
        from optimum.neuron.models.training import GQAQKVColumnParallelLinearSpec, NeuronModelForCausalLM
        from optimum.neuron.models.training.config import TrainingNeuronConfig
        from optimum.neuron.peft import get_peft_model
        from peft import LoraConfig

        config = TrainingNeuronConfig(
            **training_arguments(
                tensor_parallel_size=self._tp_size,
                pipeline_parallel_size=self._pp_size,
                micro_steps=plan.micro_steps,
                gradient_checkpointing=plan.gradient_checkpointing,
                keeps_documents_apart=self._masks,
            )
        )
        # Equal on every rank: what the vendor draws for what it holds whole on each of them must be equal.
        torch.manual_seed(plan.seed)
        if self._pp_size > 1:
            _sum_losses()
        model = NeuronModelForCausalLM.from_pretrained(
            str(plan.folder),
            config,
            dtype=torch.bfloat16 if plan.precision == "bf16" else torch.float32,
            attn_implementation=attention_of(plan.row_length, keeps_documents_apart=self._masks),
            local_files_only=True,
            use_safetensors=True,
        )
        model.config.use_cache = False
        if method.lora is None:
            return model
        lora = method.lora
        adapter = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(neuron_targets(lora.targets)),
            use_rslora=lora.variant == "rslora",
            bias="none",
        )
        # Or else it would be float32 beside a bf16 model: its masters are the optimizer's.
        narrow = model.dtype
        model = get_peft_model(model, adapter, adapter_name=ADAPTER, autocast_adapter_dtype=False)
        for parameter in model.parameters():
            # The A of a layer with replicated K and V is left float32 beside a bf16 B, and its forward pass fails.
            if parameter.requires_grad and parameter.dtype != narrow:
                parameter.data = parameter.data.to(narrow)
        start_adapter(
            model,
            plan.seed,
            self._tp_rank,
            self._tp_size,
            GQAQKVColumnParallelLinearSpec.compute_query_indices_for_rank,
        )
        return model

    def _cut_into_stages(self) -> Any:
        from optimum.neuron.models.training.pipeline_utils import create_nxdpp_model

        engine = create_nxdpp_model(self._core)
        engine.move_model_to_device()
        return engine

    def _make_optimizer(self, plan: ModelPlan) -> None:
        from neuronx_distributed.parallel_layers.grads import get_grad_norm
        from neuronx_distributed.trainer import initialize_parallel_optimizer
        from neuronx_distributed.utils.model_utils import move_model_to_device

        copies = count_copies(self._core)
        prefix = ""
        if self._engine is not None:
            named = list(self._engine.local_named_parameters())
            prefix = PEFT_PREFIX if hasattr(self._core, "peft_config") else ""
        else:
            if not self._on_host:
                move_model_to_device(self._core, self.device)
            self._core.train()
            named = list(self._core.named_parameters())
        # ZeRO-1 gets what trains and nothing else: its hooks fail on a parameter without a gradient.
        trained = dict(sorted((prefix + name, p) for name, p in named if p.requires_grad))
        groups = [
            {"params": [p for n, p in trained.items() if decays(n, p)], "weight_decay": plan.weight_decay},
            {"params": [p for n, p in trained.items() if not decays(n, p)], "weight_decay": 0.0},
        ]
        order = [n for n, p in trained.items() if decays(n, p)] + [n for n, p in trained.items() if not decays(n, p)]
        with self._collective("making the optimizer"):
            self._optimizer = initialize_parallel_optimizer(
                self._settings,
                torch.optim.AdamW,
                [group for group in groups if group["params"]],
                **optimizer_arguments(plan.max_gradient_norm),
            )
        self._trained = {name: trained[name] for name in order}
        self._partial = [p for name, p in self._trained.items() if self._tp_size > 1 and is_partial(name)]
        counted = {id(trained[name]): count for name, count in copies.items() if name in trained}
        if counted:
            zero = self._optimizer.optimizer
            zero._get_params_and_grad_norm = partial(norm_counting_copies_once, zero, counted, get_grad_norm)
        self._total = self._number(0.0)
        local = {methods.file_name(name): p for name, p in self._trained.items()}
        local_copies = {methods.file_name(name): count for name, count in copies.items()}
        stages = self.gather((self._pp_rank, parameter_facts(local, local_copies, self._tp_size), list(local)))
        self._facts = dict(sorted((name, facts) for _, found, _ in stages for name, facts in found.items()))
        self._order = {str(stage): names for stage, _, names in stages}

    def _measure(self, plan: ModelPlan, method: methods.Method) -> None:
        from finetune_trainer.model_loading import load_skeleton

        whole = model_size(load_skeleton(plan.folder))
        if whole is not None and method.lora is not None:
            adapter = sum(math.prod(facts.shape) for facts in self._facts.values())
            whole = ModelSize(whole.weights + adapter, adapter, whole.attention_width)
        self.model_size = whole
        family = instance_family(self._placement.instance_type or "")
        peak = peak_flops(family, plan.precision)
        self.peak_flops = peak / _RANKS_OF_DEVICE[family] if peak and family in _RANKS_OF_DEVICE else None

    def _warm_up(self, plan: ModelPlan) -> None:
        """The engine's first pass finds out shapes with a real forward pass, which takes random numbers: a resumed
        run's first step would have another dropout than an uninterrupted one's. So the first pass of every run is
        thrown away."""
        rows = np.zeros((1, plan.row_length), dtype=np.int32)
        batch = MicroBatch(rows, rows + IGNORED, rows, rows)
        group = [MicroBatch(*(np.repeat(a, self._rows, axis=0) for a in _arrays(batch)))] * plan.micro_steps
        with self._guard("the first pass of the pipeline"):
            self._pipeline_loss(self._engine.run_train, group)
            self._optimizer.zero_grad()
            self._mark_step()

    def _state(self) -> RankState:
        return RankState(
            channel=self._channel,
            rank=self.rank,
            world_size=self.world_size,
            tp_rank=self._tp_rank,
            pp_rank=self._pp_rank,
            dp_rank=self.data_parallel_rank,
            layout=dict(self.layout()),
            order=self._order,
            core=self._core,
            engine=self._engine,
            optimizer=self._optimizer,
            trained=self._trained,
            base=Path(self._plan.folder),
            adapter_config=self.adapter_config(self._plan.folder.name),
            rounds_at_random=self.rounds_at_random,
        )

    # ---- inside: running

    def _loss(self, batch: MicroBatch) -> torch.Tensor:
        """The summed loss of a micro batch, in float32, on the device."""
        arguments: dict[str, Any] = {
            "input_ids": torch.from_numpy(batch.input_ids).long().to(self.device),
            "labels": shifted_labels(batch).to(self.device),
            "reduction": "sum",
        }
        # Without packing padding stands at the end, where no real token ever looks.
        if self._masks:
            segments = torch.from_numpy(batch.segment_ids).to(self.device)
            arguments["attention_mask"] = additive_mask(segments, self._core.dtype)
            arguments["position_ids"] = torch.from_numpy(batch.position_ids).long().to(self.device)
        loss: torch.Tensor = self._core(**arguments).loss
        return loss

    def _run_pipeline(self) -> None:
        waiting, self._waiting = self._waiting, []
        with self._guard("a micro step"):
            self._seed(waiting[0][1])
            self._total = self._pipeline_loss(self._engine.run_train, [batch for batch, _ in waiting])
            # The engine divides by the number of micro batches, the vendor's reduction by the data parallel ranks.
            factor = self._number(len(waiting) * self._scale * self.data_parallel_size)
            for gradient in self._gradients(self._trained.values()):
                gradient.mul_(factor)
            self._mark_step()

    @staticmethod
    def _gradients(parameters: Iterable[torch.nn.Parameter]) -> Iterator[torch.Tensor]:
        """Gradients before the optimizer's step: accumulated in float32 they are in main_grad, and .grad is empty."""
        for parameter in parameters:
            for gradient in (parameter.grad, getattr(parameter, "main_grad", None)):
                if gradient is not None:
                    yield gradient

    def _pipeline_loss(self, run: Callable[..., Any], group: Sequence[MicroBatch]) -> torch.Tensor:
        """One pass of micro batches through all stages; their summed loss in the last stage, 0 elsewhere."""
        ids = torch.cat([torch.from_numpy(batch.input_ids).long() for batch in group])
        labels = torch.cat([shifted_labels(batch) for batch in group])
        loss = run(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        if loss is None or self._pp_rank != self._pp_size - 1:
            return self._number(0.0)
        # The engine gives the mean over its micro batches, of which each was summed (see _summed_losses).
        total: torch.Tensor = loss.detach().float().reshape(()) * len(group)
        return total

    def _document_loss(self, row: Sequence[Any], inside: Any) -> float:
        """The loss of the positions `inside` of one row, as all rows of a micro batch but with no other targets."""
        rows = [np.repeat(array[None], self._rows, axis=0) for array in row]
        rows[1] = np.where(inside[None] & (np.arange(self._rows) == 0)[:, None], rows[1], IGNORED).astype(np.int32)
        loss = self._loss(MicroBatch(*rows))
        self._mark_step()
        return float(loss.cpu())

    @property
    def _rows(self) -> int:
        return self._plan.micro_batch_size

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """No dropout. The pipeline engine sees to it itself."""
        if self._engine is not None:
            yield
            return
        self._core.eval()
        try:
            yield
        finally:
            self._core.train()

    def _number(self, value: float) -> torch.Tensor:
        """A number that goes into a program as data: written into it, each would make another program."""
        return torch.tensor(value, dtype=torch.float32).to(self.device)

    def _share(self, loss: float) -> float:
        """What this rank adds to the sum over all ranks of a loss that tensor parallel ranks have in common."""
        return loss if self._tp_rank == 0 and self._pp_rank == self._pp_size - 1 else 0.0

    def _seed(self, seed: int) -> None:
        """The same on all ranks of a data parallel rank's copy: they must drop the same inputs."""
        torch.manual_seed(seed)
        if not self._on_host:
            import torch_xla.core.xla_model as xm

            xm.set_rng_state(seed, self.device)

    def _mark_step(self) -> None:
        from neuronx_distributed.utils import mark_step

        mark_step()


def _arrays(batch: MicroBatch) -> tuple[Any, ...]:
    return batch.input_ids, batch.targets, batch.position_ids, batch.segment_ids


def _sum_losses() -> None:
    """Have the vendor's models sum their loss instead of averaging it, whoever calls them.

    The pipeline engine traces the model and calls it without further arguments, so that the reduction must be in it
    before it is made. Averages over single micro batches could not be put right afterwards.
    """
    from optimum.neuron.models.training import loss_utils
    from optimum.neuron.models.training.granite import modeling_granite
    from optimum.neuron.models.training.llama import modeling_llama
    from optimum.neuron.models.training.qwen3 import modeling_qwen3

    def summed(logits: Any, labels: Any, vocab_size: int, **options: Any) -> Any:
        return loss_utils.ForCausalLMLoss(logits, labels, vocab_size, **{**options, "reduction": "sum"})

    for module in (modeling_llama, modeling_qwen3, modeling_granite):
        module.ForCausalLMLoss = summed
