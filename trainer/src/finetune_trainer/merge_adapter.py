"""`finetune-trainer merge-adapter BASE ADAPTER OUTPUT`: the merge of any peft LoRA adapter into any model, by hand.

BASE and ADAPTER are folders of the hub's layout that need not have seen this operator; OUTPUT is a new folder of that
layout with a manifest.json beside, which holds digests and proofs. It is the merge stage without a job around it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from finetune_trainer.adapters import ADAPTER_WEIGHTS_NAME
from finetune_trainer.artifacts import new_artifact
from finetune_trainer.commands import check_output, run_by_hand
from finetune_trainer.contract import MERGE
from finetune_trainer.cpus import available_cpus
from finetune_trainer.errors import UserError
from finetune_trainer.merged_model import describe_merge, describe_plan, write_merged_model
from finetune_trainer.merging import PRECISIONS, parse_bytes, parse_precision, plan_merge
from finetune_trainer.model_files import read_model_files
from finetune_trainer.shard_rewriting import Listener


def main(argv: Sequence[str] | None = None) -> int:
    """Merge as the command line says; returns the exit code, that of the contract where something is wrong."""
    arguments = _parser().parse_args(argv)
    return run_by_hand(
        lambda: run(arguments.base, arguments.adapter, arguments.output, arguments.precision, arguments.max_shard_size),
        "stopped; the same command goes on from the shards that are finished",
    )


def run(base: Path, adapter: Path, output: Path, precision: str, max_shard_size: str) -> None:
    """Merge `adapter` into `base` and write `output`. UserError when a folder is not what it should be."""
    dtype = parse_precision(precision, "--precision")
    max_shard_bytes = parse_bytes(max_shard_size, "--max-shard-size")
    for folder, words in ((base, "the base model's folder"), (adapter, "the adapter's folder")):
        if not folder.is_dir():
            raise UserError("NoSuchFolder", f"{folder} is no folder: name {words}, downloaded from its hub")
    if not (adapter / ADAPTER_WEIGHTS_NAME).is_file():
        raise UserError(
            "NoAdapter",
            f"{adapter} has no {ADAPTER_WEIGHTS_NAME}: save the adapter with peft's save_pretrained, which writes it "
            "(adapter_model.bin is not read: it can run code)",
        )
    output = check_output(output, "model")
    cpus = available_cpus()
    plan = plan_merge(read_model_files(base), adapter, max_shard_bytes, dtype)
    print(describe_plan(plan, cpus), flush=True)
    started = time.monotonic()
    bar = ProgressBar(plan.nbytes, sys.stderr)
    with new_artifact(output, MERGE) as writer:
        result = write_merged_model(plan, writer, output, {}, cpus, Listener(wrote=bar.add))
        bar.close()
    print(f"{describe_merge(result)}; {time.monotonic() - started:.1f} s, {output}", flush=True)


class ProgressBar:
    """One line of `file` that is written over while bytes are done; silent where `file` is no terminal."""

    def __init__(self, total: int, file: TextIO, min_interval: float = 0.2) -> None:
        self._total = max(1, total)
        self._file = file
        self._min_interval = min_interval
        self._shown = file.isatty()
        self._done = 0
        self._started = self._last = time.monotonic()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Note `count` more bytes; any thread may call."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if self._shown and now - self._last >= self._min_interval:
                self._last = now
                self._draw(now)

    def close(self) -> None:
        """Draw the end and leave the line."""
        if self._shown:
            self._draw(time.monotonic())
            self._file.write("\n")
            self._file.flush()

    def _draw(self, now: float) -> None:
        share = min(1.0, self._done / self._total)
        seconds = max(1e-6, now - self._started)
        rate = self._done / seconds
        left = max(0.0, (self._total - self._done) / rate) if rate else 0.0
        done, total = self._done / 1e9, self._total / 1e9
        facts = f" {share:4.0%} {done:.2f} of {total:.2f} GB, {rate / 1e6:.0f} MB/s, {left:.0f} s left "
        width = max(10, min(40, shutil.get_terminal_size().columns - len(facts) - 3))
        bar = "#" * round(share * width)
        self._file.write(f"\r[{bar:<{width}}]{facts}")
        self._file.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune-trainer merge-adapter",
        description="Merge a LoRA adapter in peft's file layout into its base model. Needs no GPU, no torch and little "
        "memory; what was interrupted goes on where it was.",
    )
    parser.add_argument("base", type=Path, metavar="BASE", help="folder of the base model: safetensors and config.json")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of the adapter, as peft saves it")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="new folder for the merged model")
    parser.add_argument(
        "--precision", default="base", choices=list(PRECISIONS), help="of the merged weights (default: each its own)"
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest weight file, such as 5GB (default: %(default)s)",
    )
    return parser
