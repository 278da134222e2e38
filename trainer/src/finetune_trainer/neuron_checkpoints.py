"""Reads the sharded checkpoints of neuronx-distributed, as optimum-neuron 0.1 to 0.4.5 writes them, with plain torch.

The consolidate stage and `finetune-trainer consolidate-checkpoint` open them here; neither torch_xla nor the vendor's
packages are needed. neuron_layout.py has the rules of what lies where, neuron_shard_files.py the files,
neuron_tensors.py puts tensors together. What is opened is complete: every rank's file is there, every key in it is
known to the metadata, and every tensor that the metadata promises is there. The copies that several ranks hold of the
same values are compared as a tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.json_files import read_json_file
from finetune_trainer.model_files import CONFIG_NAME
from finetune_trainer.neuron_layout import Piece, RankKey, StageMetadata, parse_metadata, plan_tensors
from finetune_trainer.neuron_shard_files import (
    Rank,
    ShardFile,
    check_contents,
    give_back,
    load_file,
    open_shard_file,
    rank_file_name,
    scan_ranks,
)
from finetune_trainer.neuron_tensors import NeuronTensor
from finetune_trainer.safetensors_stream import some_names

FULL_FOLDER, ADAPTER_FOLDER = "shards", "adapter_shards"
"""The vendor's tags, the folders that hold the ranks' files."""

_METADATA = re.compile(r"mp_metadata_pp_rank_(?P<pp>\d{1,4})\.(json|pt)")
_STEP = re.compile(r"(checkpoint|step)-(?P<step>\d+)")
_DEFAULT_ADAPTER = "default"
_MOST_RANKS = 1 << 16


@dataclass(frozen=True)
class NeuronCheckpoint:
    """A sharded checkpoint whose files and metadata agree. `path` is its folder, `shards` the one of the ranks' files.

    `adapter` is the adapter's name, None for a full model; `step` is the one in the folder's name, else 0; `ignored`
    counts keys in files of pipeline ranks that do not own them. `stages` has each pipeline rank's metadata. `apart` is
    None, or gets the names of tensors that were read and whose copies differ between ranks.
    """

    path: Path
    shards: Path
    step: int
    tp_size: int
    pp_size: int
    adapter: str | None
    tensors: Mapping[str, NeuronTensor]
    stages: tuple[StageMetadata, ...]
    ignored: int
    apart: set[str] | None = None

    @property
    def world_size(self) -> int:
        """How many ranks' files hold the model."""
        return self.tp_size * self.pp_size

    @property
    def config_folder(self) -> Path:
        """Where the vendor puts adapter_config.json or config.json."""
        return self.shards.parent

    def parameters(self) -> dict[str, NeuronTensor]:
        """The trained parameters by name, sorted."""
        return dict(self.tensors)


def open_neuron_checkpoint(folder: Path, *, contents: bool = False, first_copies: bool = False) -> NeuronCheckpoint:
    """The checkpoint in `folder`: a checkpoint-N or step-N folder, one with adapter_shards/ or shards/, or that itself.

    With `contents` the model's files are held against their own checksums; leave it off where a manifest's sha256 was
    verified before. A tensor whose copies differ cannot be read, or with `first_copies` is noted in `apart` and the
    first is taken, as the vendor's own consolidation does.

    UserError when there is no checkpoint (NoCheckpoint), when a file holds code (UnsafePickle) or a layout is not known
    (UnsupportedShards); CorruptArtifact names a rank that is missing, a file that is damaged or foreign, and metadata
    that does not fit the shards.
    """
    shards, adapter = _find_shards(folder)
    if not (shards / "done").is_file():
        raise CorruptArtifact(
            f"{shards} has no file `done`, which is written last: the checkpoint was never finished; use an earlier one"
        )
    stages = _read_stages(shards, adapter)
    paths = complete_ranks(shards / "model", scan_ranks(shards / "model"), stages, dp_size=1)
    if contents:
        check_contents(shards / "model")
    files = {(pp_rank, tp_rank): open_shard_file(path) for (_, tp_rank, pp_rank), path in paths.items()}
    held = {rank: file.facts for rank, file in files.items()}
    plans = plan_tensors(stages, held, tied=adapter is None and _is_tied(shards.parent))
    source = _ModelSource(files)
    apart: set[str] | None = set() if first_copies else None
    return NeuronCheckpoint(
        path=folder,
        shards=shards,
        step=_step(folder, shards),
        tp_size=max(tp_rank for _, tp_rank in files) + 1,
        pp_size=len(stages),
        adapter=adapter,
        tensors={name: NeuronTensor(plan, source, apart) for name, plan in plans.items()},
        stages=stages,
        ignored=sum(len(held[pp_rank, 0].keys() - stage.parameters.keys()) for pp_rank, stage in enumerate(stages)),
        apart=apart,
    )


