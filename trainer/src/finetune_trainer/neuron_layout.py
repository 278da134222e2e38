"""Which parts of which ranks' tensors make up each tensor of a checkpoint that neuronx-distributed wrote.

Pure: from the metadata beside the shards and the type and shape of every tensor in each rank's file to a plan of the
whole tensors under Hugging Face's or peft's names. neuron_checkpoints.py reads the files and carries the plan out.

The rules, those of optimum-neuron 0.1 to 0.4.5. A tensor is always pieces of the ranks' tensors, one after the other
along one dimension:

* column parallel layers and embeddings are cut along dimension 0, row parallel ones along 1, the rest every rank has;
* a fused layer (gate and up; q, k and v without replication) has each rank's share of each part one below the other;
* where KV heads do not divide the ranks, q, k and v are one projection with `kv_size_multiplier` copies of k and v.
  The copies lie one after the other and are dealt to the ranks in order; a query head lies with the copy of its KV
  head, and so do the columns of the output projection;
* LoRA's B of a layer is cut as the layer's weight is, and A of a row parallel layer as its weight; a fused layer has
  one A for all its parts, which peft's files have once for each;
* a pipeline rank's file counts only for the parameters in its own metadata: the vendor's own writer puts the others'
  keys beside them, with worthless values.

What several ranks hold must be equal; each plan lists those copies (KV heads, what is not cut, shared embeddings).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.json_files import is_count
from finetune_trainer.safetensors_stream import ITEM_BYTES, some_names

Shape = tuple[int, ...]
RankKey = tuple[int, int]
"""(pipeline parallel rank, tensor parallel rank)"""

EMBEDDING_NAME = "model.embed_tokens.weight"
OUTPUT_LAYER_NAME = "lm_head.weight"
"""The two names of one weight in the models that this vendor trains, where config.json ties them."""

_ADAPTER_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_SAVED, _ORIGINAL = "modules_to_save", "original_module"
_FUSED_SPEC, _GROUPED_SPEC = "FusedLinearsSpec", "GQAQKVColumnParallelLinearSpec"
_PROJECTION_END = re.compile(r"(?P<kind>weight|bias)_(?P<part>qkv|q|k|v)")
_SHARED = "lora_A.weight"


@dataclass(frozen=True)
class TensorFacts:
    """Type (safetensors' name) and shape of a tensor, as one rank holds it."""

    dtype: str
    shape: Shape


@dataclass(frozen=True)
class Piece:
    """`length` indices of dimension `axis`, from `start` on, of the tensor that one rank's file has under `key`."""

    pp_rank: int
    tp_rank: int
    key: str
    axis: int
    start: int
    length: int


@dataclass(frozen=True)
class Copy:
    """Two pieces that hold the same values in a sound checkpoint."""

    first: Piece
    other: Piece


@dataclass(frozen=True)
class PlannedTensor:
    """A whole tensor: its pieces, in order, along dimension `axis`, and what must be equal to which of them."""

    name: str
    dtype: str
    shape: Shape
    axis: int
    pieces: tuple[Piece, ...]
    copies: tuple[Copy, ...] = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class ParameterLayout:
    """How one parameter lies on the ranks: the dimension it is cut along, None where each rank has all of it.

    `is_promised` says that a checkpoint without it is damaged: it is trained.
    """

    axis: int | None
    is_promised: bool


@dataclass(frozen=True)
class FusedLinears:
    """Layers `parts` of `module`, with `rows` outputs each, as one layer `fused`."""

    module: str
    fused: str
    parts: tuple[str, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class GroupedProjections:
    """q, k, v of `module` as one layer `fused` with `copies` copies of the KV heads, and the output projection.

    `parts` are the three layers' names; `q_rows` and `kv_rows` are outputs on one rank.
    """

    module: str
    fused: str
    parts: tuple[str, str, str]
    output: str
    heads: int
    kv_heads: int
    copies: int
    q_rows: int
    kv_rows: int


@dataclass(frozen=True)
class StageMetadata:
    """What one pipeline rank's metadata says; `parameters` under the keys of the files, `where` for messages.

    `tp_size` is None where it does not say, as before release 0.2. `modules` are those of the whole model that have
    rules of their own, on whichever rank.
    """

    where: str
    parameters: Mapping[str, ParameterLayout]
    fused: tuple[FusedLinears, ...]
    grouped: tuple[GroupedProjections, ...]
    modules: tuple[str, ...]
    tp_size: int | None


def parse_metadata(value: Any, where: str, *, adapter: str | None) -> StageMetadata:
    """The content of an mp_metadata_pp_rank file of any release, for the adapter called `adapter` or a full model.

    CorruptArtifact when it is none or contradicts itself; UserError UnsupportedShards for a rule that is not known.
    """
    try:
        if "sharded_metadata" in value:
            return _parse_old(value, where, is_adapter=adapter is not None)
        return _parse(value, where, adapter)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CorruptArtifact(
            f"{where} is no metadata of sharded parameters: {type(error).__name__}: {error}"
        ) from error


def stored_key(name: str, adapter: str | None) -> str | None:
    """The key under which files have the parameter `name`: without the adapter's name.

    None for what the files of this adapter do not have: another adapter's, or the original of a saved module.
    """
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part == _ORIGINAL:
            return None
        if part in _ADAPTER_PARTS and at + 1 < len(parts):
            return ".".join((*parts[: at + 1], *parts[at + 2 :])) if parts[at + 1] == adapter else None
        if part == _SAVED and at + 1 < len(parts):
            return ".".join((*parts[:at], *parts[at + 2 :])) if parts[at + 1] == adapter else None
    return name


def plan_tensors(
    stages: Sequence[StageMetadata], held: Mapping[RankKey, Mapping[str, TensorFacts]], *, tied: bool = False
) -> dict[str, PlannedTensor]:
    """Every whole tensor of a checkpoint by name, sorted.

    `held` has what each rank's file holds, of every rank; `tied` says that embedding and output layer are one weight.
    CorruptArtifact names a promised tensor that is absent, a key that nobody's metadata knows, ranks that disagree, a
    module that no pipeline rank owns, and shapes that the rules do not fit.
    """
    _check_owners(stages)
    planned: dict[str, PlannedTensor] = {}
    known = {key for stage in stages for key in stage.parameters} | ({OUTPUT_LAYER_NAME} if tied else set())
    for pp_rank, stage in enumerate(stages):
        facts = _agreed_facts(stage, pp_rank, held)
        if tied and pp_rank == len(stages) - 1 and OUTPUT_LAYER_NAME in facts.keys() - stage.parameters.keys():
            # The files have the shared weight under both names, the metadata has it once.
            stage = replace(
                stage, parameters={**stage.parameters, OUTPUT_LAYER_NAME: ParameterLayout(0, is_promised=False)}
            )
        foreign = facts.keys() - known
        if foreign:
            raise CorruptArtifact(
                f"{stage.where} does not know {some_names(foreign)}, which its shards hold: they are another "
                "checkpoint's"
            )
        absent = {key for key, layout in stage.parameters.items() if layout.is_promised} - facts.keys()
        if absent:
            raise CorruptArtifact(f"{stage.where} promises {some_names(absent)}, which its shards do not hold")
        for tensor in _StagePlan(stage, pp_rank, _tp_size(held), facts).tensors():
            before = planned.get(tensor.name)
            planned[tensor.name] = tensor if before is None else _with_copy(before, tensor)
    if tied and OUTPUT_LAYER_NAME in planned and EMBEDDING_NAME in planned:
        planned[EMBEDDING_NAME] = _with_copy(planned[EMBEDDING_NAME], planned.pop(OUTPUT_LAYER_NAME))
    return dict(sorted(planned.items()))


def query_places(heads: int, kv_heads: int, copies: int, tp: int) -> list[tuple[int, int]]:
    """For each query head of the model the rank that holds it and its place among that rank's heads.

    Copy c of KV head k is slot c * kv_heads + k; slots are dealt to the ranks in order, and the query heads of a KV
    head to its copies in order.
    """
    group, on_a_copy = heads // kv_heads, heads // (kv_heads * copies)
    slots_of_a_rank = kv_heads * copies // tp
    places = []
    for head in range(heads):
        kv_head, within = divmod(head, group)
        copy, number = divmod(within, on_a_copy)
        rank, slot = divmod(copy * kv_heads + kv_head, slots_of_a_rank)
        places.append((rank, slot * on_a_copy + number))
    return places


@dataclass
class _StagePlan:
    """The plan of one pipeline rank's tensors."""

    stage: StageMetadata
    pp_rank: int
    tp: int
    facts: Mapping[str, TensorFacts]
    used: set[str] = field(default_factory=set)

    def tensors(self) -> Iterator[PlannedTensor]:
        own = [key for key in self.stage.parameters if key in self.facts]
        modules = {rule.module for rule in self.stage.grouped} | {rule.module for rule in self.stage.fused}
        of_module = _by_module(own, modules)
        for grouped in self.stage.grouped:
            self._check_even(grouped)
            for key in of_module.get(grouped.module, ()):
                yield from self._grouped(grouped, key)
        for fused in self.stage.fused:
            for key in of_module.get(fused.module, ()):
                yield from self._fused(fused, key)
        for key in own:
            if key not in self.used:
                yield self._cut(key, key, self.stage.parameters[key].axis)

    def _grouped(self, rule: GroupedProjections, key: str) -> Iterator[PlannedTensor]:
        layer, output = f"{rule.module}.{rule.fused}.", f"{rule.module}.{rule.output}."
        if key.startswith(output) and self.stage.parameters[key].axis == 1:
            # Its columns are heads. Its bias and B are outputs: whole on every rank, in the model's order.
            self.used.add(key)
            yield self._by_heads(key, key, 1, (0, self._extent(key, 1)), self._query_places(rule))
        if not key.startswith(layer):
            return
        self.used.add(key)
        rest = key.removeprefix(layer)
        if rest == _SHARED:
            for part in rule.parts:
                yield self._cut(key, f"{rule.module}.{part}.{rest}", None)
            return
        stem, _, last = rest.rpartition(".")
        end = _PROJECTION_END.fullmatch(last)
        if end is None:
            raise UserError(
                "UnsupportedShards",
                f"{self.stage.where}: what {key!r} of the fused layer {layer} is made of is not known",
            )
        places = {"q": self._query_places(rule), "k": self._kv_places(rule), "v": self._kv_places(rule)}
        for letter, rows in self._rows(rule, key, end["part"]).items():
            name = ".".join(word for word in (rule.module, rule.parts["qkv".index(letter)], stem, end["kind"]) if word)
            yield self._by_heads(key, name, 0, rows, places[letter], rule.copies if letter in "kv" else 1)

    def _rows(self, rule: GroupedProjections, key: str, part: str) -> dict[str, tuple[int, int]]:
        """Where q, k and v lie in a rank's tensor `key`, which has one of them or all: first row and number of rows."""
        rows = self._extent(key, 0)
        if part != "qkv":
            return {part: (0, rows)}
        if rows != rule.q_rows + 2 * rule.kv_rows:
            raise self._misfit(key, f"{rule.q_rows} + 2 * {rule.kv_rows} rows")
        return {
            "q": (0, rule.q_rows),
            "k": (rule.q_rows, rule.kv_rows),
            "v": (rule.q_rows + rule.kv_rows, rule.kv_rows),
        }

    def _query_places(self, rule: GroupedProjections) -> list[tuple[int, int]]:
        return query_places(rule.heads, rule.kv_heads, rule.copies, self.tp)

    def _kv_places(self, rule: GroupedProjections) -> list[tuple[int, int]]:
        slots = rule.kv_heads * rule.copies
        return [divmod(slot, slots // self.tp) for slot in range(slots)]

    def _by_heads(
        self,
        key: str,
        name: str,
        axis: int,
        within: tuple[int, int],
        places: Sequence[tuple[int, int]],
        times: int = 1,
    ) -> PlannedTensor:
        """A tensor made of heads, which lie `within` (first index, number) each rank's tensor.

        `places` are rank and place of each head in the model's order, and after those of `times` - 1 more copies.
        """
        offset, length = within
        on_a_rank = len(places) // self.tp
        if length % on_a_rank:
            raise self._misfit(key, f"a multiple of {on_a_rank} heads")
        size = length // on_a_rank
        pieces = [Piece(self.pp_rank, rank, key, axis, offset + place * size, size) for rank, place in places]
        heads = len(pieces) // times
        copies = [Copy(pieces[at % heads], piece) for at, piece in enumerate(pieces) if at >= heads]
        return self._tensor(name, axis, pieces[:heads], copies)

    def _fused(self, rule: FusedLinears, key: str) -> Iterator[PlannedTensor]:
        layer = f"{rule.module}.{rule.fused}."
        if not key.startswith(layer) or key in self.used:
            return
        self.used.add(key)
        rest = key.removeprefix(layer)
        if rest == _SHARED:
            for part in rule.parts:
                yield self._cut(key, f"{rule.module}.{part}.{rest}", None)
            return
        shares = [rows // self.tp for rows in rule.rows]
        if self._extent(key, 0) != sum(shares) or any(rows % self.tp for rows in rule.rows):
            raise self._misfit(key, f"{' + '.join(map(str, shares))} rows of {self.tp} ranks")
        offset = 0
        for part, share in zip(rule.parts, shares, strict=True):
            pieces = [Piece(self.pp_rank, rank, key, 0, offset, share) for rank in range(self.tp)]
            yield self._tensor(f"{rule.module}.{part}.{rest}", 0, pieces, [])
            offset += share

    def _cut(self, key: str, name: str, axis: int | None) -> PlannedTensor:
        """The tensor `name` that is cut evenly along dimension `axis`, or that every rank has."""
        is_scalar = axis is None and not self.facts[key].shape
        length = 1 if is_scalar else self._extent(key, axis or 0)
        pieces = [Piece(self.pp_rank, rank, key, axis or 0, 0, length) for rank in range(self.tp)]
        if axis is None:
            return self._tensor(name, 0, pieces[:1], [Copy(pieces[0], other) for other in pieces[1:]])
        return self._tensor(name, axis, pieces, [])

    def _tensor(self, name: str, axis: int, pieces: Sequence[Piece], copies: Sequence[Copy]) -> PlannedTensor:
        facts = self.facts[pieces[0].key]
        shape = facts.shape
        if shape:
            shape = (*shape[:axis], sum(piece.length for piece in pieces), *shape[axis + 1 :])
        return PlannedTensor(name, facts.dtype, shape, axis, tuple(_merged(pieces)), tuple(_merged_copies(copies)))

    def _extent(self, key: str, axis: int) -> int:
        shape = self.facts[key].shape
        if axis >= len(shape):
            raise self._misfit(key, f"more than {axis} dimensions")
        return shape[axis]

    def _check_even(self, rule: GroupedProjections) -> None:
        slots = rule.kv_heads * rule.copies
        if rule.heads % self.tp or slots % self.tp or rule.heads % slots:
            raise CorruptArtifact(
                f"{self.stage.where}: {rule.module} has {rule.heads} heads and {rule.copies} copies of "
                f"{rule.kv_heads} KV heads on {self.tp} tensor parallel ranks, which does not come out even"
            )

    def _misfit(self, key: str, expected: str) -> CorruptArtifact:
        return CorruptArtifact(
            f"{self.stage.where}: {key!r} has shape {list(self.facts[key].shape)} on each rank, expected {expected}"
        )


def _parse(value: Mapping[str, Any], where: str, adapter: str | None) -> StageMetadata:
    parameters: dict[str, ParameterLayout] = {}
    sizes: dict[int, str] = {}
    for name, entry in value["parameters"].items():
        axis = None
        if entry["tensor_model_parallel"]:
            axis = _axis(entry["partition_dim"], name)
            sizes.setdefault(_positive(entry["num_partitions"], name), name)
        key = stored_key(name, adapter)
        if key is not None:
            parameters[key] = ParameterLayout(axis, is_promised=adapter is None or key != name)
    fused, grouped, modules = [], [], []
    for entry in value["model_weight_transformation_specs"]:
        module = str(entry["module_fully_qualified_name"])
        modules.append(module)
        for kind, fields in entry["specs"]:
            sizes.setdefault(_positive(fields["tp_size"], module), module)
            if kind == _FUSED_SPEC:
                fused.append(_parse_fused(module, fields, where))
            elif kind == _GROUPED_SPEC:
                grouped.append(_parse_grouped(module, fields))
            else:
                raise UserError(
                    "UnsupportedShards",
                    f"{where}: {module} has the rule {kind!r}, which no release up to optimum-neuron 0.4.5 has",
                )
    if len(sizes) > 1:
        (one, name), (other, another) = list(sizes.items())[:2]
        raise CorruptArtifact(
            f"{where} contradicts itself: {name} is cut over {one} tensor parallel ranks, {another} over {other}"
        )
    return StageMetadata(where, parameters, tuple(fused), tuple(grouped), tuple(modules), next(iter(sizes), None))


def _parse_fused(module: str, fields: Mapping[str, Any], where: str) -> FusedLinears:
    if fields["fuse_axis"] not in (0, "column"):
        raise UserError(
            "UnsupportedShards", f"{where}: {module} fuses layers along dimension {fields['fuse_axis']!r}, expected 0"
        )
    parts, rows = tuple(map(str, fields["linear_names"])), fields["original_dims"]
    if len(parts) != len(rows) or not parts:
        raise ValueError(f"{module} has {len(parts)} fused layers and {len(rows)} sizes")
    return FusedLinears(
        module, str(fields["fused_linear_name"]), parts, tuple(_positive(each, module) for each in rows)
    )


def _parse_grouped(module: str, fields: Mapping[str, Any]) -> GroupedProjections:
    names = [str(fields[f"{word}_projection_name"]) for word in ("query", "key", "value")]
    return GroupedProjections(
        module,
        str(fields["gqa_qkv_projection_name"]),
        (names[0], names[1], names[2]),
        str(fields["output_projection_name"]),
        *(
            _positive(fields[name], f"{module}: {name}")
            for name in (
                "num_attention_heads",
                "num_key_value_heads",
                "kv_size_multiplier",
                "q_output_size_per_partition",
                "kv_output_size_per_partition",
            )
        ),
    )


def _parse_old(value: Mapping[str, Any], where: str, *, is_adapter: bool) -> StageMetadata:
    """Releases before 0.2: the layout of each key, and the GQA projections by the names of what they replace."""
    parameters = {}
    for name, entry in value["sharded_metadata"].items():
        axis = _axis(entry["partition_dim"], name) if entry["kind"] == "sharded" else None
        parts = name.split(".")
        if _ORIGINAL in parts:
            continue
        promised = not is_adapter or any(part in (*_ADAPTER_PARTS, _SAVED) for part in parts)
        parameters[".".join(part for part in parts if part != _SAVED)] = ParameterLayout(axis, promised)
    grouped = []
    facts = value["gqa_qkv_metadata"] or {}
    layers: dict[str, dict[str, str]] = {}
    for original, key in (facts.get("original_names_to_gqa_qkv_names") or {}).items():
        layer, _, last = key.rpartition(".")
        projection = original.rpartition(".")[0]
        # A fused weight has the three in the order q, k, v.
        parts = layers.setdefault(layer, {})
        letter = last.rpartition("_")[2]
        parts.setdefault(
            "qkv"[len(parts)] if letter == "qkv" and projection not in parts.values() else letter, projection
        )
    for layer, by_letter in layers.items():
        module, _, fused = layer.rpartition(".")
        projections = [by_letter[letter].rpartition(".")[2] for letter in "qkv"]
        outputs = {
            name.split(".")[-2] for name in facts["output_projections_names"] if name.rsplit(".", 2)[0] == module
        }
        if len(outputs) != 1:
            raise ValueError(f"{module} has the output projections {sorted(outputs)}")
        grouped.append(
            GroupedProjections(
                module,
                fused,
                (projections[0], projections[1], projections[2]),
                outputs.pop(),
                *(
                    _positive(facts[name], f"{module}: {name}")
                    for name in (
                        "num_attention_heads",
                        "num_key_value_heads",
                        "kv_size_multiplier",
                        "q_output_size_per_partition",
                        "kv_output_size_per_partition",
                    )
                ),
            )
        )
    if is_adapter and grouped:
        raise UserError(
            "UnsupportedShards",
            f"{where}: how releases before optimum-neuron 0.2 lay an adapter on replicated KV heads is not known: "
            "consolidate it with the release that wrote it",
        )
    return StageMetadata(where, parameters, (), tuple(grouped), (), None)


def _agreed_facts(
    stage: StageMetadata, pp_rank: int, held: Mapping[RankKey, Mapping[str, TensorFacts]]
) -> Mapping[str, TensorFacts]:
    """What every tensor parallel rank of a pipeline rank holds; CorruptArtifact where one differs from rank 0."""
    first = held[pp_rank, 0]
    for tp_rank in range(1, _tp_size(held)):
        other = held[pp_rank, tp_rank]
        for key in {**first, **other}:
            if first.get(key) != other.get(key):
                raise CorruptArtifact(
                    f"{stage.where}: of {key!r} tensor parallel rank 0 holds {_words(first.get(key))}, "
                    f"rank {tp_rank} {_words(other.get(key))}: their files are of different checkpoints"
                )
    return first


def _words(facts: TensorFacts | None) -> str:
    return "nothing" if facts is None else f"{facts.dtype} {list(facts.shape)}"


def _with_copy(tensor: PlannedTensor, other: PlannedTensor) -> PlannedTensor:
    """`tensor`, with what holds it a second time (`other`) as copies of its pieces."""
    lengths = [piece.length for piece in tensor.pieces], [piece.length for piece in other.pieces]
    if (tensor.dtype, tensor.shape, tensor.axis) != (other.dtype, other.shape, other.axis) or lengths[0] != lengths[1]:
        raise CorruptArtifact(
            f"{tensor.name!r} is {tensor.dtype} {list(tensor.shape)} on pipeline rank {tensor.pieces[0].pp_rank} and "
            f"{other.dtype} {list(other.shape)} as {other.name!r} on rank {other.pieces[0].pp_rank}"
        )
    added = [Copy(first, second) for first, second in zip(tensor.pieces, other.pieces, strict=True)]
    return replace(tensor, copies=(*tensor.copies, *added, *other.copies))


def _check_owners(stages: Sequence[StageMetadata]) -> None:
    """Metadata names the modules of the whole model; each has its parameters on one of the pipeline ranks."""
    owned = {key for stage in stages for key in stage.parameters}
    prefixes = {".".join(key.split(".")[:at]) for key in owned for at in range(1, key.count(".") + 1)}
    orphans = {module for stage in stages for module in stage.modules} - prefixes
    if orphans:
        raise CorruptArtifact(
            f"no pipeline rank has parameters of {some_names(orphans)}: the files of a pipeline rank are missing "
            f"(there are those of {len(stages)})"
        )


def _by_module(keys: Iterable[str], modules: Collection[str]) -> dict[str, list[str]]:
    """The keys of the parameters within each of the modules."""
    found: dict[str, list[str]] = {}
    for key in keys:
        parts = key.split(".")
        for at in range(1, len(parts)):
            module = ".".join(parts[:at])
            if module in modules:
                found.setdefault(module, []).append(key)
    return found


def _tp_size(held: Mapping[RankKey, Any]) -> int:
    return max(tp_rank for _, tp_rank in held) + 1


def _merged(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Pieces that follow each other in the same tensor as one."""
    last: Piece | None = None
    for piece in pieces:
        if last is not None and _follows(last, piece):
            last = replace(last, length=last.length + piece.length)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last


def _merged_copies(copies: Iterable[Copy]) -> Iterator[Copy]:
    last: Copy | None = None
    for copy in copies:
        if last is not None and _follows(last.first, copy.first) and _follows(last.other, copy.other):
            last = Copy(
                replace(last.first, length=last.first.length + copy.first.length),
                replace(last.other, length=last.other.length + copy.other.length),
            )
            continue
        if last is not None:
            yield last
        last = copy
    if last is not None:
        yield last


def _follows(piece: Piece, following: Piece) -> bool:
    return replace(piece, start=piece.start + piece.length, length=following.length) == following


def _axis(value: Any, name: str) -> int:
    if value not in (0, 1) or isinstance(value, bool):
        raise ValueError(f"{name} is cut along dimension {value!r}")
    return int(value)


def _positive(value: Any, name: str) -> int:
    if not is_count(value) or value == 0:
        raise ValueError(f"{name}: {value!r} is no positive number")
    return int(value)
