"""Reflector: follows one kind by list and watch, whatever happens to the connection, and tells a sink of it.

handlers.py runs one for each kind. kopf would do the same at 1.3 ms of CPU an event and with nothing of what is needed
here: objects parsed once, and the age of the last sign of life (docs/design/0011).

A watch that says nothing, not even the bookmark that the API server sends every minute, is begun anew. One that has
expired (410) is preceded by a new list, which also tells what went away meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any, Protocol

from finetune_operator.kube.client import Client, ClusterError, Raw, retry_wait

logger = logging.getLogger(__name__)

WATCH_SECONDS = 540
"""Life that is asked for each watch; the API server's own bound is 5 to 10 minutes."""
SILENCE_SECONDS = 150.0
"""A watch without event or bookmark for so long is dead: bookmarks come every minute."""
LIST_LIMIT = 500
FIRST_RETRY_SECONDS = 0.4
LONGEST_RETRY_SECONDS = 30.0
ABSENT_SECONDS = 60.0
"""How often at last a kind is looked for that the cluster does not serve, or does not let us see."""


class Sink(Protocol):
    """What is told: every object that was added or changed, every one that was deleted, and each whole list."""

    def put(self, raw: Raw) -> None: ...
    def remove(self, raw: Raw) -> None: ...
    def replace_all(self, raws: list[Raw], list_version: int) -> None: ...


class Reflector:
    """One kind, or one kind of one namespace. `clock` gives seconds that never go back.

    `optional` is for a kind that the cluster may not serve, or not let us see: then there is none of it.
    """

    def __init__(
        self,
        client: Client,
        kind: str,
        path: str,
        sink: Sink,
        clock: Callable[[], float],
        *,
        label_selector: str = "",
        optional: bool = False,
    ) -> None:
        self.kind = kind
        self.path = path
        self._client = client
        self._sink = sink
        self._clock = clock
        self._selector = {"labelSelector": label_selector} if label_selector else {}
        self._optional = optional
        self._version: str | None = None
        self._sign_of_life: float | None = None
        self._failures = 0
        self.synced = asyncio.Event()
        """Set once the first list is in the cache (or the kind, being optional, is known not to be served)."""

    def last_event_age(self) -> float | None:
        """Seconds since the watch last showed life (an event, a bookmark, a list); None before the first list."""
        return None if self._sign_of_life is None else self._clock() - self._sign_of_life

    async def run(self) -> None:
        """Follow the kind until cancelled."""
        while True:
            try:
                if self._version is None:
                    await self._list()
                await self._watch()
                self._failures = 0
            except ClusterError as error:
                await self._recover(error)
            except Exception as error:
                # A bug in parsing one object must not blind the operator for good: it is logged, and begun anew.
                logger.exception("watch of %s: unexpected error", self.kind)
                self._version = None
                await self._pause(error)

    async def _recover(self, error: ClusterError) -> None:
        if error.status == 410:
            logger.info("watch of %s has expired: listing anew", self.kind)
            self._version = None
            return
        if error.status in (403, 404) and self._optional:
            # Not installed, or not ours to see: looked for again now and then. Soon at first, since an API server that
            # has just started says so of everything.
            self._version = None
            self.synced.set()
            self._sign_of_life = self._clock()
            await self._pause(error, ABSENT_SECONDS)
            return
        logger.warning("watch of %s is begun anew: %s", self.kind, error)
        await self._pause(error)

    async def _pause(self, error: Exception, longest: float = LONGEST_RETRY_SECONDS) -> None:
        self._failures += 1
        jitter = random.random()  # noqa: S311  spreads retries, guards nothing
        wait = retry_wait(error, self._failures, first=FIRST_RETRY_SECONDS, longest=longest, jitter=jitter)
        await asyncio.sleep(wait)

    async def _list(self) -> None:
        raws: list[Raw] = []
        query = {**self._selector, "limit": str(LIST_LIMIT)}
        while True:
            page = await self._client.read(self.path, query)
            raws.extend(page.get("items") or ())
            metadata = page.get("metadata") or {}
            if not metadata.get("continue"):
                break
            query["continue"] = metadata["continue"]
        version = str(metadata.get("resourceVersion") or "0")
        self._sink.replace_all(raws, int(version))
        self._version = version
        self._sign_of_life = self._clock()
        self.synced.set()

    async def _watch(self) -> None:
        query = {
            **self._selector,
            "resourceVersion": self._version or "0",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        async for event in self._client.watch(self.path, query, silence_seconds=SILENCE_SECONDS):
            self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        kind, raw = event.get("type"), event.get("object") or {}
        if kind == "ERROR":
            code = int(raw.get("code") or 0)
            raise ClusterError(code, str(raw.get("reason") or ""), f"watch of {self.kind}: {raw.get('message')}")
        self._sign_of_life = self._clock()
        self._failures = 0
        if kind == "DELETED":
            self._sink.remove(raw)
        elif kind in ("ADDED", "MODIFIED"):
            self._sink.put(raw)
        self._version = str(raw["metadata"].get("resourceVersion") or self._version)
