"""Writes sharded checkpoints as optimum-neuron and neuronx-distributed do, from the rules of their layout alone.

The oracle of the tests of consolidation, and what the rehearsal's stand-in for the vendor writes with. It goes from
whole tensors to the ranks' files; finetune_trainer's reader goes the other way and shares no code with it. Needs torch
only, neither torch_xla nor the vendor's packages.

`write_checkpoint` writes all ranks' files, `write_rank` one rank's; who calls the latter calls `write_marks` once after
all ranks have written. Tensors are whole and have Hugging Face's names (a full model) or those of peft's adapter files
(an adapter). What the vendor shares between projections must be shared in what is given: one A for q, k and v where KV
heads are replicated, one A for gate and up.
"""

from __future__ import annotations

import contextlib
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Parameter:
    """One parameter of the vendor's module tree, on one rank.

    `name` as its metadata has it (with the adapter's name), `key` as the files have it, `sources` the whole tensors it
    is made of, `cut` makes the rank's part of them. `axis` is None for what every rank holds whole.
    """

    name: str
    key: str
    sources: tuple[str, ...]
    axis: int | None
    cut: Callable[..., torch.Tensor]
    stride: int = 1
    flagged: bool = True


@dataclass
class ShardLayout:
    """How a model of `config` (config.json) is cut over tensor and pipeline parallel ranks.

    `adapter_config` makes it the layout of an adapter. `kv_size_multiplier` None is the vendor's own choice.
    `fuse_gate_up` False is how releases before 0.2 do it.
    """

    config: Mapping[str, Any]
    tp: int
    pp: int = 1
    adapter_config: Mapping[str, Any] | None = None
    adapter_name: str = "default"
    fuse_qkv: bool = False
    kv_size_multiplier: int | None = None
    fuse_gate_up: bool = True
    heads: int = field(init=False)
    kv_heads: int = field(init=False)
    layers: int = field(init=False)

    def __post_init__(self) -> None:
        self.heads = self.config["num_attention_heads"]
        self.kv_heads = self.config.get("num_key_value_heads") or self.heads
        self.layers = self.config["num_hidden_layers"]
        for what, count in (
            ("num_attention_heads", self.heads),
            ("intermediate_size", self.config["intermediate_size"]),
        ):
            if count % self.tp:
                raise ValueError(f"{what} {count} is no multiple of tp {self.tp}")
        if self.layers < self.pp:
            raise ValueError(f"{self.layers} layers on {self.pp} pipeline ranks")
        if self.grouped and (self.kv_heads * self.multiplier) % self.tp:
            raise ValueError(f"{self.kv_heads} KV heads times {self.multiplier} are no multiple of tp {self.tp}")

    @property
    def grouped(self) -> bool:
        """Whether q, k and v are the vendor's GQA projection, which replicates KV heads."""
        return self.kv_heads < self.tp or self.kv_heads % self.tp != 0

    @property
    def multiplier(self) -> int:
        if not self.grouped:
            return 1
        return self.kv_size_multiplier or max(1, self.tp // self.kv_heads)

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.heads)

    @property
    def prefix(self) -> str:
        return PEFT_PREFIX if self.adapter_config is not None else ""

    def stage_of(self, name: str) -> int:
        """The pipeline rank that owns what is called `name`."""
        parts = name.split(".")
        if "layers" in parts:
            return int(parts[parts.index("layers") + 1]) * self.pp // self.layers
        return 0 if "embed_tokens" in parts else self.pp - 1

    def local_heads(self, tp_rank: int) -> tuple[list[int], list[int]]:
        """Original numbers of the KV heads that `tp_rank` holds, and of its query heads, in its own order."""
        kv_per_rank = self.kv_heads * self.multiplier // self.tp
        queries_per_kv = self.heads // self.tp // kv_per_rank
        kv, queries = [], []
        for place in range(kv_per_rank):
            # The KV heads are laid out one copy after the other and dealt to the ranks in order.
            copy, head = divmod(tp_rank * kv_per_rank + place, self.kv_heads)
            kv.append(head)
            first = head * (self.heads // self.kv_heads) + copy * queries_per_kv
            queries += range(first, first + queries_per_kv)
        return kv, queries

    def parameters(self, tp_rank: int) -> list[_Parameter]:
        """Every parameter of the model in the vendor's order, as `tp_rank` holds it."""
        found: list[_Parameter] = [*self._embedding("model.embed_tokens", tp_rank)]
        for number in range(self.layers):
            layer = f"model.layers.{number}"
            found += self._attention(f"{layer}.self_attn", tp_rank)
            found += self._mlp(f"{layer}.mlp", tp_rank)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found.append(self._whole(f"{layer}.{norm}.weight"))
        found.append(self._whole("model.norm.weight"))
        if not self.config.get("tie_word_embeddings"):
            found += self._linear("", "lm_head", "column", tp_rank)
        return found

    def metadata(self, pp_rank: int) -> dict[str, Any]:
        """mp_metadata_pp_rank_<pp_rank>.json."""
        parameters: dict[str, Any] = {}
        for parameter in self.parameters(0):
            if self.stage_of(parameter.name) != pp_rank:
                continue
            parameters[parameter.name] = {"tensor_model_parallel": False}
            if parameter.axis is not None and parameter.flagged:
                parameters[parameter.name] = {
                    "tensor_model_parallel": True,
                    "partition_dim": parameter.axis,
                    "partition_stride": parameter.stride,
                    "num_partitions": self.tp,
                }
        specs = []
        for number in range(self.layers):
            layer = f"{self.prefix}model.layers.{number}"
            owned = self.stage_of(layer) == pp_rank
            for module, spec in ((f"{layer}.self_attn", self._attention_spec()), (f"{layer}.mlp", self._mlp_spec())):
                specs.append({"module_fully_qualified_name": module, "specs": [spec] if spec and owned else []})
        return {"parameters": parameters, "model_weight_transformation_specs": specs}

    def old_metadata(self, pp_rank: int) -> dict[str, Any]:
        """mp_metadata_pp_rank_<pp_rank>.pt of releases before 0.2: adapter names left out, GQA told by names."""
        sharded, names, outputs = {}, {}, set()
        for parameter in self.parameters(0):
            if self.stage_of(parameter.name) != pp_rank:
                continue
            parallel = parameter.axis is not None
            sharded[parameter.key] = {"kind": "sharded" if parallel else "tied", "partition_dim": parameter.axis}
            module, _, last = parameter.key.rpartition(".")
            if module.endswith(".qkv_proj"):
                for letter in "qkv" if last.endswith("_qkv") else last[-1]:
                    names[f"{module.removesuffix('qkv_proj')}{letter}_proj.{last.rpartition('_')[0]}"] = parameter.key
                outputs.add(f"{module.removesuffix('qkv_proj')}o_proj.weight")
        grouped = self.grouped
        return {
            "sharded_metadata": sharded,
            "gqa_qkv_metadata": {
                "original_names_to_gqa_qkv_names": names,
                "output_projections_names": outputs,
                "num_attention_heads": self.heads if grouped else None,
                "num_key_value_heads": self.kv_heads if grouped else None,
                "kv_size_multiplier": self.multiplier if grouped else None,
                "fuse_qkv": self.fuse_qkv if grouped else None,
                "q_output_size_per_partition": self._local_rows()[0] if grouped else None,
                "kv_output_size_per_partition": self._local_rows()[1] if grouped else None,
            },
        }

    def is_target(self, linear: str) -> bool:
        """Whether the adapter has a pair of matrices on the layers called `linear`."""
        targets = (self.adapter_config or {}).get("target_modules") or ()
        wanted = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}.get(linear, linear)
        return wanted in targets

    def _local_rows(self) -> tuple[int, int]:
        """Rows of q and of k or v on one rank of the GQA projection."""
        return self.heads // self.tp * self.head_dim, self.kv_heads * self.multiplier // self.tp * self.head_dim

    def _attention_spec(self) -> list[Any] | None:
        if self.grouped:
            q_rows, kv_rows = self._local_rows()
            names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
            fields = {
                "gqa_qkv_projection_name": "qkv_proj",
                **{f"{word}_projection_name": name for word, name in names.items()},
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "kv_size_multiplier": self.multiplier,
                "q_output_size_per_partition": q_rows,
                "kv_output_size_per_partition": kv_rows,
                "fuse_qkv": self.fuse_qkv,
                "bias": bool(self.config.get("attention_bias")),
                "tp_size": self.tp,
                "peft_type": "lora" if self.is_target("qkv_proj") else None,
            }
            return ["GQAQKVColumnParallelLinearSpec", fields]
        if self._fuses_mha:
            rows = self.heads * self.head_dim
            return self._fused_spec("qkv_proj", ("q_proj", "k_proj", "v_proj"), rows, "attention_bias")
        return None

    def _mlp_spec(self) -> list[Any] | None:
        if not self.fuse_gate_up:
            return None
        return self._fused_spec("gate_up_proj", ("gate_proj", "up_proj"), self.config["intermediate_size"], "mlp_bias")

    def _fused_spec(self, fused: str, parts: Sequence[str], rows: int, bias: str) -> list[Any]:
        fields = {
            "fused_linear_name": fused,
            "linear_names": list(parts),
            "bias": bool(self.config.get(bias)),
            "fuse_axis": 0,
            "original_dims": [rows] * len(parts),
            "tp_size": self.tp,
            "peft_type": "lora" if self.is_target(fused) else None,
        }
        return ["FusedLinearsSpec", fields]

    @property
    def _fuses_mha(self) -> bool:
        return self.fuse_qkv and self.heads == self.kv_heads and not self.grouped

    def _embedding(self, module: str, tp_rank: int) -> Iterator[_Parameter]:
        name = f"{self.prefix}{module}"
        rows = self._rank_cut(0, tp_rank)
        if not self.is_target(module.rpartition(".")[2]):
            yield _Parameter(f"{name}.weight", f"{name}.weight", (f"{name}.weight",), 0, rows)
            return
        stored = f"{name}.base_layer.weight"
        yield _Parameter(stored, stored, (stored,), 0, rows)
        for part in ("lora_embedding_A", "lora_embedding_B"):
            key = f"{name}.{part}"
            yield _Parameter(f"{key}.{self.adapter_name}", key, (key,), None, _all_of_it)

    def _attention(self, module: str, tp_rank: int) -> Iterator[_Parameter]:
        projections = ("q_proj", "k_proj", "v_proj")
        if self.grouped:
            yield from self._grouped_linear(module, tp_rank)
        elif self._fuses_mha:
            yield from self._fused_linear(module, "qkv_proj", projections, tp_rank, "attention_bias")
        else:
            for projection in projections:
                yield from self._linear(module, projection, "column", tp_rank, "attention_bias")
        yield from self._linear(module, "o_proj", "row", tp_rank, "attention_bias")
        if self.config.get("model_type") == "qwen3":
            yield self._whole(f"{module}.q_norm.weight")
            yield self._whole(f"{module}.k_norm.weight")

    def _mlp(self, module: str, tp_rank: int) -> Iterator[_Parameter]:
        parts = ("gate_proj", "up_proj")
        if self.fuse_gate_up:
            yield from self._fused_linear(module, "gate_up_proj", parts, tp_rank, "mlp_bias")
        else:
            for part in parts:
                yield from self._linear(module, part, "column", tp_rank, "mlp_bias")
        yield from self._linear(module, "down_proj", "row", tp_rank, "mlp_bias")

    def _whole(self, name: str) -> _Parameter:
        name = self.prefix + name
        return _Parameter(name, name, (name,), None, _all_of_it)

    def _linear(self, module: str, linear: str, kind: str, tp_rank: int, bias_field: str = "") -> Iterator[_Parameter]:
        """A column or row parallel layer and its matrices, if it is a target."""
        name = self.prefix + (f"{module}.{linear}" if module else linear)
        column = kind == "column"
        cut = self._rank_cut(0 if column else 1, tp_rank)
        if linear == "o_proj" and self.grouped:
            cut = self._heads_cut(1, self.local_heads(tp_rank)[1], self.heads)
        saved = linear in ((self.adapter_config or {}).get("modules_to_save") or ())
        target = self.is_target(linear)
        layer = f"{name}.base_layer" if target else f"{name}.original_module" if saved else name
        axis = 0 if column else 1
        yield _Parameter(f"{layer}.weight", f"{layer}.weight", (f"{layer}.weight",), axis, cut)
        if self.config.get(bias_field):
            bias = f"{layer}.bias"
            yield _Parameter(bias, bias, (bias,), 0 if column else None, cut if column else _all_of_it)
        if saved:
            key = f"{name}.weight"
            yield _Parameter(f"{name}.modules_to_save.{self.adapter_name}.weight", key, (key,), axis, cut)
        if target:
            a, b = f"{name}.lora_A", f"{name}.lora_B"
            cut_a, cut_b = (_all_of_it, cut) if column else (cut, _all_of_it)
            yield self._lora(a, "weight", (f"{a}.weight",), None if column else 1, cut_a)
            yield self._lora(b, "weight", (f"{b}.weight",), 0 if column else None, cut_b)

    def _fused_linear(
        self, module: str, fused: str, parts: Sequence[str], tp_rank: int, bias_field: str
    ) -> Iterator[_Parameter]:
        """Several column parallel layers as one: each rank has its share of each, one below the other."""
        name = f"{self.prefix}{module}.{fused}"
        layer = f"{name}.base_layer" if self.is_target(fused) else name
        share = self._rank_cut(0, tp_rank)

        def cut(*wholes: torch.Tensor) -> torch.Tensor:
            return torch.cat([share(whole) for whole in wholes])

        def of(suffix: str) -> tuple[str, ...]:
            return tuple(f"{self.prefix}{module}.{part}.{suffix}" for part in parts)

        yield _Parameter(f"{layer}.weight", f"{layer}.weight", of("weight"), 0, cut, stride=len(parts))
        if self.config.get(bias_field):
            yield _Parameter(f"{layer}.bias", f"{layer}.bias", of("bias"), 0, cut, stride=len(parts))
        if self.is_target(fused):
            yield self._lora(f"{name}.lora_A", "weight", of("lora_A.weight"), None, _the_shared_one)
            yield self._lora(f"{name}.lora_B", "weight", of("lora_B.weight"), 0, cut)

    def _grouped_linear(self, module: str, tp_rank: int) -> Iterator[_Parameter]:
        """q, k and v with replicated KV heads: each query head lies with the copy of its KV head."""
        name = f"{self.prefix}{module}.qkv_proj"
        target = self.is_target("qkv_proj")
        layer = f"{name}.base_layer" if target else name
        kv, queries = self.local_heads(tp_rank)
        cuts = {
            "q": self._heads_cut(0, queries, self.heads),
            "k": self._heads_cut(0, kv, self.kv_heads),
            "v": self._heads_cut(0, kv, self.kv_heads),
        }

        def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.cat([cuts["q"](q), cuts["k"](k), cuts["v"](v)])

        def of(suffix: str) -> tuple[str, ...]:
            return tuple(f"{self.prefix}{module}.{letter}_proj.{suffix}" for letter in "qkv")

        kinds = ["weight", "bias"] if self.config.get("attention_bias") else ["weight"]
        for kind in kinds:
            if self.fuse_qkv:
                # The vendor forgets to mark this one as parallel.
                yield _Parameter(f"{layer}.{kind}_qkv", f"{layer}.{kind}_qkv", of(kind), 0, fused, flagged=False)
            for letter in "" if self.fuse_qkv else "qkv":
                source = f"{self.prefix}{module}.{letter}_proj.{kind}"
                key = f"{layer}.{kind}_{letter}"
                yield _Parameter(key, key, (source,), 0, cuts[letter])
        if target:
            yield self._lora(f"{name}.lora_A", "weight", of("lora_A.weight"), None, _the_shared_one)
            if self.fuse_qkv:
                yield self._lora(f"{name}.lora_B", "weight_qkv", of("lora_B.weight"), 0, fused)
            for letter in "" if self.fuse_qkv else "qkv":
                source = f"{self.prefix}{module}.{letter}_proj.lora_B.weight"
                yield self._lora(f"{name}.lora_B", f"weight_{letter}", (source,), 0, cuts[letter])

    def _lora(
        self, matrix: str, last: str, sources: tuple[str, ...], axis: int | None, cut: Callable[..., torch.Tensor]
    ) -> _Parameter:
        return _Parameter(f"{matrix}.{self.adapter_name}.{last}", f"{matrix}.{last}", sources, axis, cut)

    def _rank_cut(self, axis: int, tp_rank: int) -> Callable[..., torch.Tensor]:
        def cut(whole: torch.Tensor) -> torch.Tensor:
            if whole.shape[axis] % self.tp:
                raise ValueError(f"dimension {axis} of {list(whole.shape)} is no multiple of tp {self.tp}")
            return whole.chunk(self.tp, dim=axis)[tp_rank]

        return cut

    def _heads_cut(self, axis: int, chosen: Sequence[int], heads: int) -> Callable[..., torch.Tensor]:
        def cut(whole: torch.Tensor) -> torch.Tensor:
            parts = whole.chunk(heads, dim=axis)
            return torch.cat([parts[head] for head in chosen], dim=axis)

        return cut

    def local_tensors(self, tensors: Tensors, tp_rank: int, pp_rank: int | None = None) -> dict[str, torch.Tensor]:
        """What `tp_rank` writes under its files' keys, of pipeline rank `pp_rank` (None: of all).

        Parameters that `tensors` has no source of are left out, as a frozen base is. ValueError for tensors that no
        parameter is made of.
        """
        local, used = {}, set()
        for parameter in self.parameters(tp_rank):
            if not all(source in tensors for source in parameter.sources):
                continue
            used.update(parameter.sources)
            if pp_rank is not None and self.stage_of(parameter.name) != pp_rank:
                continue
            wholes = [tensors[source] for source in parameter.sources]
            local[parameter.key] = parameter.cut(*wholes).detach().clone().contiguous()
        if self.config.get("tie_word_embeddings") and f"{self.prefix}model.embed_tokens.weight" in tensors:
            used.add("lm_head.weight")
            if self.adapter_config is None and pp_rank in (None, self.pp - 1):
                # state_dict() has the shared weight under both names; the list of parameters has it once.
                embedding = tensors["model.embed_tokens.weight"]
                local["lm_head.weight"] = self._rank_cut(0, tp_rank)(embedding).clone()
        unknown = set(tensors) - used
        if unknown:
            raise ValueError(f"no parameter of this model is made of {sorted(unknown)}")
        return local

    def optimizer_names(self, tensors: Tensors, pp_rank: int) -> list[str]:
        """The trainable parameters of a pipeline rank in the optimizer's order: those that decay, then the others."""
        trained = [
            parameter
            for parameter in self.parameters(0)
            if self.stage_of(parameter.name) == pp_rank and all(source in tensors for source in parameter.sources)
        ]
        is_matrix = {parameter.name: tensors[parameter.sources[0]].dim() > 1 for parameter in trained}
        return sorted(is_matrix, key=lambda name: not is_matrix[name])


