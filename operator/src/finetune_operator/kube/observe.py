"""Reads of the API server that no watch answers: what pods would mount, quotas, queues, events, a pod's last log lines.

Called by reconcile.py, which has the core parse them. What was found is believed for a few seconds, so that a thousand
jobs of one namespace do not ask for one claim a thousand times; what was missing is asked for anew each time.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, TypeVar

from finetune_operator.api import constants
from finetune_operator.core.observed import Note
from finetune_operator.core.silence import find_warned, newest_warning
from finetune_operator.kube.client import Client, ClusterError, Raw, object_path

T = TypeVar("T")

BELIEVED_SECONDS = 5.0
WARNINGS_BELIEVED_SECONDS = 10.0
"""Shorter than what lies between two looks of one job (core.silence.LOOK_AGAIN_SECONDS)."""
MOST_BELIEVED = 10_000
LOG_LIMIT_BYTES = 16384


async def check_kind_is_served(client: Client) -> None:
    """ClusterError unless the API server serves FineTuneJobs: a watch of what is not there yet would never begin."""
    path = f"/apis/{constants.API_VERSION}"
    kinds = (await read_if_served(client, path) or {}).get("resources") or []
    if not any(kind.get("name") == constants.PLURAL for kind in kinds):
        message = f"the API server does not serve {constants.PLURAL} at {path}: install CRD {constants.CRD_NAME}"
        raise ClusterError(404, "NotFound", message)


async def read_if_served(client: Client, path: str) -> Raw | None:
    """What lies at a path, such as a group's versions; None where there is nothing."""
    try:
        return await client.read(path)
    except ClusterError as error:
        if error.status == 404:
            return None
        raise


async def delete_at(client: Client, path: str) -> None:
    """Delete the object at a path; one that is gone is no error."""
    try:
        await client.delete_at(path)
    except ClusterError as error:
        if error.status != 404:
            raise


async def list_children(client: Client, kind: str, namespace: str, selector: str) -> tuple[list[Raw], int]:
    """(one kind of a FineTuneJob's children as they are now, past every cache; resourceVersion of the list)."""
    answer = await client.read(object_path(kind, namespace), {"labelSelector": selector})
    return answer.get("items") or [], int((answer.get("metadata") or {}).get("resourceVersion") or 0)


async def read_log_tail(client: Client, namespace: str, pod: str, lines: int) -> str:
    """The last lines of the stage's container in a pod; "" where there is no log any more or it may not be read."""
    query = {"container": constants.CONTAINER_NAME, "tailLines": str(lines), "limitBytes": str(LOG_LIMIT_BYTES)}
    try:
        return await client.read_text(f"{object_path('Pod', namespace, pod)}/log", query)
    except ClusterError:
        return ""  # evidence is welcome, but nothing may fail for want of it


