"""Consolidation of a full Trainium training's shards, against loading all shards and save_file, and against `cp`.

    .venv-bench/bin/python bench/trainer/consolidate_neuron.py [--gigabytes 1.0] [--rounds 3] [--tp 8] [--xser]

By turns in one run. Each contender is a fresh process, imports included, begins with the checkpoint in the page cache
and ends with its files on the disk (fsynced). `ours` checks, plans and streams the tensors, compares copies and hashes
what it writes; `load` is torch.load of every rank's file, torch.cat and save_file, the least that a reader without a
plan does (it does not even put the heads in order); `cp` copies the checkpoint's files. The last line is JSON: median
seconds, peak memory and ratios.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _models import PEAK, alternate

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from neuron_shards import whole_shapes, write_checkpoint

OURS = """
import sys
from pathlib import Path
from finetune_trainer.artifacts import new_artifact
from finetune_trainer.consolidation import own_tensors, write_model
from finetune_trainer.neuron_checkpoints import open_neuron_checkpoint
workspace, output = map(Path, sys.argv[1:])
with new_artifact(output, "consolidate") as writer:
    write_model(own_tensors(open_neuron_checkpoint(workspace / "checkpoint-1")), None, 5 * 10**9, writer)
"""
LOAD = """
import os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
workspace, output = map(Path, sys.argv[1:])
shards = [torch.load(path) for path in sorted((workspace / "checkpoint-1" / "shards" / "model").glob("*.pt"))]
whole = {}
for key, value in shards[0].items():
    axis = 1 if key.endswith(("o_proj.weight", "down_proj.weight")) else 0
    whole[key] = value if value.dim() < 2 else torch.cat([shard[key] for shard in shards], dim=axis)
output.mkdir()
save_file(whole, output / "model.safetensors", metadata={"format": "pt"})
with (output / "model.safetensors").open("rb") as file:
    os.fsync(file.fileno())
"""


def make_input(workspace: Path, gigabytes: float, tp: int, xser: bool) -> int:
    """A checkpoint of a Llama in bfloat16 with replicated KV heads; returns its bytes."""
    config: dict[str, Any] = {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32000, "num_hidden_layers": 1,
    }  # fmt: skip

    def nbytes(layers: int) -> int:
        shapes = whole_shapes(config | {"num_hidden_layers": layers}).values()
        return sum(2 * torch.Size(shape).numel() for shape in shapes)

    layers = max(1, round((gigabytes * 1e9 - nbytes(0)) / (nbytes(1) - nbytes(0))))
    config["num_hidden_layers"] = layers
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in whole_shapes(config).items()}
    write_checkpoint(workspace / "checkpoint-1", tensors, config, tp=tp, xser=xser)
    return sum(path.stat().st_size for path in workspace.rglob("*.pt"))


def measure(workspace: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    size = make_input(workspace, arguments.gigabytes, arguments.tp, arguments.xser)
    output = workspace / "output"
    print(
        f"checkpoint of {size / 1e9:.2f} GB on {arguments.tp} ranks, {'xser' if arguments.xser else 'plain'}",
        flush=True,
    )
    contenders: dict[str, list[str | Path]] = {
        "cp": ["sh", "-c", 'cp -r "$0"/checkpoint-1 "$1" && find "$1" -type f -exec sync {} +', workspace, output],
        "ours": [sys.executable, "-c", OURS + PEAK, workspace, output],
    }
    if not arguments.xser:
        contenders["load"] = [sys.executable, "-c", LOAD + PEAK, workspace, output]
    found = alternate(contenders, arguments.rounds, output)
    figures: dict[str, Any] = {
        "neuron_gigabytes": round(size / 1e9, 3),
        "neuron_seconds": {name: round(value, 2) for name, value in found.seconds.items()},
        "neuron_peak_mb": {name: round(value) for name, value in found.memory.items()},
        "neuron_rate_to_cp": round(found.seconds["cp"] / found.seconds["ours"], 3),
    }
    if "load" in contenders:
        figures["neuron_load_time_ratio"] = round(found.seconds["load"] / found.seconds["ours"], 2)
        figures["neuron_load_memory_ratio"] = round(found.memory["load"] / found.memory["ours"], 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--xser", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to work; default is a temporary folder")
    arguments = parser.parse_args()
    workspace = Path(tempfile.mkdtemp(prefix="bench-neuron-", dir=arguments.folder))
    try:
        print(json.dumps(measure(workspace, arguments)))
    finally:
        shutil.rmtree(workspace)


if __name__ == "__main__":
    main()
