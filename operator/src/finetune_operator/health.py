"""GET /healthz: 200 while the operator works, 503 with the reason when it has frozen and should be restarted.

Started by handlers.py. Two signs of a freeze: a reconcile that does not end, and a watch that does not bring back the
event of a status that was just written. A quiet cluster is no sign.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import web

ECHO_SECONDS = 120.0
"""A watch that has not shown our own write for so long is dead; a live one shows it in milliseconds."""

Key = tuple[str, str]


@dataclass
class WatchEchoes:
    """Status writes whose watch event is still to come. `clock` gives seconds that never go back."""

    clock: Callable[[], float]
    _awaited: dict[Key, float] = field(default_factory=dict)
    _seen: dict[Key, float] = field(default_factory=dict)

    def written(self, key: Key, since: float) -> None:
        """The object was written at `since` or later; its event may have come already."""
        if self._seen.get(key, -1.0) < since:
            self._awaited.setdefault(key, since)

    def seen(self, key: Key) -> None:
        """An event of the object came; any one shows that the watch lives."""
        self._awaited.pop(key, None)
        self._seen[key] = self.clock()

    def forget(self, key: Key) -> None:
        self._awaited.pop(key, None)
        self._seen.pop(key, None)

    def overdue(self) -> list[Key]:
        return [key for key, since in self._awaited.items() if self.clock() - since > ECHO_SECONDS]


class HealthServer:
    """Plain HTTP for the kubelet's probes. `problems()` gives what is wrong, nothing when all is well."""

    def __init__(self, problems: Callable[[], list[str]]) -> None:
        self._problems = problems
        self._runner: web.AppRunner | None = None

    async def start(self, port: int) -> None:
        app = web.Application()
        app.router.add_get("/healthz", self._answer)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, host="0.0.0.0", port=port).start()  # noqa: S104  the kubelet comes from outside

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.Request) -> web.Response:
        problems = self._problems()
        return web.json_response({"problems": problems}, status=503 if problems else 200)
