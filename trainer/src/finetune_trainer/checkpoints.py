"""Sharded checkpoints: what one rank writes, which checkpoint is the last whole one, and how its tensors are read.

A checkpoint is an artifact (manifest.json last, renamed into place) of kind "checkpoint" in `step-<8 digits>/`:

    rank-<5 digits>.safetensors   one a rank: disjoint slices of every trainable parameter and optimizer moment, and the
                                  rank's own random states. `__metadata__` has the key "finetune" with JSON
                                  {"version", "rank", "worldSize", "step",
                                   "tensors": {key: {"name", "kind", "shape": [global], "offset": [...]}}}
    state.json                    everything that is no tensor: step, rows consumed, identity of data, method and base
                                  model, optimizer, scheduler, world size, names and shapes of the parameters

Names are the ones that peft writes to adapter files (no adapter name in them), so consolidation is concatenation.

A checkpoint whose state.json has a "format" is in that format instead, in the same kind of folder with the same
manifest: NEURON_FORMAT is the vendor's shards, which neuron_checkpoints.py reads. Which checkpoint to take, what is
damaged, what to refuse and what to remove is decided here for all of them.

The training loop writes and resumes with this module and consolidation reads with it; it knows no process group, no
model library and no device, and never unpickles.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.artifacts import FileEntry, Manifest, hash_file, remove_artifact, verify_artifact
from finetune_trainer.contract import canonical_json
from finetune_trainer.errors import CorruptArtifact
from finetune_trainer.json_files import is_count, parse_json, read_json_file
from finetune_trainer.safetensors_stream import (
    SafetensorsWriter,
    TensorInfo,
    TensorPlan,
    TensorReader,
    read_header,
    some_names,
)

CHECKPOINT_KIND = "checkpoint"
STATE_NAME = "state.json"
FORMAT_VERSION = 1

NEURON_FORMAT = "neuronx-distributed"
"""state.json's "format" where parameters and optimizer are shards as neuronx-distributed writes them."""
NEURON_ADAPTER_SHARDS = "adapter_default/adapter_shards"
NEURON_MODEL_SHARDS = "shards"
"""Where in such a checkpoint the shards of an adapter and those of a whole model lie."""
NEURON_SIZES = ("tensorParallelSize", "pipelineParallelSize", "dataParallelSize")
"""Sizes in state.json's "layout" of such a checkpoint, which together make its world size."""

PARAMETER = "param"
FIRST_MOMENT = "exp_avg"
SECOND_MOMENT = "exp_avg_sq"
RANDOM_STATE = "random"
"""Kinds of tensors. A random state belongs to one rank; of the others the ranks hold disjoint slices."""

_METADATA_KEY = "finetune"
_MOST_RANKS = 1 << 20
_FOLDER_PATTERN = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class LocalSlice:
    """One slice as its rank holds it, ready to be written.

    `shape` is the whole tensor's, `local_shape` the slice's, which begins at `offset`; `data` returns its bytes in C
    order, and is called while the file is written so that slices on a device are copied one at a time.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    local_shape: tuple[int, ...]
    data: Callable[[], bytes | bytearray | memoryview]

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True)
class StoredSlice:
    """One slice of a checkpoint: rows `start` to `stop` of dimension 0 of the whole tensor, and where they lie."""

    path: Path
    rank: int
    start: int
    stop: int
    info: TensorInfo


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor of a checkpoint; its slices, in the order of dimension 0, have exactly its bytes in turn."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    slices: tuple[StoredSlice, ...]

    def chunks(self) -> Iterator[bytearray]:
        """The tensor's bytes in C order, in pieces of bounded size."""
        for part in self.slices:
            with TensorReader(part.path) as reader:
                yield from reader.chunks(part.info)

    def rows(self, start: int, stop: int) -> Iterator[bytearray]:
        """The bytes of rows `start` to `stop` of dimension 0, one piece for each slice that has some of them."""
        for part in self.slices:
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last:
                row = part.info.nbytes // (part.stop - part.start)
                begin = part.info.start + (first - part.start) * row
                with TensorReader(part.path) as reader:
                    yield reader.read_range(begin, begin + (last - first) * row)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files, index and state agree. `tensors` by (kind, name), random states by (rank, name).

    Both are empty where `format` is not None: a reader of its own reads those. `files` are the manifest's.
    """

    path: Path
    step: int
    world_size: int
    digest: str
    state: Mapping[str, Any]
    tensors: Mapping[tuple[str, str], StoredTensor]
    random_states: Mapping[tuple[int, str], StoredTensor]
    files: tuple[FileEntry, ...] = ()

    @property
    def format(self) -> str | None:
        """state.json's "format"; None is this module's own."""
        return self.state.get("format")

    def parameter_facts(self) -> dict[str, list[Any]]:
        """{name: [shape, dtype]} of the trainable parameters."""
        if self.format is None:
            return {name: [list(tensor.shape), tensor.dtype] for name, tensor in self.parameters().items()}
        return {name: [entry["shape"], entry.get("dtype")] for name, entry in self.state["parameters"].items()}

    def parameters(self) -> dict[str, StoredTensor]:
        """The trainable parameters by name, sorted."""
        return {name: self.tensors[kind, name] for kind, name in sorted(self.tensors) if kind == PARAMETER}

    def read_rows(self, kind: str, name: str, start: int, stop: int) -> bytearray:
        """The bytes of rows `start` to `stop` of one tensor, whichever ranks wrote them."""
        pieces = list(self.tensors[kind, name].rows(start, stop))
        return pieces[0] if len(pieces) == 1 else bytearray(b"".join(pieces))


@dataclass(frozen=True)
class Damage:
    """A checkpoint that cannot be used, and why."""

    path: Path
    reason: str


def rank_file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies under `root`."""
    return root / f"step-{step:08d}"


