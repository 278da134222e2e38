"""POST /v1/progress: authenticated, checked, kept in memory; the job's reconcile is woken to show it.

Started by handlers.py where the installation has an endpoint, in each replica: the Service does not know which one
leads, so one that stands by passes posts on to the leader (forwarder.py). The newest post of each job is kept and
nothing else; a restart of the operator forgets it, and the next post is two seconds away.
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
from finetune_operator.listening import listen
from finetune_operator.progress.certificates import Authorities, make_serving_pair, needs_serving_pair
from finetune_operator.progress.forwarder import Forwarder, Unreachable, was_forwarded
from finetune_operator.progress.senders import Sender, Senders

logger = logging.getLogger(__name__)

BODY_MAX_BYTES = 4096
PHASE_MAX_LENGTH = 32
WAKE_SECONDS = 10.0
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
        posted, before = parse_progress(sender, facts), self._newest.get(key)
        self._newest[key] = _dated(posted, before, now)
        self._wake_soon(key)

    def _wake_soon(self, key: Key) -> None:
        now = self._clock()
        due = self._woken.get(key)
        if due is None:
            due = now
        elif due <= now:
            due = max(now, due + WAKE_SECONDS)
        self._woken[key] = due
        # Also when that was asked for already: a round in between may have stood for it, without this post.
        self._wake(key, due - now)

    def forget(self, key: Key) -> None:
        """The job is gone."""
        self._newest.pop(key, None)
        self._woken.pop(key, None)

    def clear(self) -> None:
        """Forget every post: what was kept before another replica led says nothing about who hangs now."""
        self._newest.clear()
        self._woken.clear()


def _dated(posted: Progress, before: Progress | None, now: datetime) -> Progress:
    """The post with the times at which its checkpoint was first posted and at which anything in it last advanced."""
    if before is not None and (before.stage, before.digest, before.attempt) != (
        posted.stage,
        posted.digest,
        posted.attempt,
    ):
        before = None
    checkpoint_time = None
    if posted.checkpoint_step is not None:
        same = before is not None and before.checkpoint_step == posted.checkpoint_step
        checkpoint_time = before.checkpoint_time if same and before is not None else now
    advanced_at = now
    if before is not None and _position(before) == _position(posted):
        advanced_at = before.advanced_at or now
    return replace(posted, checkpoint_time=checkpoint_time, advanced_at=advanced_at)


def _position(progress: Progress) -> tuple[int, int | None, str]:
    return (progress.step, progress.checkpoint_step, progress.phase)


def parse_progress(sender: Sender, facts: Mapping[str, Any]) -> Progress:
    """Progress of the sender's attempt from the posted object; ValueError names the field and what it must be."""
    step = _number(facts, "step", whole=True)
    total = _number(facts, "totalSteps", whole=True)
    if step is None or total is None:
        raise ValueError("step and totalSteps are required")
    checkpoint = _number(facts, "lastCheckpoint", whole=True)
    phase = facts.get("phase") or ""
    if not isinstance(phase, str) or len(phase) > PHASE_MAX_LENGTH:
        raise ValueError(f"phase must be a text of at most {PHASE_MAX_LENGTH} characters")
    return Progress(
        stage=sender.stage,
        attempt=sender.attempt,
        step=int(step),
        total_steps=int(total),
        loss=_number(facts, "loss", negative=True),
        tokens_per_second=_number(facts, "tokensPerSecond"),
        mfu=_number(facts, "mfu"),
        checkpoint_step=None if checkpoint is None else int(checkpoint),
        seconds_left=_number(facts, "secondsLeft"),
        digest=sender.digest,
        phase=phase,
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
    """The endpoint, from start() to stop(). `now` reads the clock. Without a forwarder, posts end here."""

    def __init__(
        self,
        store: ProgressStore,
        senders: Senders,
        now: Callable[[], datetime],
        forwarder: Forwarder | None = None,
    ) -> None:
        self._store = store
        self._senders = senders
        self._now = now
        self._forwarder = forwarder
        self._url = ""
        self._certificate: bytes | None = None
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._runner: web.AppRunner | None = None

    async def start(self, authorities: Authorities, url: str, port: int) -> None:
        """Serve the path of `url` on `port` of every address."""
        self._url = url
        self.renew(authorities)
        app = web.Application(client_max_size=BODY_MAX_BYTES)
        app.router.add_post(urlsplit(url).path or "/", self._post)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1)
        await self._runner.setup()
        await listen(self._runner, port, self._context)
        logger.info("progress endpoint serves %s on port %d", url, port)

    def renew(self, authorities: Authorities) -> bool:
        """Serve with a new certificate from the next connection on, if it is time; whether it was. Stops nothing."""
        if self._forwarder is not None:
            self._forwarder.trust(authorities)
        if not needs_serving_pair(self._certificate, authorities.current, self._now()):
            return False
        certificate, key = make_serving_pair(authorities.current, self._url, self._now())
        with tempfile.TemporaryDirectory() as folder:  # the ssl module takes files only
            paths = (Path(folder) / "tls.crt", Path(folder) / "tls.key")
            for path, content in zip(paths, (certificate, key), strict=True):
                path.touch(mode=0o600)
                path.write_bytes(content)
            self._context.load_cert_chain(*paths)
        self._certificate = certificate
        return True

    async def stop(self) -> None:
        """Serve no more. Harmless when it was not started."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        if self._forwarder is not None:
            await self._forwarder.close()

    async def _post(self, request: web.Request) -> web.Response:
        authorization = request.headers.get("Authorization", "")
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            return web.Response(status=401, text="a bearer token is required\n")
        body = await request.read()
        if self._forwarder is not None and not self._forwarder.is_leader():
            return await self._pass_on(self._forwarder, authorization, body, again=was_forwarded(request.headers))
        try:
            sender = await self._senders.find(token.strip())
        except ClusterError as error:
            logger.warning("a progress post could not be authenticated: %s", error)
            return web.Response(status=503, text="try again later\n")
        if sender is None:
            return web.Response(status=403, text="the token is not one of a stage's pod\n")
        try:
            facts = json.loads(body)
            if not isinstance(facts, dict):
                raise ValueError("the body must be an object")
            self._store.keep(sender, facts, self._now())
        except ValueError as error:
            return web.Response(status=400, text=f"{error}\n")
        return web.Response(status=204)

    async def _pass_on(self, forwarder: Forwarder, authorization: str, body: bytes, *, again: bool) -> web.Response:
        """The leader's answer to a post that came to a replica which stands by; 503 while there is none."""
        if again:  # the lead has just changed hands: no post goes round in circles
            return web.Response(status=503, text="this replica does not lead\n")
        try:
            status, text = await forwarder.forward(authorization, body)
        except Unreachable as error:
            return web.Response(status=503, text=f"{error}\n")
        return web.Response(status=status, text=text or None)


def monotonic() -> float:
    """Seconds of the running loop's clock."""
    return asyncio.get_running_loop().time()