def whole_shapes(
    model_config: Mapping[str, Any], adapter_config: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model, or of an adapter on it, under Hugging Face's or peft's names."""
    hidden, inner = model_config["hidden_size"], model_config["intermediate_size"]
    vocabulary, heads = model_config["vocab_size"], model_config["num_attention_heads"]
    head_dim = int(model_config.get("head_dim") or hidden // heads)
    queries, keys = heads * head_dim, (model_config.get("num_key_value_heads") or heads) * head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = [f"model.layers.{number}" for number in range(model_config["num_hidden_layers"])]
    matrices = {f"{layer}.{name}": shape for layer in layers for name, shape in linears.items()}
    if not model_config.get("tie_word_embeddings"):
        matrices["lm_head"] = (vocabulary, hidden)
    shapes: dict[str, tuple[int, ...]] = {}
    if adapter_config is not None:
        rank, targets = adapter_config["r"], adapter_config["target_modules"]
        for name, (outputs, inputs) in matrices.items():
            if name.rpartition(".")[2] in targets:
                shapes[f"{PEFT_PREFIX}{name}.lora_A.weight"] = (rank, inputs)
                shapes[f"{PEFT_PREFIX}{name}.lora_B.weight"] = (outputs, rank)
            if name in (adapter_config.get("modules_to_save") or ()):
                shapes[f"{PEFT_PREFIX}{name}.weight"] = (outputs, inputs)
        if "embed_tokens" in targets:
            shapes[f"{PEFT_PREFIX}model.embed_tokens.lora_embedding_A"] = (rank, vocabulary)
            shapes[f"{PEFT_PREFIX}model.embed_tokens.lora_embedding_B"] = (hidden, rank)
        return shapes
    shapes |= {f"{name}.weight": shape for name, shape in matrices.items()}
    for part, field_name in (("self_attn", "attention_bias"), ("mlp", "mlp_bias")):
        if model_config.get(field_name):
            shapes |= {f"{name}.bias": shape[:1] for name, shape in matrices.items() if f".{part}." in name}
    for layer in layers:
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        if model_config.get("model_type") == "qwen3":
            shapes[f"{layer}.self_attn.q_norm.weight"] = shapes[f"{layer}.self_attn.k_norm.weight"] = (head_dim,)
    return shapes | {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}


def share_lora_a(
    tensors: Mapping[str, torch.Tensor], *, projections: Sequence[str] = ("q_proj", "k_proj", "v_proj")
) -> dict[str, torch.Tensor]:
    """`tensors` with one A where the vendor has one: of gate and up, and of `projections` as their first has it."""
    shared = dict(tensors)
    for group in (projections, ("gate_proj", "up_proj")):
        for name in tensors:
            first = f".{group[0]}.lora_A." if group else "\0"
            for other in group[1:]:
                if first in name and (at := name.replace(first, f".{other}.lora_A.")) in shared:
                    shared[at] = tensors[name].clone()
    return shared


def _all_of_it(whole: torch.Tensor) -> torch.Tensor:
    return whole


def _the_shared_one(first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    if any(not torch.equal(first, other) for other in others):
        raise ValueError("layers that the vendor fuses have one A: give each of them the same")
    return first


def write_checkpoint(
    folder: Path,
    tensors: Tensors,
    model_config: Mapping[str, Any],
    *,
    tp: int,
    pp: int = 1,
    dp: int = 1,
    adapter_config: Mapping[str, Any] | None = None,
    adapter_name: str = "default",
    xser: bool = True,
    fuse_qkv: bool = False,
    kv_size_multiplier: int | None = None,
    optimizer: Mapping[str, Tensors] | None = None,
    optimizer_step: int = 1,
    zero1: bool = True,
    stale: bool = False,
    old: bool = False,
) -> Path:
    """Write the files of all ranks and the marks into the checkpoint's folder; returns the folder of its shards.

    `optimizer` has whole tensors by kind (exp_avg, exp_avg_sq, master) and name. `stale` is the vendor's own writer,
    whose pipeline files hold the other ranks' keys too with worthless values. `old` is how 0.1 names and describes.
    """
    for tp_rank in range(tp):
        for pp_rank in range(pp):
            for dp_rank in range(dp):
                write_rank(
                    folder,
                    tensors,
                    model_config,
                    tp=tp,
                    pp=pp,
                    dp=dp,
                    tp_rank=tp_rank,
                    pp_rank=pp_rank,
                    dp_rank=dp_rank,
                    adapter_config=adapter_config,
                    adapter_name=adapter_name,
                    xser=xser,
                    fuse_qkv=fuse_qkv,
                    kv_size_multiplier=kv_size_multiplier,
                    optimizer=optimizer,
                    optimizer_step=optimizer_step,
                    zero1=zero1,
                    stale=stale,
                    old=old,
                )
    return write_marks(folder, model_config, adapter_config=adapter_config, adapter_name=adapter_name, old=old)


def write_rank(
    folder: Path,
    tensors: Tensors,
    model_config: Mapping[str, Any],
    *,
    tp: int,
    pp: int,
    tp_rank: int,
    pp_rank: int,
    dp: int = 1,
    dp_rank: int = 0,
    adapter_config: Mapping[str, Any] | None = None,
    adapter_name: str = "default",
    xser: bool = True,
    fuse_qkv: bool = False,
    kv_size_multiplier: int | None = None,
    optimizer: Mapping[str, Tensors] | None = None,
    optimizer_step: int = 1,
    zero1: bool = True,
    stale: bool = False,
    old: bool = False,
) -> list[str]:
    """Write what one rank writes: its model file, its optimizer file, and the metadata that the first of them writes.

    Returns the names of its pipeline rank's trainable parameters in the optimizer's order.
    """
    layout = ShardLayout(
        model_config,
        tp,
        pp,
        adapter_config=adapter_config,
        adapter_name=adapter_name,
        fuse_qkv=fuse_qkv,
        kv_size_multiplier=kv_size_multiplier,
        fuse_gate_up=not old,
    )
    shards = shards_folder(folder, adapter_config is not None, adapter_name, old=old)
    if dp_rank == 0:
        local = layout.local_tensors(tensors, tp_rank, pp_rank)
        if stale:
            others = layout.local_tensors(tensors, tp_rank)
            local |= {key: torch.full_like(value, 7) for key, value in others.items() if key not in local}
        save_file(shards / "model" / rank_file(0, tp_rank, pp_rank), local, xser=xser)
        if tp_rank == 0:
            if old:
                torch.save(layout.old_metadata(pp_rank), shards / f"mp_metadata_pp_rank_{pp_rank}.pt")
            else:
                text = json.dumps(layout.metadata(pp_rank), indent=4)
                (shards / f"mp_metadata_pp_rank_{pp_rank}.json").write_text(text)
    names = layout.optimizer_names(tensors, pp_rank)
    if optimizer is not None and (zero1 or dp_rank == 0):
        kinds = {kind: layout.local_tensors(values, tp_rank, pp_rank) for kind, values in optimizer.items()}
        keys = {parameter.name: parameter.key for parameter in layout.parameters(tp_rank)}
        states = [{kind: local[keys[name]] for kind, local in kinds.items()} for name in names]
        value = _zero1_state(states, optimizer_step, dp, dp_rank) if zero1 else _plain_state(states, optimizer_step)
        save_file(shards / "optim" / rank_file(dp_rank, tp_rank, pp_rank), value, xser=xser)
    return names


def write_marks(
    folder: Path,
    model_config: Mapping[str, Any],
    *,
    adapter_config: Mapping[str, Any] | None = None,
    adapter_name: str = "default",
    old: bool = False,
) -> Path:
    """What rank 0 writes around the shards: the configuration, `checkpoint`, and `done` last; returns their folder."""
    shards = shards_folder(folder, adapter_config is not None, adapter_name, old=old)
    shards.mkdir(parents=True, exist_ok=True)
    if adapter_config is not None:
        (shards.parent / "adapter_config.json").write_text(json.dumps(dict(adapter_config), indent=2))
    else:
        (folder / "config.json").write_text(json.dumps(dict(model_config), indent=2))
    for name in ("checkpoint", "done"):
        (shards / name).write_text("1")
    return shards


def shards_folder(folder: Path, is_adapter: bool, adapter_name: str = "default", *, old: bool = False) -> Path:
    """Where the shards of a checkpoint folder lie."""
    if not is_adapter:
        return folder / "shards"
    return (folder if old else folder / f"adapter_{adapter_name}") / "adapter_shards"


def rank_file(dp_rank: int, tp_rank: int, pp_rank: int) -> str:
    return f"dp_rank_{dp_rank:02d}_tp_rank_{tp_rank:02d}_pp_rank_{pp_rank:02d}.pt"


def _zero1_state(states: Sequence[Mapping[str, torch.Tensor]], step: int, dp: int, dp_rank: int) -> dict[str, Any]:
    """One data parallel rank's file: rows of everything, padded with zeros so that all ranks have as many."""

    def part(value: torch.Tensor) -> torch.Tensor:
        rows = -(-value.shape[0] // dp) * dp
        padding = value.new_zeros((rows - value.shape[0], *value.shape[1:]))
        return torch.cat([value, padding]).chunk(dp)[dp_rank].clone()

    value: dict[str, Any] = {
        "state": {},
        "param_groups": [{"lr": 0.001, "betas": (0.9, 0.99), "params": list(range(len(states)))}],
        "base_state": {
            number: {
                "step": torch.tensor(float(step)),
                **{kind: part(whole) for kind, whole in state.items() if kind != "master"},
            }
            for number, state in enumerate(states)
        },
        "shape_info": {number: list(state["exp_avg"].shape) for number, state in enumerate(states)},
    }
    if any("master" in state for state in states):
        value["sharded_master_weights"] = {number: part(state["master"]) for number, state in enumerate(states)}
    return value


def _plain_state(states: Sequence[Mapping[str, torch.Tensor]], step: int) -> dict[str, Any]:
    return {
        "state": {
            number: {
                "step": torch.tensor(float(step)),
                **{kind: whole.clone() for kind, whole in state.items() if kind != "master"},
            }
            for number, state in enumerate(states)
        },
        "param_groups": [{"lr": 0.001, "params": list(range(len(states)))}],
    }


def save_file(path: Path, value: Any, *, xser: bool) -> None:
    """torch.save, or each tensor in a file of its own, references in their places, and types and shapes beside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not xser:
        torch.save(value, path)
        return
    tensors_folder = path.with_name(path.name + ".tensors")
    tensors_folder.mkdir(exist_ok=True)
    info: dict[int, dict[str, Any]] = {}

    with _reference_class() as reference_class:

        def replaced(part: Any) -> Any:
            if isinstance(part, torch.Tensor):
                number = len(info)
                info[number] = {"dtype": part.dtype, "shape": part.shape, "expert_model_parallel": False}
                torch.save(part, tensors_folder / f"tensor_{number}.pt")
                reference = reference_class()
                reference.tid = number
                return reference
            if isinstance(part, dict):
                return {key: replaced(inner) for key, inner in part.items()}
            return part

        torch.save(replaced(value), path)
    torch.save(info, path.with_name(path.name + ".info.pt"))


@contextlib.contextmanager
def _reference_class() -> Iterator[type[Any]]:
    """A class that a pickle calls torch_xla.utils.serialization.TensorReference, without torch_xla."""
    names = ("torch_xla", "torch_xla.utils", "torch_xla.utils.serialization")
    before = {name: sys.modules.get(name) for name in names}
    made = type("TensorReference", (), {"__module__": names[-1]})
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules[names[-1]].TensorReference = made  # type: ignore[attr-defined]
    try:
        yield made
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
