from __future__ import annotations

import json
import socket

import aiohttp
import pytest

from finetune_operator.health import (
    ANSWERING_SECONDS,
    ECHO_SECONDS,
    WATCH_SECONDS,
    ApiServerAnswers,
    HealthServer,
    WatchEchoes,
    silent_watches,
)
from finetune_operator.listening import open_socket

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


@pytest.fixture
def answers() -> ApiServerAnswers:
    """An API server that has answered once a second, for ten minutes, up to now."""
    clock = Clock()
    answers = ApiServerAnswers(clock)
    for _ in range(600):
        clock.seconds += 1
        answers.requested(200)
    return answers


def test_a_watch_without_life_is_a_problem_while_the_api_server_answers(answers: ApiServerAnswers) -> None:
    assert silent_watches({"Job": WATCH_SECONDS, "Pod": 0.5}, answers) == []
    assert silent_watches({"Job": WATCH_SECONDS + 1, "Pod": 0.5}, answers) == [
        "watch of Job shows no life for 301 s, and the API server answers"
    ]


@pytest.mark.parametrize("code", [0, 503], ids=["no answer", "an error of its own"])
def test_an_api_server_that_is_away_or_just_back_is_no_problem_of_this_process(
    answers: ApiServerAnswers, code: int
) -> None:
    clock = answers.clock
    assert isinstance(clock, Clock)
    silent = {"Job": 1000.0}
    answers.requested(code)
    assert silent_watches(silent, answers) == []
    for _ in range(int(ANSWERING_SECONDS)):
        answers.requested(200)
        assert silent_watches(silent, answers) == [], "the reflectors may still be on their way"
        clock.seconds += 1
    assert len(silent_watches(silent, answers)) == 1


def test_a_refusal_is_an_answer(answers: ApiServerAnswers) -> None:
    answers.requested(409)
    assert len(silent_watches({"Job": 1000.0}, answers)) == 1


def test_without_an_answer_since_the_watch_fell_silent_nothing_is_known(answers: ApiServerAnswers) -> None:
    clock = answers.clock
    assert isinstance(clock, Clock)
    clock.seconds += WATCH_SECONDS + 2
    assert silent_watches({"Job": WATCH_SECONDS + 1}, answers) == []
    answers.requested(200)
    assert len(silent_watches({"Job": WATCH_SECONDS + 1}, answers)) == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("problems", "missing", "live", "ready"),
    [
        pytest.param([], [], 200, 200, id="well"),
        pytest.param(["watch is dead"], [], 503, 200, id="frozen"),
        pytest.param([], ["Job is not listed yet"], 200, 503, id="starting"),
    ],
)
async def test_the_probes_tell(problems: list[str], missing: list[str], live: int, ready: int) -> None:
    port = free_port()
    server = HealthServer(lambda: problems, lambda: missing, lambda: b"finetune_leader 1.0\n")
    await server.start(port)
    try:
        async with aiohttp.ClientSession() as session:
            answers = {}
            for path in ("healthz", "readyz", "metrics"):
                async with session.get(f"http://127.0.0.1:{port}/{path}") as answer:
                    answers[path] = (answer.status, await answer.text())
        assert answers == {
            "healthz": (live, json.dumps({"problems": problems})),
            "readyz": (ready, json.dumps({"problems": missing})),
            "metrics": (200, "finetune_leader 1.0\n"),
        }
    finally:
        await server.stop()


async def test_metrics_can_be_left_out() -> None:
    port = free_port()
    server = HealthServer(list, list)
    await server.start(port)
    try:
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as answer:
            assert answer.status == 404
    finally:
        await server.stop()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
async def test_a_server_listens_on_both_families() -> None:
    with open_socket(0) as listening:
        port = listening.getsockname()[1]
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with socket.socket(family) as caller:
                caller.connect((host, port))


def test_without_ipv6_a_server_listens_on_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with open_socket(0) as listening:
        assert listening.family is socket.AF_INET
        with socket.create_connection(("127.0.0.1", listening.getsockname()[1])):
            pass


def test_a_port_that_is_taken_is_told() -> None:
    with open_socket(0) as listening, pytest.raises(OSError, match="in use"):
        open_socket(listening.getsockname()[1])
