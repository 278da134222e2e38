"""The plain HTTP port: /healthz for liveness, /readyz for readiness, /metrics for Prometheus.

Started by handlers.py, in the leader and in the replicas that stand by. Liveness fails when this process has frozen and
a new one would work: a reconcile that does not end, a watch that does not bring back what was just written, a watch
without life though the API server answers. A quiet cluster is no sign, and neither is an API server that is away: then
a restart would only lose the caches. Readiness means that the caches are filled; a standby is ready.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from aiohttp import web

from finetune_operator.listening import listen
from finetune_operator.metrics import CONTENT_TYPE

ECHO_SECONDS = 120.0
"""A watch that has not shown our own write for so long is dead; a live one shows it in milliseconds."""
WATCH_SECONDS = 300.0
"""A watch without event or bookmark for so long is dead: bookmarks come every minute. A reflector that hears nothing
begins a new watch long before."""
ANSWERING_SECONDS = 90.0
"""For so long the API server must have answered every request before a silent watch is held against this process: time
for each reflector to get through after an outage."""

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
        """The object is gone: no event of it will come."""
        self._awaited.pop(key, None)
        self._seen.pop(key, None)

    def overdue(self) -> list[Key]:
        """Objects whose event has been due for longer than ECHO_SECONDS."""
        return [key for key, since in self._awaited.items() if self.clock() - since > ECHO_SECONDS]


@dataclass
class ApiServerAnswers:
    """Since when the API server answers every request. `clock` gives seconds that never go back."""

    clock: Callable[[], float]
    _since: float | None = None
    _last: float = 0.0

    def requested(self, code: int) -> None:
        """A request was answered with this HTTP code; 0 for none. The server's own errors count as no answer."""
        if code == 0 or code >= 500:
            self._since = None
            return
        self._last = self.clock()
        if self._since is None:
            self._since = self._last

    def is_steady_after(self, moment: float) -> bool:
        """True when it has answered for ANSWERING_SECONDS without a failure, and answered something after `moment`."""
        return self._since is not None and self._last > moment and self.clock() - self._since >= ANSWERING_SECONDS


def silent_watches(ages: Mapping[str, float], answers: ApiServerAnswers) -> list[str]:
    """What is wrong with the watches, by the age in seconds of each kind's last sign of life.

    A kind that was not listed yet has no age: that is readiness' matter.
    """
    return [
        f"watch of {kind} shows no life for {age:.0f} s, and the API server answers"
        for kind, age in sorted(ages.items())
        if age > WATCH_SECONDS and answers.is_steady_after(answers.clock() - age)
    ]


class HealthServer:
    """The three paths. `problems()` gives what shows that this process has frozen and `missing()` what it still waits
    for, nothing when all is well; `metrics()` gives Prometheus' text, or is None where there is to be none."""

    def __init__(
        self,
        problems: Callable[[], list[str]],
        missing: Callable[[], list[str]],
        metrics: Callable[[], bytes] | None = None,
    ) -> None:
        self._problems = problems
        self._missing = missing
        self._metrics = metrics
        self._runner: web.AppRunner | None = None

    async def start(self, port: int) -> None:
        """Serve on `port` of every address until stop()."""
        app = web.Application()
        app.router.add_get("/healthz", self._live)
        app.router.add_get("/readyz", self._ready)
        if self._metrics is not None:
            app.router.add_get("/metrics", self._show_metrics)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1)
        await self._runner.setup()
        await listen(self._runner, port)

    async def stop(self) -> None:
        """Serve no more. Harmless when it was not started."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _live(self, request: web.Request) -> web.Response:
        return _answer(self._problems())

    async def _ready(self, request: web.Request) -> web.Response:
        return _answer(self._missing())

    async def _show_metrics(self, request: web.Request) -> web.Response:
        if self._metrics is None:
            raise web.HTTPNotFound
        return web.Response(body=self._metrics(), headers={"Content-Type": CONTENT_TYPE})


def _answer(problems: list[str]) -> web.Response:
    return web.json_response({"problems": problems}, status=503 if problems else 200)
