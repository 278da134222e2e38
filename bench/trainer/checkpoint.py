"""How long training stands still for a checkpoint, against torch.save of the same state.

    .venv/bin/python bench/trainer/checkpoint.py [--megabytes 384] [--rounds 5] [--folder DIR]

The state is that of full fine-tuning: float32 parameters and AdamW's two moments, in a stand-in for a model, so that
what is timed is the trainer's own CheckpointWriter with the backend's own copy. By turns in each round: ours, then
torch.save with fsync, during which training would stand still. The first round, in which the host buffers are made, is
shown and not counted.

    checkpoint_stall_share          time in which training stands still / time until the checkpoint is complete
    checkpoint_stall_to_torch_save  the same / time of torch.save with fsync
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from finetune_trainer.backends.torch import TorchBackend
from finetune_trainer.backends.torch_strategies import Replicas
from finetune_trainer.checkpoint_writing import CheckpointWriter

COLUMNS = 4096


def make_backend(megabytes: int) -> TorchBackend:
    """A backend of one rank that holds `megabytes` of parameters and moments, after one step of its optimizer."""
    backend = TorchBackend("cpu")
    backend.start()
    rows = megabytes * 1_000_000 // (3 * 4 * 8 * COLUMNS)
    named = {f"layers.{n}.weight": torch.nn.Parameter(torch.randn(rows, COLUMNS)) for n in range(8)}
    backend._named = named
    backend._strategy = Replicas(named, 0, 1, backend.device)
    backend._optimizer = torch.optim.AdamW(list(named.values()), lr=1e-3, fused=True)
    backend._strategy.gradient.normal_()
    backend._optimizer.step()
    return backend


def time_ours(backend: TorchBackend, folder: Path, step: int) -> tuple[float, float]:
    """(seconds in which the caller stood still, seconds until the checkpoint was complete)."""
    writer = CheckpointWriter(backend, folder, keep=1)
    parameters = {
        name: {"shape": list(facts.shape), "dtype": facts.dtype} for name, facts in backend.parameters().items()
    }
    began = time.perf_counter()
    writer.start(step, {"version": 1, "step": step, "worldSize": 1, "parameters": parameters})
    stalled = time.perf_counter() - began
    writer.wait()
    return stalled, time.perf_counter() - began


def time_torch_save(backend: TorchBackend, path: Path) -> float:
    """Seconds of torch.save of parameters and optimizer, and of its fsync."""
    began = time.perf_counter()
    with path.open("wb") as file:
        torch.save({"model": backend._named, "optimizer": backend._optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="The stall of a checkpoint against torch.save.")
    parser.add_argument("--megabytes", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to write to")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=arguments.folder))
    try:
        backend = make_backend(arguments.megabytes)
        stalls, writes, saves = [], [], []
        for number in range(arguments.rounds + 1):
            stalled, written = time_ours(backend, folder / "ours", number + 1)
            saved = time_torch_save(backend, folder / "torch.pt")
            word = "first, not counted" if number == 0 else f"round {number}"
            print(
                f"{word}: stood still {stalled:.3f} s of {written:.2f} s; torch.save with fsync {saved:.2f} s",
                flush=True,
            )
            if number:
                stalls.append(stalled)
                writes.append(written)
                saves.append(saved)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    stall, write, save = (statistics.median(values) for values in (stalls, writes, saves))
    print(
        json.dumps(
            {
                "checkpoint_stall_share": round(stall / write, 4),
                "checkpoint_stall_to_torch_save": round(stall / save, 4),
                "checkpoint_stall_seconds": round(stall, 4),
                "checkpoint_write_seconds": round(write, 3),
                "torch_save_seconds": round(save, 3),
                "checkpoint_megabytes": arguments.megabytes,
            }
        )
    )


if __name__ == "__main__":
    main()
