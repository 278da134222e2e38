"""Writes and loads checkpoints through neuronx-distributed, in the order in which its code is right.

backends/neuron.py calls it; the temporary folder, the manifest and which checkpoint to load are not its business
(checkpoint_writing.py, checkpoints.py). What the vendor's functions do by themselves is not relied on: they take a
checkpoint for complete that is not, or the newest by a file's time; they load what a flipped bit has changed; and in
one call they load the optimizer before the weights that it is made from. docs/design/0024 has the list.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_trainer import methods
from finetune_trainer.artifacts import FileEntry, hash_file
from finetune_trainer.backends import Channel
from finetune_trainer.backends.neuron_config import ADAPTER
from finetune_trainer.backends.neuron_model import PEFT_PREFIX
from finetune_trainer.checkpoints import (
    NEURON_ADAPTER_SHARDS,
    NEURON_FORMAT,
    NEURON_MODEL_SHARDS,
    NEURON_SIZES,
    Checkpoint,
    neuron_shard_files,
)
from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.safetensors_stream import some_names

_CONFIG_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class RankState:
    """One rank's part of a training, as the vendor's objects hold it.

    `core` is the model (with its adapter), `engine` the pipeline around it or None; `optimizer` the NxDOptimizer;
    `trained` what trains on this rank by its name in the whole model, in the optimizer's order, and `order` the names
    in files of every pipeline stage's. `adapter_config` is adapter_config.json, None where there is no adapter.
    """

    channel: Channel
    rank: int
    world_size: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    layout: Mapping[str, int]
    order: Mapping[str, list[str]]
    core: Any
    engine: Any
    optimizer: Any
    trained: Mapping[str, torch.nn.Parameter]
    base: Path
    adapter_config: bytes | None
    rounds_at_random: bool

    @property
    def shards(self) -> str:
        """Folder of the shards below a checkpoint's."""
        return NEURON_MODEL_SHARDS if self.adapter_config is None else NEURON_ADAPTER_SHARDS


@dataclass(frozen=True)
class NeuronSnapshot:
    """See backends.Snapshot. The devices' own state, not a copy: nothing may train until it is written."""

    state: RankState

    @property
    def extra(self) -> Mapping[str, Any]:
        return {
            "format": NEURON_FORMAT,
            "layout": dict(self.state.layout),
            # The vendor's optimizer files number their parameters and have no names.
            "optimizerNames": dict(self.state.order),
        }

    def write(self, folder: Path, step: int) -> list[FileEntry]:
        from neuronx_distributed.trainer.checkpoint import finalize_checkpoint, save_checkpoint

        state = self.state
        home, tag = os.path.split(folder / state.shards)
        # `folder` is new: into one that exists the vendor writes file by file, and leaves its mark of a complete
        # checkpoint standing where it fails midway.
        save_checkpoint(
            home,
            tag=tag,
            model=_weights(state),
            optimizer=state.optimizer,
            user_content=_content(state, step),
            use_xser=True,
            num_workers=8,
            async_save=False,
        )
        finalize_checkpoint()
        _write_beside(state, Path(home), Path(home) / tag)
        state.channel.gather(None)  # now every rank has written
        names = state.channel.broadcast(sorted(_files(folder)) if state.rank == 0 else None)
        _check_complete(state, folder, names)
        return [_entry(folder, name) for name in names[state.rank :: state.world_size]]


def load_snapshot(state: RankState, checkpoint: Checkpoint) -> None:
    """Take weights, masters and moments from `checkpoint`, which is of this layout. All ranks.

    CorruptArtifact, in every rank, before anything is overwritten where one rank's files are not what was written:
    the vendor's loading has no way back, and a rank that fails alone leaves the others waiting.
    """
    from neuronx_distributed.trainer.checkpoint import load_checkpoint

    _agree(state, _damage(state, checkpoint))
    _check_order(state, checkpoint)
    home, tag = os.path.split(checkpoint.path / state.shards)
    # First the weights, by themselves: with an optimizer in the same call the vendor makes its masters from whatever
    # the weights are by then, and where masters are in the files it does not read the weights at all.
    box: dict[str, torch.Tensor] = {}
    load_checkpoint(home, tag=tag, model=box)
    saved = _take_weights(state, box)
    del box
    # Then masters and moments.
    content = load_checkpoint(home, tag=tag, optimizer=state.optimizer)
    _agree(state, _diverging(state, saved))
    with torch.no_grad():
        for name, weight in saved.items():
            # The vendor has just made the weights from the masters again, at random where the device rounds so.
            state.trained[name].data.copy_(weight)
    states = (content or {}).get("randomStates")
    if states and len(states) == state.world_size:
        torch.set_rng_state(states[state.rank])


def rounds_to(master: torch.Tensor, weight: torch.Tensor, *, at_random: bool = False) -> bool:
    """Whether every `weight` is its float32 `master` in the weight's own dtype, rounded to the nearest.

    With `at_random` it may be the bf16 number on either side of the master.
    """
    if torch.equal(master.to(weight.dtype), weight):
        return True
    if not at_random or weight.dtype != torch.bfloat16:
        return False
    # A bf16 number is the upper half of a float32: the two around a master are its upper half and the one above.
    below = torch.div(master.contiguous().view(torch.int32), 1 << 16, rounding_mode="floor")
    found = torch.div(weight.float().contiguous().view(torch.int32), 1 << 16, rounding_mode="floor")
    return bool(((found == below) | (found == below + 1)).all())