def complete_ranks(
    folder: Path, found: Mapping[Rank, Path], stages: Sequence[StageMetadata], dp_size: int
) -> dict[Rank, Path]:
    """`found` in order, once it has each rank that there was by the metadata and no other; CorruptArtifact else."""
    said = {stage.tp_size: stage.where for stage in stages if stage.tp_size is not None}
    if len(said) > 1:
        sizes = " and ".join(f"{where} is of tensor parallel size {size}" for size, where in said.items())
        raise CorruptArtifact(f"{sizes}: they are of different checkpoints")
    most = max((tp_rank for _, tp_rank, _ in found), default=0) + 1
    tp_size = next(iter(said), most)
    if tp_size * len(stages) * dp_size > _MOST_RANKS:
        raise CorruptArtifact(f"{stages[0].where} is of tensor parallel size {tp_size}, which no cluster has")
    expected = {(dp, tp, pp) for dp in range(dp_size) for tp in range(tp_size) for pp in range(len(stages))}
    for rank in sorted(found.keys() - expected):
        dp_rank, tp_rank, pp_rank = rank
        if pp_rank >= len(stages):
            raise CorruptArtifact(
                f"{found[rank]} is of pipeline rank {pp_rank}, and there is no mp_metadata_pp_rank_{pp_rank}.json: "
                "copy the whole checkpoint"
            )
        if tp_rank >= tp_size:
            raise CorruptArtifact(
                f"{found[rank]} is of tensor parallel rank {tp_rank}, and {said[tp_size]} is of tensor parallel size "
                f"{tp_size}: metadata and shards are of different checkpoints"
            )
        raise CorruptArtifact(f"{found[rank]} is foreign: data parallel rank {dp_rank} writes no such file; remove it")
    missing = sorted(expected - found.keys())
    if missing:
        raise CorruptArtifact(
            f"{folder} lacks {some_names(map(rank_file_name, missing))} (the metadata is of tensor parallel size "
            f"{tp_size} and pipeline parallel size {len(stages)}): copy the whole checkpoint"
        )
    return {rank: found[rank] for rank in sorted(expected)}


class _ModelSource:
    """Reads the model's tensors; those of one tensor's pieces stay open until it was read."""

    def __init__(self, files: Mapping[RankKey, ShardFile]) -> None:
        self._files = files
        self._open: dict[tuple[int, int, str], torch.Tensor] = {}

    def tensor(self, piece: Piece) -> torch.Tensor:
        at = piece.pp_rank, piece.tp_rank, piece.key
        if at not in self._open:
            self._open[at] = self._files[at[:2]].tensor(piece.key)
        return self._open[at]

    def where(self, piece: Piece) -> str:
        return str(self._files[piece.pp_rank, piece.tp_rank].path)

    def let_go(self) -> None:
        for tensor in self._open.values():
            give_back(tensor)
        self._open.clear()


def _find_shards(folder: Path) -> tuple[Path, str | None]:
    """The folder with the ranks' files, and the adapter's name if they are an adapter's."""
    if not folder.is_dir():
        raise UserError("NoCheckpoint", f"{folder} is no folder: name a checkpoint's")
    if folder.name in (FULL_FOLDER, ADAPTER_FOLDER) and (folder / "model").is_dir():
        return folder, None if folder.name == FULL_FOLDER else _adapter_name(folder.absolute().parent)
    if (folder / FULL_FOLDER).is_dir():
        return folder / FULL_FOLDER, None
    if (folder / ADAPTER_FOLDER).is_dir():
        return folder / ADAPTER_FOLDER, _adapter_name(folder.absolute())
    adapters = sorted(path.parent for path in folder.glob(f"adapter_*/{ADAPTER_FOLDER}") if path.is_dir())
    if len(adapters) > 1:
        names = some_names(path.name for path in adapters)
        raise UserError("NoCheckpoint", f"{folder} has several adapters ({names}): name the folder of one")
    if not adapters:
        raise UserError(
            "NoCheckpoint",
            f"{folder} has neither {ADAPTER_FOLDER} nor {FULL_FOLDER} in it: name a checkpoint-N folder of a training "
            "on Trainium",
        )
    return adapters[0] / ADAPTER_FOLDER, _adapter_name(adapters[0])


def _adapter_name(folder: Path) -> str:
    return folder.name.removeprefix("adapter_") if folder.name.startswith("adapter_") else _DEFAULT_ADAPTER


def _read_stages(shards: Path, adapter: str | None) -> tuple[StageMetadata, ...]:
    found: dict[int, StageMetadata] = {}
    # Releases up to 0.2 write .pt, later ones .json. Sorted, so that .pt counts where both are, as for the vendor.
    for path in sorted(shards.iterdir()):
        match = _METADATA.fullmatch(path.name)
        if match is not None:
            value = read_json_file(path) if path.suffix == ".json" else load_file(path)
            found[int(match["pp"])] = parse_metadata(value, str(path), adapter=adapter)
    missing = set(range(max(found, default=0) + 1)) - found.keys()
    if missing:
        raise CorruptArtifact(
            f"{shards} lacks mp_metadata_pp_rank_{min(missing)}.json, which says how that pipeline rank's tensors are "
            "cut: copy the whole checkpoint"
        )
    return tuple(found[pp_rank] for pp_rank in range(len(found)))


def _is_tied(folder: Path) -> bool:
    path = folder / CONFIG_NAME
    config = read_json_file(path) if path.is_file() else {}
    return isinstance(config, dict) and config.get("tie_word_embeddings") is True


def _step(folder: Path, shards: Path) -> int:
    for path in (folder.absolute(), *shards.absolute().parents):
        match = _STEP.fullmatch(path.name)
        if match is not None:
            return int(match["step"])
    return 0
