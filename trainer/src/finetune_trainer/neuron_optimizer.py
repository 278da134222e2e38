"""Reads what neuronx-distributed's optimizer files hold: moments and float32 masters, whole or as one rank has them.

The Neuron backend goes on from another data parallel size with it, tests prove masters against weights. ZeRO-1 gives
each data parallel rank the rows of every tensor in equal shares, padded at the end, and stores no names: who opens a
checkpoint brings the order of the parameters, which our own checkpoints keep.

A file has `base_state` {number: {step, exp_avg, exp_avg_sq}}, `shape_info` {number: shape on the tensor parallel rank}
and, where weights are trained in fewer bits, `sharded_master_weights` {number: share}; without ZeRO-1 it has `state` in
place of `base_state`, with whole tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from finetune_trainer.errors import CorruptArtifact
from finetune_trainer.json_files import is_count
from finetune_trainer.neuron_checkpoints import NeuronCheckpoint, complete_ranks
from finetune_trainer.neuron_layout import (
    ParameterLayout,
    Piece,
    PlannedTensor,
    RankKey,
    Shape,
    StageMetadata,
    TensorFacts,
    plan_tensors,
    stored_key,
)
from finetune_trainer.neuron_shard_files import (
    TensorReference,
    as_tensor,
    give_back,
    has_own_files,
    load_file,
    read_referred,
    reference_number,
    references,
    referred_facts,
    scan_ranks,
    tensor_facts,
)
from finetune_trainer.neuron_tensors import NeuronTensor
from finetune_trainer.safetensors_stream import some_names

FIRST_MOMENT, SECOND_MOMENT, MASTER = "exp_avg", "exp_avg_sq", "master"
"""Kinds of an optimizer's tensors."""

_SHARDED, _WHOLE, _MASTERS, _SHAPES = "base_state", "state", "sharded_master_weights", "shape_info"
_STEP = "step"


@dataclass(frozen=True)
class OptimizerState:
    """The optimizer's tensors of a checkpoint that was written on `dp_size` data parallel ranks.

    `steps` has each parameter's number of updates, by the key of the shards' files.
    """

    dp_size: int
    kinds: tuple[str, ...]
    steps: Mapping[str, float]
    _shares: Mapping[tuple[str, RankKey], Mapping[str, _Shares]] = field(repr=False)
    _plans: Mapping[str, Mapping[str, PlannedTensor]] = field(repr=False)
    _apart: set[str] | None = field(repr=False)

    def tensors(self, kind: str) -> dict[str, NeuronTensor]:
        """Whole tensors of one kind under the names of the parameters that they belong to.

        Copies that differ between ranks are dealt with as the checkpoint was opened to.
        """
        source = _ShareSource(self._shares, kind)
        return {name: NeuronTensor(plan, source, self._apart) for name, plan in self._plans[kind].items()}

    def local(self, kind: str, tp_rank: int, pp_rank: int) -> dict[str, torch.Tensor]:
        """What one tensor parallel rank trains, by the key of the shards' files, in the optimizer's order."""
        return {key: shares.whole() for key, shares in self._shares[kind, (pp_rank, tp_rank)].items()}


def open_optimizer(checkpoint: NeuronCheckpoint, names: Sequence[Sequence[str]]) -> OptimizerState:
    """The optimizer's files of a checkpoint; `names` are each pipeline rank's parameters in its optimizer's order.

    Names are those of the metadata, with or without the adapter's name. CorruptArtifact when a rank's file is missing
    or damaged, or does not fit the names or the other ranks' files.
    """
    folder = checkpoint.shards / "optim"
    found = scan_ranks(folder)
    dp_size = max((dp_rank for dp_rank, _, _ in found), default=0) + 1
    paths = complete_ranks(folder, found, checkpoint.stages, dp_size)
    keys = _keys(checkpoint, names)
    shares: dict[tuple[str, RankKey], dict[str, _Shares]] = {}
    steps: dict[str, float] = {}
    for pp_rank, of_rank in enumerate(keys):
        for tp_rank in range(checkpoint.tp_size):
            files = [_OptimizerFile(paths[dp_rank, tp_rank, pp_rank]) for dp_rank in range(dp_size)]
            for file in files:
                file.check_count(len(of_rank))
            for number, key in enumerate(of_rank):
                for kind in files[0].kinds(number):
                    shares.setdefault((kind, (pp_rank, tp_rank)), {})[key] = _join(files, number, kind)
                steps[key] = files[0].step(number)
    kinds = tuple(dict.fromkeys(kind for kind, _ in shares))
    plans = {kind: _plan(checkpoint, kind, shares, keys) for kind in kinds}
    return OptimizerState(dp_size, kinds, steps, shares, plans, checkpoint.apart)