def slice_bounds(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Rows of dimension 0 that `rank` writes: equal shares, or all for rank 0 where there are fewer rows than ranks."""
    if rows < world_size:
        return (0, rows) if rank == 0 else (0, 0)
    return rank * rows // world_size, (rank + 1) * rows // world_size


def write_rank_file(folder: Path, rank: int, world_size: int, step: int, slices: Sequence[LocalSlice]) -> FileEntry:
    """Write this rank's file into `folder`, fsync it, and read it back from the volume.

    Returns its entry for the manifest. CorruptArtifact when what was read back is not what was written.
    """
    path = folder / rank_file_name(rank)
    header = {
        "version": FORMAT_VERSION,
        "rank": rank,
        "worldSize": world_size,
        "step": step,
        "tensors": {
            part.key: {"name": part.name, "kind": part.kind, "shape": list(part.shape), "offset": list(part.offset)}
            for part in slices
        },
    }
    plan = [TensorPlan(part.key, part.dtype, part.local_shape) for part in slices]
    with SafetensorsWriter(path, plan, {_METADATA_KEY: canonical_json(header).decode()}) as writer:
        for part in slices:
            writer.write(part.key, [part.data()])
    _drop_page_cache(path)
    found = hash_file(path)
    if found != writer.sha256:
        raise CorruptArtifact(f"{path}: wrote sha256 {writer.sha256}, read back {found}: the volume damages data")
    return FileEntry(path.name, writer.size, writer.sha256)


def read_checkpoint(path: Path, *, contents: bool = True) -> Checkpoint:
    """The checkpoint at `path`, verified: manifest, sizes, with `contents` each file's sha256, and that no rank's slice
    is missing, foreign or doubled. CorruptArtifact names the file or tensor."""
    manifest = verify_artifact(path, contents=contents)
    if manifest.kind != CHECKPOINT_KIND:
        raise CorruptArtifact(f"{path} is an artifact of kind {manifest.kind!r}, expected {CHECKPOINT_KIND!r}")
    state = _read_state(path)
    tensors: dict[tuple[str, str], StoredTensor] = {}
    random_states: dict[tuple[int, str], StoredTensor] = {}
    if "format" in state:
        _check_neuron_files(path, manifest, state)
    else:
        tensors, random_states = _index(path, manifest, state)
        _check_parameters(path, state, tensors)
    step, world_size = state["step"], state["worldSize"]
    return Checkpoint(path, step, world_size, manifest.digest, state, tensors, random_states, manifest.files)


def neuron_shard_files(shards: str, tp_size: int, pp_size: int, dp_size: int) -> dict[str, tuple[str, ...]]:
    """The files that neuronx-distributed writes below the folder `shards`, by what is in them.

    "model" has one for each tensor and pipeline parallel rank, "optim" (ZeRO-1) one for each rank of all, "metadata"
    one for each pipeline parallel rank. Data parallel ranks come first, then tensor and pipeline parallel ones.
    """
    name = "dp_rank_{:02d}_tp_rank_{:02d}_pp_rank_{:02d}.pt"
    stages = [(tp, pp) for pp in range(pp_size) for tp in range(tp_size)]
    return {
        "model": tuple(f"{shards}/model/{name.format(0, tp, pp)}" for tp, pp in stages),
        "optim": tuple(f"{shards}/optim/{name.format(dp, tp, pp)}" for tp, pp in stages for dp in range(dp_size)),
        "metadata": tuple(f"{shards}/mp_metadata_pp_rank_{pp}.json" for pp in range(pp_size)),
    }


def list_checkpoints(root: Path) -> list[Path]:
    """Folders under `root` named like checkpoints, newest step first, whole or not."""
    if not root.is_dir():
        return []
    named = [entry for entry in root.iterdir() if _FOLDER_PATTERN.fullmatch(entry.name)]
    return sorted(named, key=lambda entry: entry.name, reverse=True)


def find_last_checkpoint(root: Path) -> tuple[Checkpoint | None, list[Damage]]:
    """The newest checkpoint under `root` that verifies with its contents, and the newer ones that do not."""
    damaged: list[Damage] = []
    for path in list_checkpoints(root):
        try:
            return read_checkpoint(path), damaged
        except CorruptArtifact as error:
            damaged.append(Damage(path, error.message))
    return None, damaged


def remove_old_checkpoints(root: Path, step: int, keep: int) -> list[Path]:
    """Remove all but the `keep` newest (at least one) checkpoints up to `step` under `root`; returns the removed ones.

    Those beyond the step that was just written did not verify when training resumed, or are another attempt's: they
    must not count, or the good ones would go instead of them.
    """
    newest = checkpoint_folder(root, step).name
    removed = [path for path in list_checkpoints(root) if path.name <= newest][max(1, keep) :]
    for path in removed:
        remove_artifact(path)
    return removed


def differences(expected: Any, found: Any, where: str = "") -> list[str]:
    """One line for each field that differs between two JSON values: path, the job's value, the checkpoint's value."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        lines = []
        for key in sorted({*expected, *found}):
            path = f"{where}.{key}" if where else str(key)
            lines += differences(expected.get(key), found.get(key), path)
        return lines
    if expected == found:
        return []
    return [f"{where}: the job has {json.dumps(expected)}, the checkpoint {json.dumps(found)}"]


def _check_neuron_files(path: Path, manifest: Manifest, state: Mapping[str, Any]) -> None:
    """The manifest has proved what is there; this proves that it is all that a checkpoint of this layout has."""
    file = path / STATE_NAME
    if state["format"] != NEURON_FORMAT:
        raise CorruptArtifact(f"{file} has format {state['format']!r}, this trainer reads {NEURON_FORMAT!r}")
    layout = state.get("layout")
    sizes: list[Any] = [layout.get(name) for name in NEURON_SIZES] if isinstance(layout, dict) else []
    if not sizes or not all(is_count(size) and 0 < size <= _MOST_RANKS for size in sizes):
        raise CorruptArtifact(f"{file} has no layout with {', '.join(NEURON_SIZES)}: {layout!r}")
    if math.prod(sizes) != state["worldSize"]:
        raise CorruptArtifact(f"{file}: the sizes in its layout {layout} do not make worldSize {state['worldSize']}")
    present = {entry.path for entry in manifest.files}
    shards = [name for name in (NEURON_ADAPTER_SHARDS, NEURON_MODEL_SHARDS) if f"{name}/done" in present]
    if len(shards) != 1:
        which = "both" if shards else "neither"
        raise CorruptArtifact(f"{path} has {which} of {NEURON_ADAPTER_SHARDS}/done and {NEURON_MODEL_SHARDS}/done")
    expected = {name for names in neuron_shard_files(shards[0], *sizes).values() for name in names}
    if missing := expected - present:
        raise CorruptArtifact(f"{path} was written by {state['worldSize']} ranks and lacks {some_names(missing)}")


def _read_state(path: Path) -> dict[str, Any]:
    file = path / STATE_NAME
    try:
        state = read_json_file(file)
        version, step, world_size = state["version"], state["step"], state["worldSize"]
        names = state["parameters"]
    except (OSError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{file} is no checkpoint state: {type(error).__name__}: {error}") from error
    if version != FORMAT_VERSION:
        raise CorruptArtifact(f"{file} has version {version!r}, this trainer reads {FORMAT_VERSION}")
    is_counted = is_count(step) and is_count(world_size) and world_size <= _MOST_RANKS
    if not is_counted or not isinstance(names, dict):
        raise CorruptArtifact(f"{file}: step {step!r}, worldSize {world_size!r} or its parameters have the wrong type")
    for name, entry in names.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(map(is_count, shape)):
            raise CorruptArtifact(f"{file}: parameter {name!r} has no shape: {entry!r}")
    return dict(state)


def _index(
    path: Path, manifest: Manifest, state: Mapping[str, Any]
) -> tuple[dict[tuple[str, str], StoredTensor], dict[tuple[int, str], StoredTensor]]:
    expected = {rank_file_name(rank) for rank in range(state["worldSize"])}
    present = {entry.path for entry in manifest.files} - {STATE_NAME}
    if expected != present:
        missing, foreign = expected - present, present - expected
        words = f"lacks {some_names(missing)}" if missing else f"has the foreign file {some_names(foreign)}"
        raise CorruptArtifact(f"{path} was written by {state['worldSize']} ranks and {words}")
    parts: dict[tuple[str, str], list[StoredSlice]] = {}
    facts: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {}
    random_states = {}
    for rank in range(state["worldSize"]):
        for name, kind, shape, part in _rank_slices(path / rank_file_name(rank), rank, state):
            if kind == RANDOM_STATE:
                random_states[rank, name] = StoredTensor(name, kind, part.info.dtype, shape, (part,))
                continue
            known = facts.setdefault((kind, name), (part.info.dtype, shape))
            if known != (part.info.dtype, shape):
                raise CorruptArtifact(
                    f"{part.path}: {kind} of {name!r} is {part.info.dtype} {list(shape)}, "
                    f"other ranks have {known[0]} {list(known[1])}"
                )
            parts.setdefault((kind, name), []).append(part)
    tensors = {}
    for (kind, name), found in parts.items():
        dtype, shape = facts[kind, name]
        ordered = tuple(sorted(found, key=lambda part: part.start))
        _check_coverage(path, kind, name, shape, ordered)
        tensors[kind, name] = StoredTensor(name, kind, dtype, shape, ordered)
    return tensors, random_states


def _rank_slices(
    path: Path, rank: int, state: Mapping[str, Any]
) -> Iterator[tuple[str, str, tuple[int, ...], StoredSlice]]:
    header = read_header(path)
    try:
        layout = parse_json(header.metadata[_METADATA_KEY], f"{path}: its layout")
        found = (layout["version"], layout["rank"], layout["worldSize"], layout["step"])
        tensors = layout["tensors"]
        wanted = (FORMAT_VERSION, rank, state["worldSize"], state["step"])
        if found != wanted:
            raise CorruptArtifact(
                f"{path} says (version, rank, worldSize, step) = {found}, its checkpoint says {wanted}: "
                "it belongs to another checkpoint"
            )
        if set(tensors) != set(header.tensors):
            raise CorruptArtifact(f"{path}: the tensors in its layout and in its header are not the same")
        for key, entry in tensors.items():
            name, kind, shape, offset = entry["name"], entry["kind"], tuple(entry["shape"]), tuple(entry["offset"])
            info = header.tensors[key]
            if not isinstance(name, str) or not isinstance(kind, str) or not all(map(is_count, (*shape, *offset))):
                raise CorruptArtifact(f"{path}: {key!r} has no name, kind, shape and offset: {entry!r}")
            if shape and (any(offset[1:]) or info.shape[1:] != shape[1:] or len(offset) != len(shape)):
                raise CorruptArtifact(f"{path}: {key!r} is no range of dimension 0 of {list(shape)}: offset {offset}")
            start = offset[0] if offset else 0
            yield name, kind, shape, StoredSlice(path, rank, start, start + (info.shape[0] if info.shape else 1), info)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptArtifact(f"{path} has no layout of a checkpoint: {type(error).__name__}: {error}") from error


def _check_coverage(path: Path, kind: str, name: str, shape: tuple[int, ...], parts: Sequence[StoredSlice]) -> None:
    expected = 0
    for part in parts:
        if part.start != expected:
            problem = "is missing" if part.start > expected else "is there twice"
            raise CorruptArtifact(
                f"{path}: row {min(expected, part.start)} of {kind} {name!r} {problem} (next is {part.path.name})"
            )
        expected = part.stop
    rows = shape[0] if shape else 1
    if expected != rows and 0 not in shape:
        raise CorruptArtifact(f"{path}: {kind} {name!r} has {expected} rows in all its shards, expected {rows}")


def _check_parameters(path: Path, state: Mapping[str, Any], tensors: Mapping[tuple[str, str], StoredTensor]) -> None:
    for kind in sorted({PARAMETER} | {kind for kind, _ in tensors}):
        found = {name: list(tensor.shape) for (of_kind, name), tensor in tensors.items() if of_kind == kind}
        expected = {name: entry["shape"] for name, entry in state["parameters"].items()}
        missing, foreign = expected.keys() - found.keys(), found.keys() - expected.keys()
        if missing or foreign:
            raise CorruptArtifact(
                f"{path}: {kind} of {some_names(missing or foreign)} {'is missing' if missing else 'is foreign'}"
            )
        for name in sorted(expected):
            if found[name] != expected[name]:
                raise CorruptArtifact(f"{path}: {kind} of {name!r} has shape {found[name]}, expected {expected[name]}")


def _drop_page_cache(path: Path) -> None:
    """Make the next read come from the volume, as far as the system allows."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
