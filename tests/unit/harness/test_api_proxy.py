"""The proxy of the kill tests in front of a small server: what it counts, what it lets through, and when it strikes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web
from api_proxy import ApiProxy, Moment, Strike
from raw_api import Access


class Server:
    """Counts what reaches it, and has one watch that never ends."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.media: list[str | None] = []
        self.url = ""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.seen.append(f"{request.method} {request.raw_path}")
        self.media.append(request.headers.get("Content-Type"))
        if "watch" in request.query:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b'{"type":"ADDED"}\n')
            await asyncio.sleep(3600)
        return web.Response(text=f"{request.method} {(await request.read()).decode()}", status=201)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    runner = web.ServerRunner(web.Server(server.handle, handler_cancellation=True), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[ApiProxy]:
    async with ApiProxy(Access(server.url, None, {})) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy: ApiProxy) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(f"http://127.0.0.1:{proxy.port}") as session:
        yield session


async def test_a_call_goes_through_as_it_is(server: Server, proxy: ApiProxy, client: aiohttp.ClientSession) -> None:
    async with client.post("/a%2Fb?x=1&y=%3D", data=b"body", headers={"Content-Type": "text/x"}) as answer:
        assert (answer.status, await answer.text()) == (201, "POST body")
    async with client.get("/plain") as answer:
        assert answer.status == 201
    assert server.seen == ["POST /a%2Fb?x=1&y=%3D", "GET /plain"]
    assert server.media == ["text/x", None], "a call without a body must not get a media type"
    assert [(call.number, call.method, call.mutates) for call in proxy.calls] == [(1, "POST", True), (2, "GET", False)]


async def test_a_watch_is_one_call_and_its_events_pass(proxy: ApiProxy, client: aiohttp.ClientSession) -> None:
    async with client.get("/w?watch=true") as answer:
        assert await answer.content.readline() == b'{"type":"ADDED"}\n'
    assert [(call.watch, call.mutates) for call in proxy.calls] == [(True, False)]


@pytest.mark.parametrize(
    ("moment", "reached"),
    [
        pytest.param(Moment.BEFORE, ["POST /1"], id="before: the server never hears of the second call"),
        pytest.param(Moment.AFTER, ["POST /1", "POST /2"], id="after: the server has done the second call"),
    ],
)
async def test_the_client_dies_at_its_nth_call_and_gets_no_answer_to_it(
    server: Server, proxy: ApiProxy, client: aiohttp.ClientSession, moment: Moment, reached: list[str]
) -> None:
    deaths = []
    proxy.arm(Strike(2, moment, lambda: deaths.append(list(server.seen))))
    async with client.post("/1", data=b"x") as answer:
        assert answer.status == 201
    with pytest.raises(aiohttp.ClientError):
        await client.post("/2", data=b"x")
    assert deaths == [reached]
    assert server.seen == reached
    assert proxy.struck is not None
    assert proxy.struck.path == "/2"


async def test_the_next_process_is_served_and_the_dead_ones_watch_is_over(
    proxy: ApiProxy, client: aiohttp.ClientSession
) -> None:
    proxy.arm(Strike(2, Moment.BEFORE, lambda: None))
    async with client.get("/w?watch=true") as watch:
        await watch.content.readline()
        with pytest.raises(aiohttp.ClientError):
            await client.post("/2", data=b"x")
        with pytest.raises(aiohttp.ClientError):
            await asyncio.wait_for(watch.content.readline(), 5)
    async with client.post("/3", data=b"x") as answer:
        assert answer.status == 201
    assert [call.life for call in proxy.calls] == [0, 0, 1]
    assert proxy.struck is not None
