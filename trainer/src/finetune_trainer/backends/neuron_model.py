"""What backends/neuron.py must know of the vendor's model beside running it: its parameters, their start, their copies.

All of it is told from the modules' and parameters' own attributes (tensor_model_parallel, kv_size_multiplier, specs),
so that nothing here imports the vendor's packages and the tests need none of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune_trainer.attention_masks import document_mask
from finetune_trainer.backends import IGNORED, MicroBatch, ParameterFacts

PEFT_PREFIX = "base_model.model."
"""Of names in peft's model. The pipeline engine's local names have lost it, metadata and files have it."""

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_COPIED = ("weight_k", "weight_v", "bias_k", "bias_v")
_GROUPED_SPEC = "GQAQKVColumnParallelLinearSpec"

QueryHeads = Callable[[int, int, int, int, int], Any]
"""(tp size, tp rank, heads, KV heads, copies of the KV heads) -> numbers of the query heads that the rank holds."""


def count_copies(model: Any) -> dict[str, int]:
    """{name: m} of the parameters that hold K and V of replicated heads, of which m tensor parallel ranks have each.

    The vendor's gradient norm counts each copy, since it marks them as parts of one whole.
    """
    found = {}
    for module_name, module in model.named_modules():
        copies = int(getattr(module, "kv_size_multiplier", 1) or 1)
        # LoRA's wrapper and the attention around it have the number as well; the parameters are their children's.
        own = dict(module.named_parameters(recurse=False))
        found.update({f"{module_name}.{name}": copies for name in own if copies > 1 and name in _COPIED})
    return found


def parameter_facts(
    named: Mapping[str, torch.Tensor], copies: Mapping[str, int], tp_size: int
) -> dict[str, ParameterFacts]:
    """The facts of one pipeline rank's parameters, whole: cut dimensions times the ranks, copies counted once."""
    found = {}
    for name, parameter in named.items():
        shape = list(parameter.shape)
        if getattr(parameter, "tensor_model_parallel", False):
            axis = parameter.partition_dim  # type: ignore[attr-defined]
            shape[axis] = shape[axis] * tp_size // copies.get(name, 1)
        found[name] = ParameterFacts(tuple(shape), _DTYPES[parameter.dtype], decays(name, parameter))
    return found


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Weight decay is for matrices: not for biases and norms, which have one dimension."""
    return parameter.dim() > 1 and not name.endswith((".bias", ".bias_q", ".bias_k", ".bias_v"))


def is_partial(name: str) -> bool:
    """Whether each tensor parallel rank has only its own heads' part of the gradient of what all of them hold whole.

    So it is with Qwen3's norms of query and key: one weight for all heads, of which a rank has some. The vendor neither
    marks nor sums it, and the ranks' copies drift apart.
    """
    return name.endswith((".q_norm.weight", ".k_norm.weight"))


@dataclass(frozen=True)
class _Reduction:
    """An all-reduce under way, of a copy in another dtype; what waits for it finds the sum in the original."""

    work: Any
    copy: torch.Tensor
    original: torch.Tensor

    def wait(self) -> None:
        self.work.wait()
        self.original.copy_(self.copy)


def reduce_input_gradient(ctx: Any, grad_input: torch.Tensor, _original_dtype: torch.dtype) -> Any:
    """In the place of the vendor's function: sum the gradient of a column parallel layer's input over the ranks.

    The vendor's (neuronx-distributed 0.15 and all later ones) sums a copy in ctx.reduce_dtype, float32, and loses it:
    with bf16 activations the gradient stays that of the rank's own columns, in every such layer, and training goes on
    with wrong gradients and without a word. Sequence parallelism takes another way, which is why few have met it.
    Returns what the vendor's callers wait for, None where nothing is to be summed.
    """
    if not ctx.async_grad_allreduce:
        return None
    wide = grad_input.to(ctx.reduce_dtype)
    work = torch.distributed.all_reduce(wide, group=ctx.process_group, async_op=True)
    return work if wide is grad_input else _Reduction(work, wide, grad_input)


def start_adapter(model: Any, seed: int, tp_rank: int, tp_size: int, query_heads: QueryHeads) -> None:
    """Give every A of the adapter its start: the rank's part of one matrix that depends on seed and name alone.

    The vendor draws on each rank for itself. With equal seeds all parts of a row parallel layer's A are then the same
    numbers, within the bound of a layer with the rank's few inputs; with unequal seeds the copies of an A that every
    rank holds whole are not copies. Drawn whole and cut, the start does not depend on the split. It is peft's:
    uniform within 1 / sqrt(inputs) (kaiming_uniform_ with a = sqrt 5); B starts at zero, an embedding's B normal.
    """
    places = dict(_grouped_outputs(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_meta or not parameter.requires_grad:
                continue
            if ".lora_A." in name:
                is_cut = getattr(parameter, "tensor_model_parallel", False)
                inputs = parameter.shape[1] * (tp_size if is_cut else 1)
                whole = draw_a(seed, name, parameter.shape[0], inputs)
                if is_cut:
                    heads = places.get(name.split(".lora_A.")[0])
                    whole = whole[:, _columns(inputs, tp_rank, tp_size, heads, query_heads)]
                parameter.copy_(whole)
            elif ".lora_embedding_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=_generator(seed, name)))


def draw_a(seed: int, name: str, rank: int, inputs: int) -> torch.Tensor:
    """(rank, inputs), float32: the start of the A called `name`; see start_adapter."""
    bound = 1 / math.sqrt(inputs)
    return torch.empty(rank, inputs).uniform_(-bound, bound, generator=_generator(seed, name))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class _Heads:
    heads: int
    kv_heads: int
    copies: int


def _grouped_outputs(model: Any) -> Iterator[tuple[str, _Heads]]:
    """(name of an output projection, its heads) where the query heads are dealt to the ranks with their KV heads."""
    for name, module in model.named_modules():
        for spec in getattr(module, "specs", None) or ():
            if type(spec).__name__ == _GROUPED_SPEC:
                heads = _Heads(spec.num_attention_heads, spec.num_key_value_heads, spec.kv_size_multiplier)
                yield f"{name}.{spec.output_projection_name}", heads


def _columns(
    inputs: int, tp_rank: int, tp_size: int, heads: _Heads | None, query_heads: QueryHeads
) -> Sequence[int] | slice:
    """Which inputs of a row parallel layer the rank holds, in its own order."""
    if heads is None:
        share = inputs // tp_size
        return slice(tp_rank * share, (tp_rank + 1) * share)
    size = inputs // heads.heads
    own = query_heads(tp_size, tp_rank, heads.heads, heads.kv_heads, heads.copies)
    return [int(head) * size + column for head in own for column in range(size)]


def shifted_labels(batch: MicroBatch) -> torch.Tensor:
    """(m, s): labels from which the vendor's loss, which shifts them by one itself, makes the batch's targets."""
    labels = torch.full(batch.targets.shape, IGNORED, dtype=torch.long)
    labels[:, 1:] = torch.from_numpy(batch.targets[:, :-1])
    return labels


def additive_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(m, 1, s, s): what the vendor's eager attention adds to its scores so that documents do not see each other.

    Large, and not infinite: a row of nothing but infinities would be no numbers after softmax.
    """
    mask = document_mask(segments)
    least = torch.finfo(torch.bfloat16).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, least)


