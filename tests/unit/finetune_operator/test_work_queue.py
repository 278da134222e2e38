from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from finetune_operator.kube.client import ClusterError
from finetune_operator.work_queue import Key, WorkQueue

KEY = ("team-a", "tiny")


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(2):
        while not check():
            await asyncio.sleep(0.001)


async def test_wakes_during_a_round_are_merged_into_one_more() -> None:
    rounds: list[Key] = []
    gate = asyncio.Event()

    async def process(key: Key) -> float | None:
        rounds.append(key)
        await gate.wait()
        return None

    queue = WorkQueue(process)
    queue.wake(KEY)
    await until(lambda: len(rounds) == 1)
    for _ in range(5):
        queue.wake(KEY)
    gate.set()
    await until(lambda: len(rounds) == 2)
    await queue.close()
    assert rounds == [KEY, KEY]


async def test_one_key_is_worked_on_by_one_round_at_a_time_and_others_beside_it() -> None:
    running: list[Key] = []
    most = 0

    async def process(key: Key) -> float | None:
        nonlocal most
        assert key not in running
        running.append(key)
        most = max(most, len(running))
        await asyncio.sleep(0.002)
        running.remove(key)
        return None

    queue = WorkQueue(process)
    keys = [("team-a", f"job-{number}") for number in range(4)]
    for _ in range(10):
        for key in keys:
            queue.wake(key)
        await asyncio.sleep(0.001)
    await until(lambda: not running)
    await queue.close()
    assert most > 1


@pytest.mark.parametrize("error", [ClusterError(503, "", "away"), ValueError("a bug")], ids=["refused", "a bug"])
async def test_a_round_that_fails_is_done_again_later(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    tries = 0

    async def process(key: Key) -> float | None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise error
        return None

    queue = WorkQueue(process, jitter=lambda: 0, first_retry_seconds=0.01)
    queue.wake(KEY)
    await until(lambda: tries == 3)
    await queue.close()
    assert ("Traceback" in caplog.text) == isinstance(error, ValueError)


async def test_a_round_may_ask_for_the_next_one_and_an_event_comes_before_it() -> None:
    rounds = 0

    async def process(key: Key) -> float | None:
        nonlocal rounds
        rounds += 1
        return 0.01 if rounds == 1 else 3600

    queue = WorkQueue(process)
    queue.wake(KEY)
    await until(lambda: rounds == 2)
    queue.wake(KEY)
    await until(lambda: rounds == 3)
    await queue.close()