def _weights(state: RankState) -> dict[str, torch.Tensor]:
    """What the files of this rank hold, by the names of the whole model, those of an adapter as peft has them."""
    tensors = state.core.state_dict() if state.engine is None else state.engine.local_state_dict()
    if state.adapter_config is None:
        return dict(tensors)
    from optimum.neuron.peft.utils.save_and_load import get_peft_model_state_dict

    adapter = get_peft_model_state_dict(
        state.core,
        state_dict=None if state.engine is None else tensors,
        adapter_name=ADAPTER,
        save_embedding_layers=False,
    )
    # The engine's names have lost peft's prefix, which the metadata beside them has.
    prefix = "" if state.engine is None else PEFT_PREFIX
    return {prefix + name: tensor for name, tensor in adapter.items()}


def _content(state: RankState, step: int) -> dict[str, Any]:
    """What the vendor has no place for; plain types and tensors, so that it is read without unpickling. All ranks."""
    return {
        "step": step,
        "layout": dict(state.layout),
        "optimizerNames": dict(state.order),
        "randomStates": state.channel.gather(torch.get_rng_state()),
    }


def _write_beside(state: RankState, home: Path, shards: Path) -> None:
    """The metadata of each pipeline stage, and the configuration that says what the shards are of."""
    if state.dp_rank == 0 and state.tp_rank == 0:
        from optimum.neuron.models.training import create_parameter_metadata

        metadata = create_parameter_metadata(state.core)
        (shards / f"mp_metadata_pp_rank_{state.pp_rank}.json").write_text(json.dumps(metadata, indent=2))
    if state.rank != 0:
        return
    if state.adapter_config is not None:
        (home / "adapter_config.json").write_bytes(state.adapter_config)
        return
    for name in _CONFIG_FILES:
        if (state.base / name).exists():
            shutil.copyfile(state.base / name, home / name)


def _files(folder: Path) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        for name in names:
            yield (Path(root) / name).relative_to(folder).as_posix()


def _check_complete(state: RankState, folder: Path, names: Iterable[str]) -> None:
    expected = neuron_shard_files(state.shards, *(state.layout[size] for size in NEURON_SIZES))
    missing = {name for group in expected.values() for name in group} - set(names)
    if missing:
        raise CorruptArtifact(f"{folder}: the vendor's writer left out {some_names(missing)}")


def _entry(folder: Path, name: str) -> FileEntry:
    """The entry of a file that the vendor wrote, made durable and read back."""
    path = folder / name
    found = hash_file(path, sync=True)
    if name.endswith(".pt"):
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except zipfile.BadZipFile as error:
            broken = str(error)
        if broken is not None:
            raise CorruptArtifact(f"{path} does not hold what was written ({broken}): the volume damages data")
    return FileEntry(name, path.stat().st_size, found)


def _damage(state: RankState, checkpoint: Checkpoint) -> str | None:
    """What is wrong with the files that this rank reads: another node may see other bytes than the first one's."""
    rank = f"tp_rank_{state.tp_rank:02d}_pp_rank_{state.pp_rank:02d}.pt"
    own = (
        f"{state.shards}/model/dp_rank_00_{rank}",
        f"{state.shards}/optim/dp_rank_{state.dp_rank:02d}_{rank}",
        f"{state.shards}/user_content.pt",
    )
    for entry in checkpoint.files:
        if entry.path.startswith(own):
            path = checkpoint.path / entry.path
            try:
                found = hash_file(path)
            except OSError as error:
                return f"rank {state.rank}: {path}: {error}"
            if found != entry.sha256:
                return f"rank {state.rank}: {path} has sha256 {found}, expected {entry.sha256}"
    return None


def _agree(state: RankState, problem: str | None) -> None:
    """CorruptArtifact in every rank when any has a problem. All ranks."""
    problems = [found for found in state.channel.gather(problem) if found is not None]
    if problems:
        raise CorruptArtifact(problems[0])


def _check_order(state: RankState, checkpoint: Checkpoint) -> None:
    stored = checkpoint.state.get("optimizerNames")
    if stored != dict(state.order):
        raise UserError(
            "CheckpointOfAnotherJob",
            f"{checkpoint.path.name} cannot be resumed: its optimizer files number other parameters, or in another "
            "order, than this trainer's (optimizerNames of state.json): use the image that wrote it, or delete the "
            "checkpoints to start over",
        )


def _take_weights(state: RankState, box: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy the loaded weights into the parameters; the copies on the host, by the parameters' names. All ranks."""
    names = {methods.file_name(name): name for name in state.trained}
    missing, foreign = names.keys() - box.keys(), box.keys() - names.keys()
    problem = None
    if missing or foreign:
        which = "lacks" if missing else "has the foreign"
        problem = f"rank {state.rank}: the shards' file {which} {some_names(missing or foreign)}"
    for key in () if problem else sorted(names):
        if box[key].shape != state.trained[names[key]].shape:
            problem = (
                f"rank {state.rank}: {key!r} has shape {list(box[key].shape)}, expected "
                f"{list(state.trained[names[key]].shape)}"
            )
    _agree(state, problem)
    saved = {}
    with torch.no_grad():
        for key, name in names.items():
            saved[name] = box[key].detach().cpu()
            state.trained[name].data.copy_(box[key])
    return saved


def _diverging(state: RankState, saved: Mapping[str, torch.Tensor]) -> str | None:
    """The first parameter whose float32 master, as it is loaded, is not its weight as that was saved."""
    zero = state.optimizer.optimizer
    names = {id(parameter): name for name, parameter in state.trained.items()}
    for group, sharded in zip(zero.param_groups, zero.base_optimizer.param_groups, strict=True):
        for parameter, shard in zip(group["params"], sharded["params"], strict=True):
            name = names[id(parameter)]
            weight = zero._shard_tensor(saved[name])
            if not rounds_to(shard.detach().cpu(), weight, at_random=state.rounds_at_random):
                return f"rank {state.rank}: the optimizer's float32 copy of {name!r} is not its weight"
    return None
