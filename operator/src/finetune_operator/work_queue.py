"""WorkQueue: one reconcile at a time for each key, many keys at once, retried until it goes through.

handlers.py puts keys in; the function given to the constructor does the work. Wakes that arrive while a key is worked
on are merged into one more round. A ClusterError is expected and retried with growing waits; any other exception is a
bug, is logged with its traceback, and is retried too, since the next event would do so anyway.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from finetune_operator.kube.client import ClusterError, retry_wait

logger = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace and name of a FineTuneJob."""

LONGEST_RETRY_SECONDS = 60.0
STUCK_SECONDS = 300.0
"""A round that takes longer than this has hung: liveness then fails."""


@dataclass
class _Entry:
    """State of one key. `due` is when its timer fires, in the loop's time."""

    timer: asyncio.TimerHandle | None = None
    due: float = float("inf")
    task: asyncio.Task[None] | None = None
    started: float = 0.0
    failures: int = 0


@dataclass
class WorkQueue:
    """`process(key)` does one round and returns the seconds after which to do another by itself, or None."""

    process: Callable[[Key], Awaitable[float | None]]
    concurrency: int = 16
    jitter: Callable[[], float] = random.random
    first_retry_seconds: float = 0.5
    _entries: dict[Key, _Entry] = field(default_factory=dict)
    _closed: bool = False

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.concurrency)

    def wake(self, key: Key, after: float = 0.0) -> None:
        """Do a round for `key` in `after` seconds at the latest."""
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        entry = self._entries.setdefault(key, _Entry())
        due = loop.time() + after
        if due >= entry.due:
            return
        entry.due = due
        if entry.timer is not None:
            entry.timer.cancel()
            entry.timer = None
        if entry.task is None:
            entry.timer = loop.call_at(due, self._start, key)

    def _start(self, key: Key) -> None:
        entry = self._entries[key]
        entry.timer, entry.due = None, float("inf")
        entry.task = asyncio.get_running_loop().create_task(self._round(key, entry), name=f"reconcile {key}")

    async def _round(self, key: Key, entry: _Entry) -> None:
        after: float | None = None
        try:
            async with self._slots:
                entry.started = asyncio.get_running_loop().time()
                after = await self.process(key)
            entry.failures = 0
        except ClusterError as error:
            after = self._retry_wait(entry, error)
            logger.warning("%s/%s: tried again in %.1f s: %s", *key, after, error)
        except Exception as error:
            after = self._retry_wait(entry, error)
            logger.exception("%s/%s: tried again in %.1f s: unexpected error", *key, after)
        finally:
            entry.task, entry.started = None, 0.0
            self._settle(key, entry, after)

    def _settle(self, key: Key, entry: _Entry, after: float | None) -> None:
        """Start the timer of the next round: the earliest of what wakes and the round itself asked for."""
        loop = asyncio.get_running_loop()
        due = min(entry.due, float("inf") if after is None else loop.time() + after)
        if self._closed or due == float("inf"):
            self._entries.pop(key, None)
            return
        entry.due = due
        entry.timer = loop.call_at(due, self._start, key)

    def _retry_wait(self, entry: _Entry, error: Exception) -> float:
        entry.failures += 1
        return retry_wait(
            error,
            entry.failures,
            first=self.first_retry_seconds,
            longest=LONGEST_RETRY_SECONDS,
            jitter=self.jitter(),
        )

    def stuck(self) -> list[Key]:
        """Keys whose round has been running for longer than STUCK_SECONDS."""
        now = asyncio.get_running_loop().time()
        return [key for key, entry in self._entries.items() if entry.started and now - entry.started > STUCK_SECONDS]

    async def close(self) -> None:
        """Take no more wakes, drop the timers, and stop the rounds under way: each may stop anywhere."""
        self._closed = True
        tasks = []
        for entry in self._entries.values():
            if entry.timer is not None:
                entry.timer.cancel()
            if entry.task is not None:
                entry.task.cancel()
                tasks.append(entry.task)
        await asyncio.gather(*tasks, return_exceptions=True)
        self._entries.clear()
