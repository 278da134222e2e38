"""The log of a run that is killed and goes on: its lines, its times, and the curves that TensorBoard reads."""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from finetune_trainer.tensorboard_log import TENSORBOARD_FOLDER, TensorBoardLog
from finetune_trainer.throughput import Speed
from finetune_trainer.training_log import LOG_NAME, TIMINGS_NAME, TrainingLog, read_losses, repeated_steps

SPEED = Speed(1.0, 100.0, 0.5, 0.1, 0.25, 1 << 30, None)


def line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 10.0 - step, "learningRate": 0.5, "gradientNorm": 2.0, "tokens": 8}


def read_events(folder: Path) -> Iterator[Any]:
    """Every event of every file in `folder`, its checksums proved, files in the order of their names."""
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            body = data[at + 12 : at + 12 + length]
            sums = struct.unpack_from("<I", data, at + 8) + struct.unpack_from("<I", data, at + 12 + length)
            assert sums == (masked_crc32c(data[at : at + 8]), masked_crc32c(body))
            yield event_pb2.Event.FromString(body)
            at += 16 + length


def curve(folder: Path, tag: str) -> list[tuple[int, float, float]]:
    """(step, unix time, value) of one curve, as a reader that knows nothing of restarts sees it."""
    return [
        (event.step, event.wall_time, value.simple_value)
        for event in read_events(folder)
        for value in event.summary.value
        if value.tag == tag
    ]


def write(work: Path, first: int, attempt: int, steps: range, start: float) -> TrainingLog:
    """An attempt that goes on from `first` and logs `steps`, a second apart; as a kill leaves it, not closed."""
    now = [start]
    log = TrainingLog(work, first, attempt, clock=lambda: now[0])
    for step in steps:
        now[0] += 1
        log.write(line(step), replace(SPEED, tokens_per_second=100.0 * attempt))
    return log


def test_curves_go_on_after_a_kill_without_a_step_doubled_or_missing(tmp_path: Path) -> None:
    folder = tmp_path / TENSORBOARD_FOLDER
    killed = write(tmp_path, 0, 1, range(1, 8), 1000.0)
    killed.sync_curves()
    again = write(tmp_path, 4, 2, range(5, 7), 2000.0)
    again.sync_curves()
    last = write(tmp_path, 6, 3, range(7, 10), 3000.0)
    last.close()
    assert curve(folder, "train/loss") == [
        *((step, 1000.0 + step, 10.0 - step) for step in range(1, 5)),
        *((step, 2000.0 + step - 4, 10.0 - step) for step in range(5, 7)),
        *((step, 3000.0 + step - 6, 10.0 - step) for step in range(7, 10)),
    ]
    assert [value for _, _, value in curve(folder, "speed/tokens_per_second")] == [100.0] * 4 + [200.0] * 2 + [
        300.0
    ] * 3
    assert len(list(folder.iterdir())) == 1
    for log in (killed, again):
        log.close()


def test_every_figure_of_a_line_has_its_curve_and_what_is_not_known_has_none(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, range(1, 2), 1000.0).close()
    found = {
        value.tag: value.simple_value
        for event in read_events(tmp_path / TENSORBOARD_FOLDER)
        for value in event.summary.value
    }
    assert found == pytest.approx(
        {
            "train/loss": 9.0,
            "train/learning_rate": 0.5,
            "train/gradient_norm": 2.0,
            "speed/tokens_per_second": 100.0,
            "speed/step_seconds": 0.5,
            "speed/data_wait_seconds": 0.1,
            "speed/mfu": 0.25,
            "memory/host_peak_bytes": float(1 << 30),
        }
    )


def test_a_tensorboard_that_watches_is_told_to_begin_anew(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, range(1, 3), 1000.0).close()
    version, started, *points = read_events(tmp_path / TENSORBOARD_FOLDER)
    assert version.file_version == "brain.Event:2"
    assert (started.session_log.status, started.step) == (event_pb2.SessionLog.START, 0)
    assert [point.step for point in points] == [1, 2]


def test_the_log_is_the_same_whatever_times_and_attempts_it_took(tmp_path: Path) -> None:
    write(tmp_path / "whole", 0, 1, range(1, 6), 1000.0).close()
    write(tmp_path / "killed", 0, 1, range(1, 5), 5000.0).close()
    with (tmp_path / "killed" / LOG_NAME).open("ab") as file:
        file.write(b'{"step":5,"lo')  # cut by the kill
    write(tmp_path / "killed", 2, 2, range(3, 6), 9000.0).close()
    assert (tmp_path / "killed" / LOG_NAME).read_bytes() == (tmp_path / "whole" / LOG_NAME).read_bytes()
    timings = [json.loads(text) for text in (tmp_path / "killed" / TIMINGS_NAME).read_text().splitlines()]
    assert [(timing["attempt"], timing["step"]) for timing in timings] == [
        *((1, step) for step in range(1, 5)),
        *((2, step) for step in range(3, 6)),
    ]
    assert timings[0] == {"attempt": 1, "step": 1, "at": 5001.0, **SPEED.as_json()}


def test_steps_of_an_attempt_that_were_not_saved_are_counted(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, range(1, 8), 1000.0).close()
    assert repeated_steps(tmp_path, 4) == 3
    assert repeated_steps(tmp_path, 7) == 0


def test_a_log_whose_times_are_lost_keeps_its_curve(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, range(1, 4), 1000.0).close()
    (tmp_path / TIMINGS_NAME).unlink()
    write(tmp_path, 3, 2, range(4, 5), 2000.0).close()
    assert curve(tmp_path / TENSORBOARD_FOLDER, "train/loss") == [
        *((step, 2000.0, 10.0 - step) for step in range(1, 4)),
        (4, 2001.0, 6.0),
    ]


def test_the_held_out_loss_has_lines_and_a_curve_of_its_own_that_survive_a_restart(tmp_path: Path) -> None:
    log = write(tmp_path, 0, 1, range(1, 3), 1000.0)
    log.write_held_out({"step": 2, "validationLoss": 3.0})
    log.write_held_out({"step": 4, "validationLoss": 2.5})
    log.close()
    write(tmp_path, 2, 2, range(3, 4), 2000.0).close()
    lines = [json.loads(text) for text in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert [(line["step"], "loss" in line) for line in lines] == [(1, True), (2, True), (2, False), (3, True)]
    assert read_losses(tmp_path / LOG_NAME) == (9.0, 7.0)
    folder = tmp_path / TENSORBOARD_FOLDER
    assert [(step, value) for step, _, value in curve(folder, "validation/loss")] == [(2, 3.0)]
    assert [step for step, _, _ in curve(folder, "speed/step_seconds")] == [1, 2, 3]


def test_a_full_volume_is_an_error_and_not_a_writer_that_waits(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, 1, [])
    log.close()
    full = Path("/dev/full").open("wb")  # noqa: SIM115 - its buffer cannot be written, so closing it is an error too
    log._writer._py_recordio_writer._writer = full
    log.write(1, 1.0, {"loss": 1.0})
    for end in (log.sync, full.close):
        with pytest.raises(OSError) as caught:
            end()
        assert caught.value.errno == errno.ENOSPC
