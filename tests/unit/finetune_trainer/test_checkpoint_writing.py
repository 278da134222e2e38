"""The thread that writes checkpoints: what waits for it, what does not, and where its errors come out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.checkpoint_writing import CheckpointWriter, RankFile
from finetune_trainer.checkpoints import PARAMETER, LocalSlice, list_checkpoints, read_checkpoint
from finetune_trainer.errors import CorruptArtifact

WAIT_SECONDS = 30


class Alone:
    """A backend of one rank with one parameter, whose bytes a test lets go to the file when it wants to."""

    rank, world_size = 0, 1
    writes_beside_training = True

    def __init__(self) -> None:
        self.writers = self
        self.value = bytearray(b"abcd")
        self.go = threading.Event()
        self.error: Exception | None = None

    def snapshot(self) -> RankFile:
        copy = bytes(self.value)

        def data() -> bytes:
            assert self.go.wait(WAIT_SECONDS)
            if self.error:
                raise self.error
            return copy

        return RankFile(0, 1, [LocalSlice("w", PARAMETER, "U8", (4,), (0,), (4,), data)])

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


def state(step: int) -> dict[str, Any]:
    return {"version": 1, "step": step, "worldSize": 1, "parameters": {"w": {"shape": [4], "dtype": "U8"}}}


@pytest.fixture
def backend() -> Iterator[Alone]:
    alone = Alone()
    yield alone
    alone.go.set()


@pytest.fixture
def writer(backend: Alone, tmp_path: Path) -> CheckpointWriter:
    return CheckpointWriter(backend, tmp_path, keep=1)  # type: ignore[arg-type]


def test_training_changes_the_state_while_what_was_copied_is_written(
    backend: Alone, writer: CheckpointWriter, tmp_path: Path
) -> None:
    writer.start(3, state(3))
    assert writer.poll() is None
    backend.value[:] = b"zzzz"
    assert list_checkpoints(tmp_path) == []
    backend.go.set()
    saved = writer.wait()
    assert saved is not None
    assert saved.step == 3
    (path,) = list_checkpoints(tmp_path)
    assert bytes(read_checkpoint(path).read_rows(PARAMETER, "w", 0, 4)) == b"abcd"
    assert writer.wait() is None


def test_where_writing_talks_over_the_devices_training_waits_for_it_and_an_error_comes_out_at_the_next_step(
    backend: Alone, writer: CheckpointWriter, tmp_path: Path
) -> None:
    backend.writes_beside_training = False
    backend.go.set()
    writer.start(3, state(3))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]
    saved = writer.poll()
    assert saved is not None
    assert saved.step == 3
    assert writer.poll() is None
    backend.error = OSError("no space left")
    writer.start(6, state(6))
    with pytest.raises(OSError, match="no space left"):
        writer.poll()


def test_two_are_never_written_at_once(backend: Alone, writer: CheckpointWriter) -> None:
    writer.start(3, state(3))
    with pytest.raises(ValueError, match="before step 6 is still being written"):
        writer.start(6, state(6))


@pytest.mark.parametrize("listen", ["poll", "wait"])
def test_an_error_of_the_thread_comes_out_where_training_listens_and_only_once(
    backend: Alone, writer: CheckpointWriter, tmp_path: Path, listen: str
) -> None:
    backend.error = CorruptArtifact("the volume damages data")
    writer.start(3, state(3))
    thread = writer._thread
    assert thread is not None
    backend.go.set()
    thread.join(WAIT_SECONDS)
    with pytest.raises(CorruptArtifact, match="the volume damages data"):
        getattr(writer, listen)()
    assert writer.poll() is None
    assert list(tmp_path.iterdir()) == []


def test_after_another_error_the_checkpoint_comes_to_its_end_and_its_own_error_is_not_raised(
    backend: Alone, writer: CheckpointWriter, tmp_path: Path
) -> None:
    backend.go.set()
    writer.start(3, state(3))
    writer.close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]
    backend.error = OSError("no space left")
    writer.start(6, state(6))
    writer.close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]


def test_old_ones_go_when_the_new_one_is_complete(backend: Alone, writer: CheckpointWriter, tmp_path: Path) -> None:
    backend.go.set()
    for step in (3, 6):
        writer.start(step, state(step))
        writer.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000006"]
