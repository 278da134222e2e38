"""Finds out for which rank a collective waits in vain, and ends this one with that as its reason.

A process that is killed is noticed at once, since its connections close; one that hangs keeps them open, and its peers
wait. A backend wraps each collective of its main thread in section(). A thread looks after it: at half of the timeout
it tells all ranks where this one waits, and at its end it asks where the others do. Who has not said the same did not
arrive. The main thread stands in native code then, so the thread itself hands the error to `stuck`, which
must end the process.

Nothing here imports a vendor's library: ranks talk by a Board, which a backend makes of what it has.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeVar

from finetune_trainer.errors import RetryableError, StageError

Answer = TypeVar("Answer")

_ANSWER_SECONDS = 5.0
"""How long a board may take: it can be the process that hangs."""


class Board(Protocol):
    """Notes that every rank can write and read, over another way than collectives take."""

    def put(self, rank: int, note: str) -> None:
        """Replace the note of `rank`."""

    def notes(self) -> list[str | None]:
        """The note of every rank, None of one that has written none."""


class CollectiveWatch:
    """Looks after the collectives of one rank from start() to close(). `hosts` are the ranks' host names.

    `stuck` is called at most once, in the watch's own thread.
    """

    def __init__(
        self, rank: int, hosts: Sequence[str], board: Board, timeout: float, stuck: Callable[[StageError], None]
    ) -> None:
        self._rank, self._hosts, self._board, self._timeout, self._stuck = rank, hosts, board, timeout, stuck
        self._entered = 0
        self._section: tuple[int, str, float] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="collective-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Look no more; returns once the thread has ended, so never call it from `stuck`."""
        self._closing.set()
        self._thread.join()

    @contextmanager
    def section(self, doing: str) -> Iterator[None]:
        """A collective, in words that are the same in every rank. Sections follow each other and do not nest."""
        self._entered += 1
        self._section = (self._entered, doing, time.monotonic())
        try:
            yield
        finally:
            self._section = None

    def _run(self) -> None:
        told = 0
        while not self._closing.wait(min(5.0, self._timeout / 20)):
            section = self._section
            if section is None:
                continue
            number, doing, since = section
            waited = time.monotonic() - since
            if told != number and waited >= self._timeout / 2:
                told = number
                _within(_ANSWER_SECONDS, partial(self._board.put, self._rank, _note(number, doing)))
            if waited >= self._timeout:
                error = self._error(number, doing, waited)
                if self._section is section:  # it came to its end while the others were asked
                    self._stuck(error)
                    return

    def _error(self, number: int, doing: str, waited: float) -> StageError:
        notes = _within(_ANSWER_SECONDS, self._board.notes)
        return RetryableError(
            "CollectiveTimeout",
            f"rank {self._rank} of {len(self._hosts)} has waited {waited:.0f} s in {doing}: "
            f"{self._who(number, doing, notes)}; the next attempt goes on from the last checkpoint",
        )

    def _who(self, number: int, doing: str, notes: list[str | None] | None) -> str:
        """Which ranks did not arrive, and where to look."""
        if notes is None:
            return "no rank can be asked where it is, so look at the first pod and its node"
        here = _note(number, doing)
        absent = [rank for rank, note in enumerate(notes) if note != here and rank != self._rank]
        if not absent:
            return "every rank is there, so look at the network between the nodes and at their devices"
        named = ", ".join(f"rank {rank} ({self._hosts[rank]}){_elsewhere(notes[rank], number)}" for rank in absent)
        return f"{named} did not arrive, so look at the log and the node of that pod"


def _note(number: int, doing: str) -> str:
    return f"{number} {doing}"


def _elsewhere(note: str | None, number: int) -> str:
    """Where a rank waits instead, if what it said last is of now."""
    if note is None:
        return ""
    other, _, doing = note.partition(" ")
    return f", which waits in {doing}," if int(other) >= number else ""


def _within(seconds: float, ask: Callable[[], Answer]) -> Answer | None:
    """What `ask` returns; None when it fails or takes longer, in a thread that is then left behind."""
    answer: list[Answer] = []

    def run() -> None:
        try:
            answer.append(ask())
        except Exception as error:  # noqa: BLE001 - whoever hangs may take the board along; that is an answer too
            print(f"the ranks' board does not answer: {error}", flush=True)

    thread = threading.Thread(target=run, name="collective-watch-board", daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None
