"""Checkpoints as files: written by several ranks, read back whole, refused when anything is missing or foreign."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_trainer.artifacts import new_artifact
from finetune_trainer.checkpoints import (
    CHECKPOINT_KIND,
    PARAMETER,
    RANDOM_STATE,
    STATE_NAME,
    LocalSlice,
    checkpoint_folder,
    differences,
    find_last_checkpoint,
    list_checkpoints,
    rank_file_name,
    read_checkpoint,
    remove_old_checkpoints,
    slice_bounds,
    write_rank_file,
)
from finetune_trainer.errors import CorruptArtifact

TENSORS = {
    "a.lora_A.weight": np.arange(15, dtype=np.float32).reshape(5, 3),
    "a.lora_B.weight": np.arange(2, dtype=np.float32).reshape(1, 2),
}


def write(
    root: Path,
    at: int,
    world_size: int = 3,
    *,
    ranks: range | None = None,
    bounds: Callable[[int, int, int], tuple[int, int]] = slice_bounds,
    **state: Any,
) -> Path:
    """A checkpoint of TENSORS in `world_size` shards; `state` replaces fields of its state.json."""
    path = checkpoint_folder(root, at)
    with new_artifact(path, CHECKPOINT_KIND) as writer:
        for rank in ranks or range(world_size):
            slices = [LocalSlice("cpu", RANDOM_STATE, "U8", (2,), (0,), (2,), lambda rank=rank: bytes([rank, 7]))]
            for name, value in TENSORS.items():
                start, stop = bounds(value.shape[0], rank, world_size)
                if start < stop:
                    part = value[start:stop]
                    slices.append(LocalSlice(name, PARAMETER, "F32", value.shape, (start, 0), part.shape, part.tobytes))
            entry = write_rank_file(writer.folder, rank, world_size, at, slices)
            writer.record(entry.path, entry.size, entry.sha256)
        value = {
            "version": 1,
            "step": at,
            "worldSize": world_size,
            "parameters": {name: {"shape": list(value.shape), "dtype": "F32"} for name, value in TENSORS.items()},
            **state,
        }
        writer.write(STATE_NAME, json.dumps(value).encode())
    return path


@pytest.mark.parametrize("world_size", [1, 2, 3, 8], ids="{} ranks".format)
def test_what_ranks_wrote_is_read_back_whole(tmp_path: Path, world_size: int) -> None:
    checkpoint = read_checkpoint(write(tmp_path, 4, world_size))
    assert (checkpoint.step, checkpoint.world_size) == (4, world_size)
    assert list(checkpoint.parameters()) == sorted(TENSORS)
    for name, value in TENSORS.items():
        assert checkpoint.tensors[PARAMETER, name].shape == value.shape
        for start, stop in itertools.combinations(range(len(value) + 1), 2):
            assert bytes(checkpoint.read_rows(PARAMETER, name, start, stop)) == value[start:stop].tobytes()
    for rank in range(world_size):
        assert b"".join(checkpoint.random_states[rank, "cpu"].chunks()) == bytes([rank, 7])


@pytest.mark.parametrize("rows", [1, 3, 7, 64])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_shares_of_rows_cover_every_row_once(rows: int, world_size: int) -> None:
    covered = [row for rank in range(world_size) for row in range(*slice_bounds(rows, rank, world_size))]
    assert covered == list(range(rows))


def cut_file(path: Path) -> None:
    file = path / rank_file_name(1)
    file.write_bytes(file.read_bytes()[:-3])


def flip_bit(path: Path) -> None:
    file = path / rank_file_name(1)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def remove_file(path: Path) -> None:
    (path / rank_file_name(1)).unlink()


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_file, "rank-00001.safetensors has .* bytes, expected"),
        (flip_bit, "rank-00001.safetensors has sha256 .*, expected"),
        (remove_file, "rank-00001.safetensors is missing"),
        (remove_manifest, "has no manifest.json"),
    ],
    ids=["a shard is cut", "one bit is flipped", "a shard is gone", "it was never completed"],
)
def test_a_damaged_checkpoint_is_named_and_an_older_one_is_found(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    older, newest = write(tmp_path, 4), write(tmp_path, 6)
    damage(newest)
    with pytest.raises(CorruptArtifact, match=words):
        read_checkpoint(newest)
    found, damaged = find_last_checkpoint(tmp_path)
    assert found is not None
    assert found.path == older
    assert [entry.path for entry in damaged] == [newest]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ranks": range(2)}, "was written by 3 ranks and lacks rank-00002.safetensors"),
        ({"worldSize": 2}, "was written by 2 ranks and has the foreign file rank-00002.safetensors"),
        ({"bounds": lambda rows, rank, size: (0, rows - 1) if rank == 0 else (0, 0)}, "rows in all its shards"),
        ({"bounds": lambda rows, rank, size: (0, rows) if rank < 2 else (0, 0)}, "row 0 of param .* is there twice"),
        ({"bounds": lambda rows, rank, size: ((0, 1), (0, 0), (min(2, rows), rows))[rank]},
         "row 1 of param 'a.lora_A.weight' is missing"),
        ({"parameters": {"b": {"shape": [1], "dtype": "F32"}}}, "param of b is missing"),
        ({"step": 9}, r"says \(version, rank, worldSize, step\)"),
        ({"version": 2}, "has version 2, this trainer reads 1"),
    ],
    ids=[
        "a rank never wrote",
        "a rank too many",
        "the last row is in no shard",
        "rows are in two shards",
        "a row between shards",
        "other parameters",
        "shards of another step",
        "another version",
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_whole_is_refused_though_its_manifest_verifies(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(CorruptArtifact, match=words):
        read_checkpoint(write(tmp_path, 4, **settings))


def test_the_newest_checkpoints_are_kept_by_step_and_at_least_one(tmp_path: Path) -> None:
    for step in (2, 10, 6):
        write(tmp_path, step, 1)
    (tmp_path / ".step-00000012.tmp-0a").mkdir()
    removed = remove_old_checkpoints(tmp_path, 10, 2)
    assert [path.name for path in removed] == ["step-00000002"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000006"]
    remove_old_checkpoints(tmp_path, 10, 0)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010"]


def test_a_newer_checkpoint_that_is_damaged_does_not_cost_the_one_just_written(tmp_path: Path) -> None:
    for step in (4, 6, 9):
        write(tmp_path, step, 1)
    (tmp_path / "step-00000009" / rank_file_name(0)).write_bytes(b"cut")
    assert [path.name for path in remove_old_checkpoints(tmp_path, 6, 1)] == ["step-00000004"]
    found, _ = find_last_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 6


def test_differences_name_every_field_with_both_values() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 3, "c": 2}, "e": "x"}) == [
        "a.b: the job has 1, the checkpoint 3",
        "d: the job has [1], the checkpoint null",
        'e: the job has null, the checkpoint "x"',
    ]


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert find_last_checkpoint(tmp_path / "nowhere") == (None, [])
