"""A training's curves for TensorBoard: one event file that always holds the whole curve, whatever was killed between.

training_log.py writes it in rank 0. Each attempt begins a file of its own with the lines that training.jsonl kept, and
removes the file of the attempt before, so that no reader sees a step twice or misses one. The files hold times, so
they lie in the training's work folder and are no part of its artifact: `tensorboard --logdir` takes that folder.

tensorboardX's file writer is used without its thread, which would wait for ever on a disk that is full; importing it
takes seconds where processors are busy, so that is done in the training only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TENSORBOARD_FOLDER = "tensorboard"

CURVES: Mapping[str, str] = {
    "loss": "train/loss",
    "validationLoss": "validation/loss",
    "learningRate": "train/learning_rate",
    "gradientNorm": "train/gradient_norm",
    "tokensPerSecond": "speed/tokens_per_second",
    "stepSeconds": "speed/step_seconds",
    "dataWaitSeconds": "speed/data_wait_seconds",
    "mfu": "speed/mfu",
    "hostMemoryBytes": "memory/host_peak_bytes",
    "deviceMemoryBytes": "memory/device_peak_bytes",
}
"""Names of the curves by the fields of training.jsonl and timings.jsonl."""

_EVENT_FILES = "events.out.tfevents.*"


class TensorBoardLog:
    """The event file of one attempt in `folder`. `kept` are (step, unix time, values by CURVES' fields) so far."""

    def __init__(self, folder: Path, attempt: int, kept: Iterable[tuple[int, float, Mapping[str, Any]]]) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._value = event_pb2.Event, summary_pb2.Summary.Value
        self._summary = summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        before = set(folder.glob(_EVENT_FILES))
        self._writer = EventsWriter(str(folder / "events"), f".attempt-{attempt}")
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        # Tells a TensorBoard that has read an earlier file to forget what it read from this step on: all of it.
        self._writer.write_event(event_pb2.Event(step=0, session_log=started))
        for step, at, values in kept:
            self.write(step, at, values)
        self.sync()
        for path in before - {Path(self._writer._file_name)}:
            path.unlink(missing_ok=True)

    def write(self, step: int, at: float, values: Mapping[str, Any]) -> None:
        """Add a point at `step` to each curve that `values` has. What was written is on disk after sync()."""
        points = [self._value(tag=CURVES[name], simple_value=values[name]) for name in CURVES if name in values]
        self._writer.write_event(self._event(wall_time=at, step=step, summary=self._summary(value=points)))

    def sync(self) -> None:
        """Make everything written durable; OSError where the volume is full."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
