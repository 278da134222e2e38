"""Consolidation of a full training's sharded checkpoint, against loading all shards and save_file, and against `cp`.

    .venv-bench/bin/python bench/trainer/consolidate.py [--gigabytes 1.0] [--rounds 3] [--ranks 4] [--dtype F32]

By turns in one run. Each contender is a fresh process, imports included, begins with the checkpoint in the page cache
and ends with its files on the disk (fsynced). `ours` matches and streams the tensors and hashes what it writes; `stage`
is the whole stage, which hashes the checkpoint first; `load` is safetensors' load_file of every shard, torch.cat and
save_file; `cp` copies the checkpoint's files, as many bytes. The last line is JSON: median seconds, peak memory and
ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _models import PEAK, alternate, layers_of, model_plan, write_model

from finetune_trainer.artifacts import artifact_ref, new_artifact
from finetune_trainer.checkpoints import LocalSlice, slice_bounds, write_rank_file
from finetune_trainer.contract import StageConfig, canonical_json
from finetune_trainer.safetensors_stream import TensorPlan

OURS = """
import sys
from pathlib import Path
from finetune_trainer.artifacts import new_artifact
from finetune_trainer.checkpoints import read_checkpoint
from finetune_trainer.consolidation import match_model, write_model
from finetune_trainer.model_files import read_model_config, read_model_files
workspace, output, _ = map(Path, sys.argv[1:])
base, config = read_model_files(workspace / "model"), read_model_config(workspace / "model")
checkpoint = read_checkpoint(workspace / "train" / "checkpoint", contents=False)
with new_artifact(output, "consolidate") as writer:
    write_model(match_model(checkpoint, base, config, None), base, 5 * 10**9, writer)
"""
STAGE = """
import sys
from finetune_trainer.stage import main
assert main(["consolidate", "--config", sys.argv[3]]) == 0
"""
LOAD = """
import os, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
workspace, output, _ = map(Path, sys.argv[1:])
shards = [load_file(path) for path in sorted((workspace / "train" / "checkpoint").glob("rank-*.safetensors"))]
whole = {}
for key in shards[0]:
    whole[key.split("/", 1)[1]] = torch.cat([shard[key] for shard in shards if key in shard])
output.mkdir()
save_file(whole, output / "model.safetensors", metadata={"format": "pt"})
with (output / "model.safetensors").open("rb") as file:
    os.fsync(file.fileno())
"""


def write_checkpoint(folder: Path, plan: list[TensorPlan], ranks: int) -> None:
    """A checkpoint of float32 parameters alone, each cut for `ranks` ranks."""

    def zeros(name: str, shape: tuple[int, ...], rank: int) -> LocalSlice:
        start, stop = slice_bounds(shape[0], rank, ranks)
        local = (stop - start, *shape[1:])
        values = np.random.default_rng(rank).standard_normal(local, dtype=np.float32)
        return LocalSlice(name, "param", "F32", shape, (start, *[0] * (len(shape) - 1)), local, values.tobytes)

    state = {
        "version": 1,
        "step": 1,
        "worldSize": ranks,
        "parameters": {tensor.name: {"shape": list(tensor.shape), "dtype": "F32"} for tensor in plan},
    }
    with new_artifact(folder, "checkpoint") as writer:
        for rank in range(ranks):
            entry = write_rank_file(
                writer.folder, rank, ranks, 1, [zeros(tensor.name, tensor.shape, rank) for tensor in plan]
            )
            writer.record(entry.path, entry.size, entry.sha256)
        writer.write("state.json", canonical_json(state))


def make_inputs(workspace: Path, gigabytes: float, dtype: str, ranks: int) -> int:
    """The artifacts `model` and `train`, and stage.json; returns the bytes of the checkpoint."""
    layers = layers_of(gigabytes, item_bytes=4)
    with new_artifact(workspace / "model", "model") as writer:
        write_model(writer.folder, layers, dtype)
    with new_artifact(workspace / "train", "train") as writer:
        write_checkpoint(writer.folder / "checkpoint", model_plan(layers, "F32"), ranks)
    inputs = {name: artifact_ref(workspace, workspace / name) for name in ("model", "train")}
    config = StageConfig(
        "consolidate", "image", {"method": {"type": "full"}}, "output", inputs=inputs, workspace=str(workspace)
    )
    (workspace / "stage.json").write_bytes(canonical_json(config.as_json()))
    return sum(path.stat().st_size for path in (workspace / "train" / "checkpoint").iterdir())


def measure(workspace: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    size = make_inputs(workspace, arguments.gigabytes, arguments.dtype, arguments.ranks)
    output = workspace / "output"
    paths = [workspace, output, workspace / "stage.json"]
    print(f"checkpoint of {size / 1e9:.2f} GB by {arguments.ranks} ranks, written as {arguments.dtype}", flush=True)
    os.environ["FINETUNE_TERMINATION_PATH"] = str(workspace / "report")
    contenders: dict[str, list[str | Path]] = {
        "cp": ["sh", "-c", 'cp -r "$0"/train/checkpoint "$1" && sync "$1"/*', *paths],
        "ours": [sys.executable, "-c", OURS + PEAK, *paths],
        "stage": [sys.executable, "-c", STAGE + PEAK, *paths],
        "load": [sys.executable, "-c", LOAD + PEAK, *paths],
    }
    found = alternate(contenders, arguments.rounds, output)
    seconds, processor, memory = found.seconds, found.processor, found.memory
    return {
        "consolidate_gigabytes": round(size / 1e9, 3),
        "consolidate_seconds": {name: round(value, 2) for name, value in seconds.items()},
        "consolidate_processor_seconds": {name: round(value, 2) for name, value in processor.items()},
        "consolidate_peak_mb": {name: round(value) for name, value in memory.items()},
        "consolidate_rate_to_cp": round(seconds["cp"] / seconds["ours"], 3),
        "consolidate_stage_rate_to_cp": round(seconds["cp"] / seconds["stage"], 3),
        "consolidate_load_time_ratio": round(seconds["load"] / seconds["ours"], 2),
        "consolidate_load_memory_ratio": round(memory["load"] / memory["ours"], 2),
        "consolidate_memory_mb": round(memory["ours"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--dtype", choices=["F32", "BF16"], default="F32", help="of the base model, so of the output")
    parser.add_argument("--folder", type=Path, help="where to work; default is a temporary folder")
    arguments = parser.parse_args()
    workspace = Path(tempfile.mkdtemp(prefix="bench-consolidate-", dir=arguments.folder))
    try:
        print(json.dumps(measure(workspace, arguments)))
    finally:
        shutil.rmtree(workspace)


if __name__ == "__main__":
    main()