def pad_batches(batches: Iterable[MicroBatch], size: int) -> Iterator[list[MicroBatch]]:
    """Groups of `size` batches, the last one filled up with batches that have no target."""
    group: list[MicroBatch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        last = group[-1]
        empty = MicroBatch(last.input_ids, last.targets * 0 + IGNORED, last.position_ids, last.segment_ids)
        yield [*group, *[empty] * (size - len(group))]


def norm_counting_copies_once(
    zero: Any, copies: Mapping[int, int], get_grad_norm: Callable[..., torch.Tensor], norm_type: float = 2.0
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(shards with a gradient, their global 2-norm) of a ZeRO-1 optimizer; `copies` by id of its parameters.

    The vendor's own counts a replicated K or V once for each copy, and clips too hard. Here the parameters of each
    number of copies are summed for themselves, and divided by it. All ranks: each number is a reduction of its own.
    """
    shards: dict[int, list[torch.Tensor]] = {}
    for group, sharded in zip(zero.param_groups, zero.base_optimizer.param_groups, strict=True):
        for parameter, shard in zip(group["params"], sharded["params"], strict=True):
            if shard.grad is None:
                continue
            for flag in ("shared", "tensor_model_parallel"):
                if hasattr(parameter, flag):
                    setattr(shard, flag, getattr(parameter, flag))
            shards.setdefault(copies.get(id(parameter), 1), []).append(shard)
    squares = [
        get_grad_norm(
            shards[count],
            norm_type=norm_type,
            zero1_optimizer=True,
            zero1_optimizer_groups=zero.sharding_groups,
        ).square()
        / count
        for count in sorted(shards)
    ]
    return [shard for count in sorted(shards) for shard in shards[count]], torch.stack(squares).sum(dim=0).sqrt()
