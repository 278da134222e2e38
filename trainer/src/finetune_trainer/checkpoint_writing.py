"""Writes checkpoints beside training: the state is copied to host memory, and a thread of its own does the rest.

training.py has one CheckpointWriter in each rank. What training waits for is the copy, and an earlier checkpoint that
is not written yet: there are never two at once. The thread writes, hashes while it writes, reads back, and publishes as
checkpoints.py describes; its collectives go over the backend's channel for writers, so they never meet training's. A
backend whose writing talks over its devices has the same done in the main thread, and training waits for all of it.

What a rank writes is the backend's Snapshot; temporary folder, manifest and name are one for all formats. A kill at any
moment leaves no folder of the checkpoint's name or a whole one, as without a thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_trainer.artifacts import FileEntry, new_artifact, remove_artifact
from finetune_trainer.backends import Backend, Channel, Snapshot
from finetune_trainer.checkpoints import (
    CHECKPOINT_KIND,
    STATE_NAME,
    LocalSlice,
    checkpoint_folder,
    remove_old_checkpoints,
    write_rank_file,
)
from finetune_trainer.contract import canonical_json

THREAD_NAME = "checkpoint-writer"


@dataclass(frozen=True)
class RankFile:
    """See backends.Snapshot: this rank's slices, one file in the format of checkpoints.py."""

    rank: int
    world_size: int
    slices: Sequence[LocalSlice]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, step: int) -> list[FileEntry]:
        return [write_rank_file(folder, self.rank, self.world_size, step, self.slices)]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete: its step, and the seconds from the copy to its publication."""

    step: int
    seconds: float


class CheckpointWriter:
    """One rank's writer. `keep` checkpoints stay under `root`; `before`, where given, runs first of all in rank 0.

    Every method but close() is called by all ranks at the same place, since a checkpoint takes all of them.
    """

    def __init__(self, backend: Backend, root: Path, keep: int, before: Callable[[], None] | None = None) -> None:
        self._backend, self._root, self._keep, self._before = backend, root, keep, before
        self._thread: threading.Thread | None = None
        self._result: Saved | BaseException | None = None

    def start(self, step: int, state: Mapping[str, Any]) -> None:
        """Begin to write the checkpoint of `step`; returns when its state is copied.

        The one before must have been waited for: ValueError. Raises what its writing raised, if nobody heard of it.
        """
        if self._thread is not None:
            raise ValueError(f"the checkpoint before step {step} is still being written")
        snapshot = self._backend.snapshot()
        if not self._backend.writes_beside_training:
            self._run(step, state, snapshot)
            return
        # A daemon: a rank that has lost its peers must be able to end while the thread still waits for them.
        self._thread = threading.Thread(target=self._run, args=(step, state, snapshot), name=THREAD_NAME, daemon=True)
        self._thread.start()

    def poll(self) -> Saved | None:
        """The checkpoint that was written since the last call, if any; raises what its writing raised."""
        return None if self._thread is not None and self._thread.is_alive() else self.wait()

    def wait(self) -> Saved | None:
        """Wait for the checkpoint that is being written and return it, None when there is none; raises its error."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        result, self._result = self._result, None
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """Let a checkpoint that is being written come to its end, good or bad: after another error, which says more."""
        try:
            self.wait()
        except BaseException as error:  # noqa: BLE001 - told, and not raised over the error that ends the run
            print(f"the checkpoint that was being written is lost: {type(error).__name__}: {error}", flush=True)

    def _run(self, step: int, state: Mapping[str, Any], snapshot: Snapshot) -> None:
        began = time.monotonic()
        backend = self._backend
        channel = backend.writers if backend.writes_beside_training else backend
        try:
            if self._before and backend.rank == 0:
                self._before()
            write_checkpoint(channel, backend.rank, self._root, step, state, snapshot)
            if backend.rank == 0:
                remove_old_checkpoints(self._root, step, self._keep)
            self._result = Saved(step, time.monotonic() - began)
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread by wait()
            self._result = error


def write_checkpoint(
    channel: Channel, rank: int, root: Path, step: int, state: Mapping[str, Any], snapshot: Snapshot
) -> None:
    """Write and publish the checkpoint of `step` under `root`. All ranks.

    Rank 0 makes the temporary folder, every rank writes and reads back its files there, rank 0 writes state.json and
    the manifest last and renames. A kill at any moment leaves no folder of that name, or a whole one.
    """
    path = checkpoint_folder(root, step)
    with ExitStack() as stack:
        writer = None
        if rank == 0:
            # What is here under this name did not verify, or training would have resumed from it.
            remove_artifact(path)
            writer = stack.enter_context(new_artifact(path, CHECKPOINT_KIND))
        folder = root / channel.broadcast(writer.folder.name if writer else None)
        entries = channel.gather(snapshot.write(folder, step))
        if writer:
            for written in (entry for of_rank in entries for entry in of_rank):
                writer.record(written.path, written.size, written.sha256)
            writer.write(STATE_NAME, canonical_json({**state, **snapshot.extra}))
    # It counts as written in no rank before it is published.
    channel.broadcast(None)
