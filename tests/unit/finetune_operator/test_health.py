from __future__ import annotations

import socket

import aiohttp
import pytest

from finetune_operator.health import ECHO_SECONDS, HealthServer, WatchEchoes

KEY = ("team-a", "tiny")


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_a_write_whose_event_does_not_come_is_overdue() -> None:
    clock = Clock()
    echoes = WatchEchoes(clock)
    echoes.written(KEY, 100)
    clock.seconds += ECHO_SECONDS
    assert echoes.overdue() == []
    clock.seconds += 1
    assert echoes.overdue() == [KEY]
    echoes.seen(KEY)
    assert echoes.overdue() == []


def test_an_event_that_comes_before_the_write_is_noted_counts() -> None:
    clock = Clock()
    echoes = WatchEchoes(clock)
    clock.seconds = 101
    echoes.seen(KEY)
    echoes.written(KEY, 100)
    clock.seconds += 10 * ECHO_SECONDS
    assert echoes.overdue() == []


@pytest.mark.parametrize(("problems", "status"), [([], 200), (["watch is dead"], 503)], ids=["well", "frozen"])
async def test_the_probe_tells(problems: list[str], status: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = HealthServer(lambda: problems)
    await server.start(port)
    try:
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/healthz") as answer:
            assert answer.status == status
            assert await answer.json() == {"problems": problems}
    finally:
        await server.stop()