async def read_secret_values(client: Client, namespace: str, references: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """The values of (Secret, key) pairs that exist: what a log must not show."""
    values = []
    for name, key in references:
        secret = await client.find("Secret", namespace, name)
        encoded = ((secret or {}).get("data") or {}).get(key)
        if encoded:
            values.append(base64.b64decode(encoded).decode(errors="replace").strip())
    return tuple(value for value in values if value)


class Forbidden(Exception):
    """The operator's roles do not let it read something; whether that is there is not known."""


class Facts:
    """What is looked up before an attempt is begun, or while it does not start. `clock` gives seconds that never go
    back."""

    def __init__(self, client: Client, clock: Callable[[], float]) -> None:
        self._client = client
        self._clock = clock
        self._believed: dict[tuple[str, ...], tuple[float, object]] = {}
        self._reads: dict[tuple[str, ...], asyncio.Task[Any]] = {}
        """Reads under way: whoever asks meanwhile gets their answer."""

    async def find_claim(self, namespace: str, name: str) -> Raw | None:
        """A PersistentVolumeClaim, None when it does not exist."""
        return await self._found(
            ("claim", namespace, name), lambda: self._client.find("PersistentVolumeClaim", namespace, name)
        )

    async def find_secret_keys(self, namespace: str, names: Iterable[str]) -> dict[str, frozenset[str] | None]:
        """The keys of each Secret, None for one that does not exist. No value is kept."""

        async def keys(name: str) -> frozenset[str] | None:
            secret = await self._client.find("Secret", namespace, name)
            return None if secret is None else frozenset(secret.get("data") or {})

        wanted = sorted(set(names))
        found = await asyncio.gather(
            *(self._found(("secret", namespace, name), partial(keys, name)) for name in wanted)
        )
        return dict(zip(wanted, found, strict=True))

    async def find_quotas(self, namespace: str) -> list[Raw]:
        """The ResourceQuotas of a namespace; none where they may not be listed."""

        async def quotas() -> list[Raw]:
            try:
                return await self._client.list("ResourceQuota", namespace)
            except ClusterError as error:
                if error.status == 403:
                    return []
                raise

        return await self._found(("quotas", namespace), quotas) or []

    async def find_warning(self, namespace: str, uid: str) -> Note | None:
        """The newest event about one object if that is a warning; None where events may not be listed.

        The API server keeps no index of events: each list reads all of the namespace. So the warnings of the namespace
        are listed once for everyone who asks, and one object's events only where one of those is about it.
        """
        if uid not in await self._warned(namespace):
            return None

        async def warnings() -> tuple[Note, ...]:
            newest = newest_warning(await self._list_events(namespace, f"regarding.uid={uid}"))
            return () if newest is None else (newest,)

        found = await self._found(("warning", namespace, uid), warnings, WARNINGS_BELIEVED_SECONDS)
        return found[0] if found else None

    async def _warned(self, namespace: str) -> frozenset[str]:
        """Uids of the namespace's objects with a warning that tells of a failure."""

        async def warned() -> frozenset[str]:
            return find_warned(await self._list_events(namespace, "type=Warning"))

        return await self._found(("warned", namespace), warned, WARNINGS_BELIEVED_SECONDS) or frozenset()

    async def _list_events(self, namespace: str, field_selector: str) -> list[Raw]:
        try:
            return await self._client.list("Event", namespace, field_selector=field_selector)
        except ClusterError as error:
            if error.status == 403:
                return []
            raise

    async def find_at(self, path: str) -> Raw | None:
        """An object at a path, such as a ClusterQueue; None where there is none. Forbidden where it may not be read."""

        async def read() -> Raw | None:
            try:
                return await read_if_served(self._client, path)
            except ClusterError as error:
                if error.status == 403:
                    raise Forbidden(str(error)) from error
                raise

        return await self._found(("path", path), read)

    async def _found(
        self,
        key: tuple[str, ...],
        read: Callable[[], Awaitable[T | None]],
        believed_seconds: float = BELIEVED_SECONDS,
    ) -> T | None:
        until, value = self._believed.get(key, (0.0, None))
        if value is not None and self._clock() < until:
            return value  # type: ignore[return-value]
        reading = self._reads.get(key)
        if reading is None:
            reading = self._reads[key] = asyncio.create_task(self._read(key, read, believed_seconds))
            reading.add_done_callback(partial(self._has_read, key))
        found: T | None = await asyncio.shield(reading)
        return found

    async def _read(
        self, key: tuple[str, ...], read: Callable[[], Awaitable[T | None]], believed_seconds: float
    ) -> T | None:
        now = self._clock()
        fresh = await read()
        if len(self._believed) >= MOST_BELIEVED:
            self._believed.clear()
        if fresh is None:
            self._believed.pop(key, None)
        else:
            self._believed[key] = (now + believed_seconds, fresh)
        return fresh

    def _has_read(self, key: tuple[str, ...], reading: asyncio.Task[Any]) -> None:
        del self._reads[key]
        if not reading.cancelled():
            reading.exception()  # looked at: everybody who asked may have been cancelled meanwhile