@dataclass(frozen=True)
class _Shares:
    """One tensor on one tensor parallel rank: its shares on the data parallel ranks, and its own type and shape."""

    facts: TensorFacts
    parts: tuple[tuple[_OptimizerFile, int, str], ...]

    @property
    def where(self) -> str:
        return str(self.parts[0][0].path)

    def whole(self) -> torch.Tensor:
        """A copy in memory."""
        mapped = [file.tensor(number, kind) for file, number, kind in self.parts]
        whole = torch.cat(mapped)[: self.facts.shape[0]] if self.facts.shape else mapped[0].clone()
        for part in mapped:
            give_back(part)
        return whole


class _ShareSource:
    """Reads tensors of one kind; those of one tensor's pieces stay until it was read."""

    def __init__(self, shares: Mapping[tuple[str, RankKey], Mapping[str, _Shares]], kind: str) -> None:
        self._shares, self._kind = shares, kind
        self._open: dict[tuple[RankKey, str], torch.Tensor] = {}

    def _find(self, piece: Piece) -> _Shares:
        return self._shares[self._kind, (piece.pp_rank, piece.tp_rank)][piece.key]

    def tensor(self, piece: Piece) -> torch.Tensor:
        at = (piece.pp_rank, piece.tp_rank), piece.key
        if at not in self._open:
            self._open[at] = self._find(piece).whole()
        return self._open[at]

    def where(self, piece: Piece) -> str:
        return self._find(piece).where

    def let_go(self) -> None:
        self._open.clear()


class _OptimizerFile:
    """One rank's optimizer file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        value = load_file(path)
        if not isinstance(value, dict):
            raise CorruptArtifact(f"{path} is no state of an optimizer")
        self._state_key = _SHARDED if value.get(_SHARDED) else _WHOLE
        for name in (self._state_key, _MASTERS, _SHAPES):
            if not isinstance(value.get(name, {}), dict):
                raise CorruptArtifact(f"{path} is no state of an optimizer: {name} is {type(value[name]).__name__}")
        self._value: dict[str, Any] = value
        self._own: Mapping[int, TensorFacts] | None = None
        if has_own_files(path):
            self._own = referred_facts(path, {reference_number(leaf, path) for leaf in references(value)})

    def check_count(self, count: int) -> None:
        """CorruptArtifact unless the file has the state of parameters 0 to `count` - 1."""
        numbers = set(self._value.get(self._state_key, {}))
        if numbers != set(range(count)):
            raise CorruptArtifact(
                f"{self.path} has the state of {len(numbers)} parameters, and there are names of {count}: the names "
                "are another training's"
            )

    def kinds(self, number: int) -> list[str]:
        """Which tensors there are of a parameter."""
        state = self._value[self._state_key][number]
        found = [kind for kind in (FIRST_MOMENT, SECOND_MOMENT) if isinstance(state, dict) and kind in state]
        return [*found, *([MASTER] if number in self._value.get(_MASTERS, {}) else [])]

    def shape(self, number: int) -> Shape | None:
        """The whole shape of a parameter on its tensor parallel rank, where the file tells it."""
        shape = self._value.get(_SHAPES, {}).get(number)
        if shape is not None and not (isinstance(shape, (list, tuple)) and all(map(is_count, shape))):
            raise CorruptArtifact(f"{self.path}: {_SHAPES} of parameter {number} is {shape!r}")
        return None if shape is None else tuple(shape)

    def step(self, number: int) -> float:
        """How many updates a parameter had."""
        state = self._value[self._state_key][number]
        leaf = state.get(_STEP, 0) if isinstance(state, dict) else 0
        return float(self._tensor(leaf) if isinstance(leaf, (TensorReference, torch.Tensor)) else leaf)

    def facts(self, number: int, kind: str) -> TensorFacts:
        """Type and shape of this rank's share."""
        leaf = self._leaf(number, kind)
        if self._own is not None:
            return self._own[reference_number(leaf, self.path)]
        return tensor_facts(as_tensor(leaf, self.path), self.path)

    def tensor(self, number: int, kind: str) -> torch.Tensor:
        """This rank's share, mapped."""
        return self._tensor(self._leaf(number, kind))

    def _tensor(self, leaf: Any) -> torch.Tensor:
        if self._own is None:
            return as_tensor(leaf, self.path)
        number = reference_number(leaf, self.path)
        return read_referred(self.path, number, self._own[number])

    def _leaf(self, number: int, kind: str) -> Any:
        try:
            if kind == MASTER:
                return self._value[_MASTERS][number]
            return self._value[self._state_key][number][kind]
        except (KeyError, TypeError) as error:
            raise CorruptArtifact(
                f"{self.path} has no {kind} of parameter {number}, other ranks' files have"
            ) from error


