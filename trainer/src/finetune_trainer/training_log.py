"""The log of a training run: training.jsonl, which a killed and resumed run leaves as if nothing had happened.

training.py writes it in rank 0. Times go to a file of their own, so that the log is a function of the job alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_trainer.contract import canonical_json

LOG_NAME = "training.jsonl"
TIMINGS_NAME = "timings.jsonl"


class TrainingLog:
    """training.jsonl, a function of the job alone, and timings.jsonl, which keeps the times of every attempt.

    Lines after the step that training starts from were written by an attempt that did not save them: they go.
    """

    def __init__(self, work: Path, first: int, attempt: int) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._attempt = attempt
        path = work / LOG_NAME
        kept = [line for line in _read_lines(path) if line["step"] <= first]
        temporary = path.with_name(f".{LOG_NAME}.tmp")
        temporary.write_bytes(b"".join(canonical_json(line) + b"\n" for line in kept))
        temporary.replace(path)
        self._lines = path.open("ab")
        self._timings = (work / TIMINGS_NAME).open("ab")

    def write(self, line: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        self._lines.write(canonical_json(line) + b"\n")
        self._lines.flush()
        self._timings.write(canonical_json({"attempt": self._attempt, **timing}) + b"\n")
        self._timings.flush()

    def sync(self) -> None:
        """Make the log durable, before a checkpoint that relies on it."""
        os.fsync(self._lines.fileno())

    def close(self) -> None:
        self.sync()
        self._lines.close()
        self._timings.close()


def repeated_steps(work: Path, first: int) -> int:
    """Steps, as far as the log knew them, that an earlier attempt did after step `first` and that are lost."""
    known = [line["step"] for line in _read_lines(work / TIMINGS_NAME)]
    return max(0, max(known, default=0) - first)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a last line that was cut by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for raw in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(raw)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            lines.append(value)
    return lines


def read_losses(path: Path) -> tuple[float, float]:
    losses = [line["loss"] for line in _read_lines(path)]
    return (losses[0], losses[-1]) if losses else (math.nan, math.nan)
