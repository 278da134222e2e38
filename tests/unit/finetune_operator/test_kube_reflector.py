"""List and watch against a mock API server that lies, refuses and goes away."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import kmock as kmock_library
import pytest
from kubernetes.aio import client as kubernetes_client

from finetune_operator.handlers import Backoffs
from finetune_operator.kube.client import OUTAGE_RETRY_SECONDS, Client, ClusterError, retry_wait
from finetune_operator.kube.reflector import Reflector
from finetune_operator.progress.server import monotonic

Server = kmock_library.RawHandler
pytestmark = pytest.mark.kmock(cls=Server)
PODS = "/api/v1/pods"
PATIENCE_SECONDS = 2.0
"""More than the first wait after a failure."""


@pytest.fixture
async def client(kmock: Server) -> AsyncIterator[Client]:
    configuration = kubernetes_client.Configuration(host=str(kmock.url).rstrip("/"))
    async with Client(kubernetes_client.ApiClient(configuration)) as client:
        yield client


class Told:
    """What a reflector told, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def put(self, raw: dict[str, Any]) -> None:
        self.events.append(("put", raw["metadata"]["name"]))

    def remove(self, raw: dict[str, Any]) -> None:
        self.events.append(("remove", raw["metadata"]["name"]))

    def replace_all(self, raws: list[dict[str, Any]], list_version: int) -> None:
        self.events.append(("all", [raw["metadata"]["name"] for raw in raws]))


@asynccontextmanager
async def running(client: Client, told: Told, *, optional: bool = False) -> AsyncIterator[Reflector]:
    reflector = Reflector(client, "Pod", PODS, told, monotonic, optional=optional)
    task = asyncio.create_task(reflector.run())
    try:
        yield reflector
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not check():
            await asyncio.sleep(0.005)


def pod(name: str, version: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "resourceVersion": version}}


def listed(version: str, *names: str) -> dict[str, Any]:
    return {"metadata": {"resourceVersion": version}, "items": [pod(name, version) for name in names]}


def refusal(code: int) -> kmock_library.Response:
    return kmock_library.Response(status=code, payload={"kind": "Status", "code": code, "message": "no"})


def script(server: Server, lists: list[Any], watches: list[Any]) -> list[str]:
    """Each list and each watch gets the next answer, or the last one again; the versions that watches began at."""
    begun: list[str] = []
    turns = {False: 0, True: 0}

    async def answer(request: kmock_library.Request) -> Any:
        is_watch = "watch" in request.params
        if is_watch:
            begun.append(str(request.params["resourceVersion"]))
        answers = watches if is_watch else lists
        turn, turns[is_watch] = turns[is_watch], turns[is_watch] + 1
        given = answers[min(turn, len(answers) - 1)]
        # kmock keeps an answer's status for the next one that has none.
        return given if isinstance(given, kmock_library.Response) else kmock_library.Response(status=200, payload=given)

    server[f"get {PODS}"] << answer
    return begun


EXPIRED = b'{"type":"ERROR","object":{"code":410,"reason":"Expired","message":"too old"}}\n'
ADDED = b'{"type":"ADDED","object":{"metadata":{"name":"b","resourceVersion":"7"}}}\n'
DELETED = b'{"type":"DELETED","object":{"metadata":{"name":"b","resourceVersion":"8"}}}\n'
BOOKMARK = b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"9"}}}\n'


async def test_a_watch_begins_where_the_list_ended_and_goes_on_where_the_last_one_ended(
    kmock: Server, client: Client
) -> None:
    begun = script(kmock, [listed("5", "a")], [ADDED + DELETED + BOOKMARK, b""])
    told = Told()
    async with running(client, told) as reflector:
        await until(lambda: len(begun) >= 2)
        assert reflector.synced.is_set()
    assert told.events == [("all", ["a"]), ("put", "b"), ("remove", "b")]
    assert begun[:2] == ["5", "9"]


@pytest.mark.parametrize(
    "expired", [pytest.param(EXPIRED, id="in the middle"), pytest.param(refusal(410), id="at its begin")]
)
async def test_a_watch_that_has_expired_is_preceded_by_a_new_list(kmock: Server, client: Client, expired: Any) -> None:
    begun = script(kmock, [listed("5", "a"), listed("20", "c")], [expired, b""])
    told = Told()
    async with running(client, told):
        await until(lambda: len(begun) >= 2)
    assert told.events == [("all", ["a"]), ("all", ["c"])]
    assert begun[:2] == ["5", "20"]


@pytest.mark.parametrize("code", [403, 404, 500, 503])
@pytest.mark.parametrize("optional", [True, False])
async def test_a_refusal_is_followed_by_another_try_soon(
    kmock: Server, client: Client, code: int, optional: bool
) -> None:
    """An API server that has just started refuses what it grants a moment later."""
    script(kmock, [refusal(code), listed("5", "a")], [b""])
    told = Told()
    async with running(client, told, optional=optional):
        await until(lambda: told.events == [("all", ["a"])])


async def test_an_optional_kind_that_is_not_served_keeps_nobody_waiting(kmock: Server, client: Client) -> None:
    script(kmock, [refusal(404)], [b""])
    async with running(client, Told(), optional=True) as reflector:
        await asyncio.wait_for(reflector.synced.wait(), PATIENCE_SECONDS)


@pytest.mark.parametrize(
    ("status", "longest"),
    [
        pytest.param(0, OUTAGE_RETRY_SECONDS, id="nobody answers"),
        pytest.param(503, OUTAGE_RETRY_SECONDS, id="starting"),
        pytest.param(429, OUTAGE_RETRY_SECONDS, id="overloaded"),
        pytest.param(403, 60, id="forbidden"),
        pytest.param(422, 60, id="refused"),
    ],
)
def test_waits_grow_but_never_long_for_an_api_server_that_is_away(status: int, longest: float) -> None:
    error = ClusterError(status, "", "")
    waits = [retry_wait(error, failures, first=0.5, longest=60, jitter=0) for failures in range(1, 40)]
    assert waits[:3] == [0.5, 1, 2]
    assert waits == sorted(waits)
    assert waits[-1] == longest
    assert retry_wait(error, 1, first=0.5, longest=60, jitter=1) == pytest.approx(0.6)


def test_kopf_never_gives_up_and_never_waits_long() -> None:
    backoffs = Backoffs()
    waits = list(itertools.islice(backoffs, 1000))
    assert waits[0] < 1
    assert max(waits) == OUTAGE_RETRY_SECONDS
    assert next(iter(backoffs)) == waits[0], "each request begins anew"
