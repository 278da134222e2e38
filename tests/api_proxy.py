"""A proxy before the API server that counts one client's calls and can end the client around any of them.

A test gives an operator process a kubeconfig that names the proxy, in plain HTTP, and says by `strike` at which call
the process dies: before the call is forwarded, so that the API server never hears of it, or after the API server has
answered, so that the client never hears of that. What the process had sent meanwhile, on other connections, is cut off
as a process's death cuts it off: what was forwarded takes effect, its answer goes nowhere.
"""

from __future__ import annotations

import asyncio
import enum
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import aiohttp
from aiohttp import web
from raw_api import Access
from yarl import URL

_HOP_BY_HOP = frozenset(
    {"connection", "content-encoding", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding"}
)
_AUTOMATIC = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""What aiohttp would add to a call that does not say it."""


class Moment(enum.StrEnum):
    """On which side of the struck call the client dies."""

    BEFORE = "before"
    AFTER = "after"


@dataclass(frozen=True)
class Call:
    """One request of the client. A watch is one call, at its start."""

    number: int
    method: str
    path: str
    watch: bool
    life: int
    """Which process of the client made it: 0 for the first."""

    @property
    def mutates(self) -> bool:
        return self.method not in ("GET", "HEAD")

    def __str__(self) -> str:
        return f"{'WATCH' if self.watch else self.method} {self.path}"


@dataclass(frozen=True)
class Strike:
    """End the client at its call `number`, counted from 1 since `arm`, by `kill`, which returns when it is dead."""

    number: int
    moment: Moment
    kill: Callable[[], None]


class ApiProxy:
    """One proxy for one client at a time. Use as an asynchronous context manager."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._strike: Strike | None = None
        self._runner = web.ServerRunner(web.Server(self._handle), shutdown_timeout=0.1)
        self._session: aiohttp.ClientSession | None = None
        self._lives: WeakKeyDictionary[asyncio.Transport, int] = WeakKeyDictionary()
        self._watches: set[asyncio.Task[Any]] = set()
        self._last = 0.0
        self.life = 0
        """Which process of the client calls now; what an earlier one has left behind is not forwarded."""
        self.calls: list[Call] = []
        self.struck: Call | None = None
        self.port = 0

    async def __aenter__(self) -> ApiProxy:
        connector = aiohttp.TCPConnector(limit=0, ssl=self._access.tls or True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=self._access.headers, auto_decompress=False
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
        assert self._session is not None
        await self._session.close()

    def write_kubeconfig(self, path: Path) -> None:
        """A kubeconfig whose only cluster is this proxy; who one is towards the API server is the proxy's affair."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "proxy",
            "clusters": [{"name": "proxy", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{"name": "proxy", "user": {}}],
            "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "proxy"}}],
        }
        path.write_text(json.dumps(config))

    def arm(self, strike: Strike | None) -> None:
        """Forget what was counted, and strike from now on, once; None only counts."""
        self._strike = strike
        self.calls, self.struck = [], None
        self._touch()

    def _touch(self) -> None:
        self._last = asyncio.get_running_loop().time()

    def idle_seconds(self) -> float:
        """Seconds since the last call began or ended."""
        return asyncio.get_running_loop().time() - self._last

    def next_life(self) -> None:
        """The client's process is dead: its connections and watches end, and the next one begins."""
        self.life += 1
        for watch in self._watches:
            watch.cancel()

    def _kill(self, call: Call) -> None:
        assert self._strike is not None
        self.struck = call
        kill, self._strike = self._strike.kill, None
        kill()
        self.next_life()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Forward one call. A call of a process that is dead, or dies of it, gets no answer."""
        transport = request.transport
        if transport is None or self._lives.setdefault(transport, self.life) != self.life:
            return _cut(request)
        life = self.life
        body = await request.read()
        if life != self.life:
            return _cut(request)
        watch = request.query.get("watch") in ("true", "1", "True")
        call = Call(len(self.calls) + 1, request.method, request.path, watch, life)
        self.calls.append(call)
        self._touch()
        strike = self._strike if self._strike is not None and self._strike.number == call.number else None
        if strike is not None and strike.moment is Moment.BEFORE:
            self._kill(call)
            return _cut(request)
        assert self._session is not None
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        url = URL(f"{self._access.server}{request.raw_path}", encoded=True)
        async with self._session.request(
            request.method, url, data=body or None, headers=headers, skip_auto_headers=_AUTOMATIC
        ) as answer:
            content = None if call.watch else await answer.read()
            if strike is not None and life == self.life:
                self._kill(call)
            if life != self.life:
                return _cut(request)
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
            if encoding := answer.headers.get("Content-Encoding"):
                kept["Content-Encoding"] = encoding
            self._touch()
            if content is not None:
                return web.Response(status=answer.status, headers=kept, body=content)
            return await self._stream(request, answer, kept, life)

    async def _stream(
        self, request: web.BaseRequest, answer: aiohttp.ClientResponse, headers: dict[str, str], life: int
    ) -> web.StreamResponse:
        """Pass a watch's events on as they come, while the process lives that asked for them."""
        response = web.StreamResponse(status=answer.status, headers=headers)
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        try:
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
        except (ConnectionError, aiohttp.ClientError):
            return _cut(request)
        except asyncio.CancelledError:
            if life == self.life:
                raise
            return _cut(request)
        finally:
            self._watches.discard(task)
        return response


def _cut(request: web.BaseRequest) -> web.StreamResponse:
    """Close the client's connection without an answer."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