def _join(files: Sequence[_OptimizerFile], number: int, kind: str) -> _Shares:
    """One tensor of all data parallel ranks; CorruptArtifact when their shares do not fit each other."""
    parts = [file.facts(number, kind) for file in files]
    shape = files[0].shape(number) or parts[0].shape
    rows = sum(part.shape[0] for part in parts if part.shape)
    covers = not shape or shape[0] <= rows < shape[0] + len(parts)
    if len(set(parts)) > 1 or parts[0].shape[1:] != shape[1:] or not covers:
        raise CorruptArtifact(
            f"{files[0].path}: {kind} of parameter {number} has the shares {[list(part.shape) for part in parts]} of "
            f"{list(shape)}: files of a data parallel rank are missing, or they are of different checkpoints"
        )
    return _Shares(TensorFacts(parts[0].dtype, shape), tuple((file, number, kind) for file in files))


def _keys(checkpoint: NeuronCheckpoint, names: Sequence[Sequence[str]]) -> list[list[str]]:
    """The names as keys of the shards' files; CorruptArtifact for one that is none of its pipeline rank's."""
    if len(names) != checkpoint.pp_size:
        raise CorruptArtifact(
            f"{checkpoint.path}: there are names of {len(names)} pipeline ranks' parameters, and files of "
            f"{checkpoint.pp_size}"
        )
    keys = []
    for stage, of_rank in zip(checkpoint.stages, names, strict=True):
        keys.append([stored_key(name, checkpoint.adapter) or name for name in of_rank])
        unknown = set(keys[-1]) - stage.parameters.keys()
        if unknown:
            raise CorruptArtifact(f"{stage.where} does not know the optimizer's {some_names(unknown)}")
    return keys


def _plan(
    checkpoint: NeuronCheckpoint,
    kind: str,
    shares: Mapping[tuple[str, RankKey], Mapping[str, _Shares]],
    keys: Sequence[Sequence[str]],
) -> dict[str, PlannedTensor]:
    """Moments and masters are cut as their parameters are, so the same rules put them together."""
    held = {
        (pp_rank, tp_rank): {key: each.facts for key, each in shares.get((kind, (pp_rank, tp_rank)), {}).items()}
        for pp_rank in range(checkpoint.pp_size)
        for tp_rank in range(checkpoint.tp_size)
    }
    plans = plan_tensors([_narrowed(stage, keys[at]) for at, stage in enumerate(checkpoint.stages)], held)
    for name, plan in plans.items():
        trained = checkpoint.tensors.get(name)
        if trained is None or trained.shape != plan.shape:
            raise CorruptArtifact(
                f"{checkpoint.path}: {kind} of {name!r} has shape {list(plan.shape)}, the parameter "
                f"{'is absent' if trained is None else list(trained.shape)}: the names are in another order, or of "
                "another training"
            )
    return plans


def _narrowed(stage: StageMetadata, keys: Sequence[str]) -> StageMetadata:
    layouts = {key: ParameterLayout(stage.parameters[key].axis, is_promised=True) for key in keys}
    return replace(stage, parameters=layouts, modules=())
