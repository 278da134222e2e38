"""POST /v1/progress: authenticated, checked, kept in memory; the job's reconcile is woken to show it.

Started by handlers.py where the installation has an endpoint. The newest post of each job is kept and nothing else; a
restart of the operator forgets it, and the next post is two seconds away.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from finetune_operator.core.figures import Progress
from finetune_operator.kube.client import ClusterError
from finetune_operator.progress.certificates import Authority, make_serving_pair
from finetune_operator.progress.senders import Sender, Senders

logger = logging.getLogger(__name__)

BODY_MAX_BYTES = 4096
WAKE_SECONDS = 5.0
"""A job's status follows its posts at most this often."""

Key = tuple[str, str]


class ProgressStore:
    """The newest progress of each job that posts. `wake(key, after)` has its reconcile done in `after` seconds."""

    def __init__(self, wake: Callable[[Key, float], None], clock: Callable[[], float]) -> None:
        self._wake = wake
        self._clock = clock
        self._newest: dict[Key, Progress] = {}
        self._woken: dict[Key, float] = {}

    def find(self, key: Key) -> Progress | None:
        return self._newest.get(key)

    def keep(self, sender: Sender, facts: Mapping[str, Any], now: datetime) -> None:
        """Take what a sender posted; ValueError names a field that is wrong."""
        key = (sender.namespace, sender.job_name)
        posted = parse_progress(sender, facts)
        before = self._newest.get(key)
        if posted.checkpoint_step is not None:
            same = before is not None and before.checkpoint_step == posted.checkpoint_step
            posted = replace(posted, checkpoint_time=before.checkpoint_time if same and before is not None else now)
        self._newest[key] = posted
        self._wake_soon(key)

    def _wake_soon(self, key: Key) -> None:
        now = self._clock()
        planned = self._woken.get(key)
        if planned is not None and planned > now:
            return
        due = now if planned is None else max(now, planned + WAKE_SECONDS)
        self._woken[key] = due
        self._wake(key, due - now)

    def forget(self, key: Key) -> None:
        self._newest.pop(key, None)
        self._woken.pop(key, None)


def parse_progress(sender: Sender, facts: Mapping[str, Any]) -> Progress:
    """Progress of the sender's attempt from the posted object; ValueError names the field and what it must be."""
    step = _number(facts, "step", whole=True)
    total = _number(facts, "totalSteps", whole=True)
    if step is None or total is None:
        raise ValueError("step and totalSteps are required")
    checkpoint = _number(facts, "lastCheckpoint", whole=True)
    return Progress(
        stage=sender.stage,
        attempt=sender.attempt,
        step=int(step),
        total_steps=int(total),
        loss=_number(facts, "loss", negative=True),
        tokens_per_second=_number(facts, "tokensPerSecond"),
        checkpoint_step=None if checkpoint is None else int(checkpoint),
        seconds_left=_number(facts, "secondsLeft"),
    )


def _number(facts: Mapping[str, Any], name: str, *, whole: bool = False, negative: bool = False) -> float | None:
    value = facts.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    # The status holds 64-bit integers: a larger one would have the API server refuse every later status write.
    most = 2**63 - 1 if whole else sys.float_info.max
    if not is_number or not -most <= value <= most:
        raise ValueError(f"{name} is {value!r}: it must be a {'whole ' if whole else ''}number")
    if value < 0 and not negative:
        raise ValueError(f"{name} is {value!r}: it must not be negative")
    return float(value) if not whole else value


class ProgressServer:
    """The endpoint, from start() to stop(). `now` reads the clock."""

    def __init__(self, store: ProgressStore, senders: Senders, now: Callable[[], datetime]) -> None:
        self._store = store
        self._senders = senders
        self._now = now
        self._runner: web.AppRunner | None = None

    async def start(self, authority: Authority, url: str, port: int) -> None:
        """Serve the path of `url` on `port` of every address."""
        app = web.Application(client_max_size=BODY_MAX_BYTES)
        app.router.add_post(urlsplit(url).path or "/", self._post)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1)
        await self._runner.setup()
        context = self._context(authority, url)
        await web.TCPSite(self._runner, host="0.0.0.0", port=port, ssl_context=context).start()  # noqa: S104
        logger.info("progress endpoint serves %s on port %d", url, port)

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def _context(self, authority: Authority, url: str) -> ssl.SSLContext:
        certificate, key = make_serving_pair(authority, url, self._now())
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        with tempfile.TemporaryDirectory() as folder:  # the ssl module takes files only
            paths = (Path(folder) / "tls.crt", Path(folder) / "tls.key")
            for path, content in zip(paths, (certificate, key), strict=True):
                path.touch(mode=0o600)
                path.write_bytes(content)
            context.load_cert_chain(*paths)
        return context

    async def _post(self, request: web.Request) -> web.Response:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            return web.Response(status=401, text="a bearer token is required\n")
        try:
            sender = await self._senders.find(token.strip())
        except ClusterError as error:
            logger.warning("a progress post could not be authenticated: %s", error)
            return web.Response(status=503, text="try again later\n")
        if sender is None:
            return web.Response(status=403, text="the token is not one of a stage's pod\n")
        try:
            facts = json.loads(await request.text())
            if not isinstance(facts, dict):
                raise ValueError("the body must be an object")
            self._store.keep(sender, facts, self._now())
        except ValueError as error:
            return web.Response(status=400, text=f"{error}\n")
        return web.Response(status=204)


def monotonic() -> float:
    """Seconds of the running loop's clock."""
    return asyncio.get_running_loop().time()
