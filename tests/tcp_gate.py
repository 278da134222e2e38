"""A gate before the API server that a test can shut: what goes through is cut off, and nobody is let in until it opens.

For its client that is an API server that is away. TLS is between client and API server, as always.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


class TcpGate:
    """Listens at `server` and passes on to the API server at the URL `target`. Made by `running`."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = parts.hostname or "", parts.port or 443
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_open = True
        self.server = ""

    def shut(self) -> None:
        """Cut every connection, and refuse new ones until `open`."""
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(10)

    def open(self) -> None:
        self._is_open = True

    async def _shut(self) -> None:
        self._is_open = False
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, listening: threading.Event) -> None:
        async with await asyncio.start_server(self._take, "127.0.0.1", 0) as server:
            self.server = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            listening.set()
            await server.serve_forever()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._is_open:
            writer.transport.abort()
            return
        beyond, to_beyond = await asyncio.open_connection(*self._target)
        pair = {writer, to_beyond}
        self._writers |= pair
        await asyncio.gather(_pump(reader, to_beyond), _pump(beyond, writer))
        self._writers -= pair


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextmanager
def running(target: str) -> Iterator[TcpGate]:
    gate, listening = TcpGate(target), threading.Event()
    task: asyncio.Task[None] | None = None

    def serve() -> None:
        nonlocal task
        asyncio.set_event_loop(gate._loop)
        task = gate._loop.create_task(gate._serve(listening))
        with suppress(asyncio.CancelledError):
            gate._loop.run_until_complete(task)
        gate._loop.run_until_complete(asyncio.gather(*asyncio.all_tasks(gate._loop), return_exceptions=True))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert listening.wait(10)
    try:
        yield gate
    finally:
        gate.shut()
        assert task is not None
        gate._loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        gate._loop.close()
