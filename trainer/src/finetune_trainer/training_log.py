"""The log of a training run: training.jsonl, which a killed and resumed run leaves as if nothing had happened.

training.py writes it in rank 0. Times go to a file of their own, timings.jsonl, so that the log is a function of the
job alone; both together are the curves that tensorboard_log.py draws.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune_trainer.contract import canonical_json
from finetune_trainer.json_files import read_json_lines
from finetune_trainer.tensorboard_log import TENSORBOARD_FOLDER, TensorBoardLog
from finetune_trainer.throughput import Speed

LOG_NAME = "training.jsonl"
TIMINGS_NAME = "timings.jsonl"

_CURVES_SECONDS = 10.0
"""How far the curves on disk may be behind: making them durable at each line would cost more than a small step."""


class TrainingLog:
    """training.jsonl, a function of the job alone; timings.jsonl, the times of every attempt; and the curves of both.

    Lines after the step that training starts from were written by an attempt that did not save them: they go. `clock`
    gives unix time.
    """

    def __init__(
        self,
        work: Path,
        first: int,
        attempt: int,
        clock: Callable[[], float] = time.time,  # noqa: TID251 - curves are drawn over the time of day
    ) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._attempt = attempt
        self._clock = clock
        path = work / LOG_NAME
        kept = [line for line in _read_lines(path) if line["step"] <= first]
        temporary = path.with_name(f".{LOG_NAME}.tmp")
        temporary.write_bytes(b"".join(canonical_json(line) + b"\n" for line in kept))
        temporary.replace(path)
        # The last attempt that did a step is the one whose step was kept.
        timings = {timing["step"]: timing for timing in _read_lines(work / TIMINGS_NAME)}
        self._lines = path.open("ab")
        self._timings = (work / TIMINGS_NAME).open("ab")
        self._curves = TensorBoardLog(work / TENSORBOARD_FOLDER, attempt, _points(kept, timings, clock()))
        self._synced_at = clock()

    def write(self, line: Mapping[str, Any], speed: Speed) -> None:
        """Add a line, a function of the job alone, and what was measured since the one before."""
        at = self._clock()
        timing = {"attempt": self._attempt, "step": line["step"], "at": round(at, 3), **speed.as_json()}
        for file, value in ((self._lines, line), (self._timings, timing)):
            file.write(canonical_json(value) + b"\n")
            file.flush()
        self._curves.write(line["step"], at, {**line, **timing})
        if at - self._synced_at > _CURVES_SECONDS:
            self.sync_curves()

    def write_held_out(self, line: Mapping[str, Any]) -> None:
        """Add a line of the held-out loss, of a step whose own line, if it has one, is written before."""
        self._lines.write(canonical_json(line) + b"\n")
        self._lines.flush()
        self._curves.write(line["step"], self._clock(), line)

    def sync_lines(self) -> None:
        """Make training.jsonl durable, before a checkpoint that relies on it. Any thread may call it, until close()."""
        os.fsync(self._lines.fileno())

    def close(self) -> None:
        self.sync_lines()
        self.sync_curves()
        self._lines.close()
        self._timings.close()
        self._curves.close()

    def sync_curves(self) -> None:
        """Make the curves durable. Of the thread that writes lines only."""
        self._curves.sync()
        self._synced_at = self._clock()


def _points(
    lines: list[dict[str, Any]], timings: Mapping[int, Mapping[str, Any]], now: float
) -> list[tuple[int, float, dict[str, Any]]]:
    """The lines with their timings as points of the curves; one whose time was lost gets that of the one before."""
    points = []
    at = min((timing["at"] for timing in timings.values() if "at" in timing), default=now)
    for line in lines:
        timing = timings.get(line["step"], {}) if "loss" in line else {}
        at = timing.get("at", at)
        points.append((line["step"], at, {**line, **timing}))
    return points


def repeated_steps(work: Path, first: int) -> int:
    """Steps, as far as the log knew them, that an earlier attempt did after step `first` and that are lost."""
    known = [line["step"] for line in _read_lines(work / TIMINGS_NAME)]
    return max(0, max(known, default=0) - first)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that say of which step they are."""
    return [line for line in read_json_lines(path) if isinstance(line.get("step"), int)]


def read_losses(path: Path) -> tuple[float, float]:
    """The losses of the first and the last line; NaN where there is none."""
    losses = [line["loss"] for line in _read_lines(path) if "loss" in line]
    return (losses[0], losses[-1]) if losses else (math.nan, math.nan)
