"""JobAudit: does the watch of FineTuneJobs tell of everything? kopf's is not ours to look into, so it is compared.

Run by handlers.py. Once a minute the jobs are listed, names and versions only. A job that the cache lacks or has in an
older version is read and put into the cache, and if the watch has still not shown it after DEAF_SECONDS, it is dead and
liveness says so. A job that the list lacks is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

from finetune_operator.api import constants
from finetune_operator.core.cache import Cache, Key, Wake, version_of
from finetune_operator.kube.client import Client, ClusterError

logger = logging.getLogger(__name__)

AUDIT_SECONDS = 60.0
DEAF_SECONDS = 150.0


class JobAudit:
    """`namespaces` empty: the whole cluster. `clock` gives seconds that never go back."""

    def __init__(
        self,
        client: Client,
        cache: Cache,
        namespaces: Iterable[str],
        on_wakes: Callable[[Iterable[Wake]], None],
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._cache = cache
        base = f"/apis/{constants.API_VERSION}"
        self._paths = {ns: f"{base}/namespaces/{ns}/{constants.PLURAL}" for ns in namespaces} or {
            "": f"{base}/{constants.PLURAL}"
        }
        self._on_wakes = on_wakes
        self._clock = clock
        self._unseen: dict[Key, tuple[int, float]] = {}
        """Jobs that the watch has not shown: in which version, and since when that is known."""
        self.synced = asyncio.Event()
        """Set once every job was listed."""

    def seen(self, key: Key, version: int) -> None:
        """The watch has shown the job in that version."""
        if key in self._unseen and version >= self._unseen[key][0]:
            del self._unseen[key]

    def overdue(self) -> list[Key]:
        """Jobs that the watch has not shown for too long."""
        return [key for key, (_, since) in self._unseen.items() if self._clock() - since > DEAF_SECONDS]

    async def run(self) -> None:
        """Compare until cancelled."""
        while True:
            try:
                for namespace, path in self._paths.items():
                    await self._compare(namespace, path)
                self.synced.set()
                await asyncio.sleep(AUDIT_SECONDS)
            except ClusterError as error:
                logger.warning("FineTuneJobs could not be listed: %s", error)
                await asyncio.sleep(AUDIT_SECONDS / 10)

    async def _compare(self, namespace: str, path: str) -> None:
        items, version = await self._client.list_metadata(path)
        present = {_key(item): item["metadata"]["uid"] for item in items}
        for item in items:
            key, newest = _key(item), version_of(item)
            known = self._cache.find_job(key)
            if known is not None and known.uid == item["metadata"]["uid"] and known.version >= newest:
                continue
            raw = await self._client.find(constants.KIND, *key)
            if raw is not None and (wake := self._cache.put_job(raw)) is not None:
                if self.synced.is_set():
                    self._unseen.setdefault(key, (version_of(raw), self._clock()))
                self._on_wakes([wake])
        lost = self._cache.keep_jobs(present, version, namespace=namespace)
        for wake in lost:
            self._unseen.pop(wake.key, None)
        self._on_wakes(lost)


def _key(item: dict[str, Any]) -> Key:
    return (item["metadata"].get("namespace") or "default", item["metadata"]["name"])
