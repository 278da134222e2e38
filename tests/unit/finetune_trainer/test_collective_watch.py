"""Who is missing in a collective that waits in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from finetune_trainer.collective_watch import CollectiveWatch
from finetune_trainer.errors import RetryableError, StageError

HOSTS = ["host-a", "host-b", "host-c"]


class Notes:
    """A board in one process. `open` is what it waits for before it answers."""

    def __init__(self) -> None:
        self.found: list[str | None] = [None] * len(HOSTS)
        self.open = threading.Event()
        self.open.set()

    def put(self, rank: int, note: str) -> None:
        self.found[rank] = note

    def notes(self) -> list[str | None]:
        if not self.open.is_set():
            raise ConnectionError("the store's process is stopped")
        return list(self.found)


class Rank:
    """One rank's watch; `error` is what it was told of."""

    def __init__(self, rank: int, board: Notes, timeout: float = 0.2) -> None:
        self.told = threading.Event()
        self.error: StageError | None = None
        self.watch = CollectiveWatch(rank, HOSTS, board, timeout, self._stuck)
        self.watch.start()

    def _stuck(self, error: StageError) -> None:
        self.error = error
        self.told.set()

    @contextmanager
    def waiting(self, *sections: str) -> Iterator[None]:
        """In the last of these collectives, after it has been through the others."""
        for doing in sections[:-1]:
            with self.watch.section(doing):
                pass
        with self.watch.section(sections[-1]):
            yield


@pytest.fixture
def board() -> Notes:
    return Notes()


def message(rank: Rank) -> str:
    assert rank.told.wait(10), "nothing was told"
    assert isinstance(rank.error, RetryableError)
    assert rank.error.reason == "CollectiveTimeout"
    return rank.error.message


def test_the_rank_that_did_not_arrive_is_named_with_its_host_by_all_that_wait(board: Notes) -> None:
    ranks = [Rank(0, board), Rank(1, board), Rank(2, board)]
    with ranks[0].waiting("a broadcast", "the reduction"), ranks[1].waiting("a broadcast", "the reduction"):
        messages = [message(ranks[0]), message(ranks[1])]
    assert [text.split(" has waited 0 s")[0] for text in messages] == ["rank 0 of 3", "rank 1 of 3"]
    for text in messages:
        assert "in the reduction: rank 2 (host-c) did not arrive, so look at the log and the node of that pod" in text
        assert "host-a" not in text
        assert "host-b" not in text
        assert text.endswith("the next attempt goes on from the last checkpoint")
    ranks[2].watch.close()


def test_a_rank_that_waits_elsewhere_is_said_to_be_there(board: Notes) -> None:
    ranks = [Rank(rank, board) for rank in range(3)]
    with ranks[0].waiting("one"), ranks[1].waiting("one"), ranks[2].waiting("one", "another"):
        assert "rank 2 (host-c), which waits in another, did not arrive" in message(ranks[0])


def test_where_every_rank_is_there_it_is_the_network(board: Notes) -> None:
    ranks = [Rank(rank, board) for rank in range(3)]
    with ranks[0].waiting("one"), ranks[1].waiting("one"), ranks[2].waiting("one"):
        assert "in one: every rank is there, so look at the network" in message(ranks[0])


def test_a_board_that_does_not_answer_is_said_too(board: Notes) -> None:
    board.open.clear()
    rank = Rank(1, board)
    with rank.waiting("one"):
        assert "no rank can be asked where it is" in message(rank)


def test_collectives_that_end_in_time_and_work_between_them_are_nobodys_fault(board: Notes) -> None:
    rank = Rank(0, board, timeout=0.1)
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        with rank.waiting("one"):
            pass
    assert not rank.told.wait(0.3), "work between collectives takes as long as it takes"
    rank.watch.close()
