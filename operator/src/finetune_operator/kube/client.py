"""A small REST client over the official package's asynchronous ApiClient: objects as plain JSON.

Called by the other modules of kube/. The typed models of the package are not used: every object here is JSON that the
core parses or made, and turning it into models and back costs time and memory for nothing. Every failure is a
ClusterError.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config

from finetune_operator.api import constants

Raw = dict[str, Any]

REQUEST_TIMEOUT_SECONDS = 30
OUTAGE_RETRY_SECONDS = 3.0
_APPLY = "application/apply-patch+yaml"
_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

_PATHS = {
    constants.KIND: (f"/apis/{constants.API_VERSION}", constants.PLURAL),
    "Job": ("/apis/batch/v1", "jobs"),
    "Pod": ("/api/v1", "pods"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "Service": ("/api/v1", "services"),
    "Secret": ("/api/v1", "secrets"),
    "PersistentVolumeClaim": ("/api/v1", "persistentvolumeclaims"),
    "Event": ("/apis/events.k8s.io/v1", "events"),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases"),
    "ResourceQuota": ("/api/v1", "resourcequotas"),
    "Node": ("/api/v1", "nodes"),
}

OnRequest = Callable[[str, int, float], None]
"""Told of each request: its verb, the answer's code (0: none came), and the seconds until it was there."""


class ClusterError(Exception):
    """The API server refused or did not answer; tried again. `status` is the HTTP status, 0 without an answer."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        self.status = status
        self.reason = reason
        super().__init__(message)

    @property
    def is_outage(self) -> bool:
        """Whether the API server is away, starting or overloaded: nothing is wrong with what was asked."""
        return self.status in (0, 429) or self.status >= 500


def retry_wait(error: Exception, failures: int, *, first: float, longest: float, jitter: float) -> float:
    """Seconds until the next try after so many failures in a row: `first`, doubled each time, up to `longest`.

    While the API server is away it is asked every OUTAGE_RETRY_SECONDS, so that everything goes on soon after it is
    back, however long that took. `jitter`, 0 to 1, lengthens a wait by up to a fifth.
    """
    if isinstance(error, ClusterError) and error.is_outage:
        longest = min(longest, OUTAGE_RETRY_SECONDS)
    return min(longest, first * 2.0 ** min(failures - 1, 20)) * (1 + 0.2 * jitter)


class Client:
    """One connection pool to one API server. Use as an asynchronous context manager."""

    def __init__(self, api: Any, on_request: OnRequest | None = None) -> None:
        self._api = api
        self.on_request = on_request
        self.answered_at: float | None = None
        """When the API server last answered anything, by time.monotonic."""

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._api.close()

    async def find(self, kind: str, namespace: str, name: str) -> Raw | None:
        """The object, or None when there is none."""
        try:
            return await self._call("GET", object_path(kind, namespace, name))
        except ClusterError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, kind: str, namespace: str, label_selector: str = "", *, field_selector: str = "") -> list[Raw]:
        """The objects with these labels as they are now (not as of some cache's past)."""
        query = {"labelSelector": label_selector, "fieldSelector": field_selector}
        answer = await self._call("GET", object_path(kind, namespace), query={k: v for k, v in query.items() if v})
        items: list[Raw] = answer.get("items") or []
        return items

    async def list_metadata(self, path: str) -> tuple[tuple[Raw, ...], int]:
        """(metadata of the objects at a path, resourceVersion of the list)."""
        items: tuple[Raw, ...] = ()
        query: dict[str, str] = {"limit": "1000"}
        while True:
            answer = await self._call("GET", path, query=query, accept=_METADATA_ONLY)
            items += tuple(answer.get("items") or ())
            metadata = answer.get("metadata") or {}
            if not metadata.get("continue"):
                return items, int(metadata.get("resourceVersion") or 0)
            query["continue"] = metadata["continue"]

    async def apply(
        self, manifest: Mapping[str, Any], *, field_manager: str, subresource: str = "", force: bool = False
    ) -> Raw:
        """Server-side apply; the object after it. Without `force`, fields of others that differ are a conflict."""
        metadata = manifest["metadata"]
        path = object_path(manifest["kind"], metadata["namespace"], metadata["name"])
        if subresource:
            path += f"/{subresource}"
        query = {"fieldManager": field_manager, "force": "true" if force else "false"}
        return await self._call("PATCH", path, query=query, body=manifest, content_type=_APPLY)

    async def merge(
        self,
        kind: str,
        namespace: str,
        name: str,
        patch: Mapping[str, Any],
        *,
        field_manager: str,
        subresource: str = "",
    ) -> Raw:
        """A JSON merge patch of an object that is there; the object after it."""
        path = object_path(kind, namespace, name) + (f"/{subresource}" if subresource else "")
        query = {"fieldManager": field_manager}
        return await self._call("PATCH", path, query=query, body=patch, content_type="application/merge-patch+json")

    async def replace(self, manifest: Mapping[str, Any], *, subresource: str = "") -> Raw:
        """Replace the object that the manifest names; ClusterError 409 when its resourceVersion is not the newest."""
        metadata = manifest["metadata"]
        path = object_path(manifest["kind"], metadata["namespace"], metadata["name"])
        return await self._call("PUT", path + (f"/{subresource}" if subresource else ""), body=manifest)

    async def create(self, kind: str, namespace: str, manifest: Mapping[str, Any], *, field_manager: str = "") -> Raw:
        """A new object; ClusterError 409 when the name is taken."""
        query = {"fieldManager": field_manager} if field_manager else None
        return await self._call("POST", object_path(kind, namespace), query=query, body=manifest)

    async def read(self, path: str, query: Mapping[str, str] | None = None) -> Raw:
        """What lies at a path that is no object of ours, such as a group's list of kinds."""
        return await self._call("GET", path, query=query)

    async def read_text(self, path: str, query: Mapping[str, str]) -> str:
        """What lies at a path as text, such as a pod's log."""
        status, text = await self._send("GET", path, query=query)
        if not 200 <= status <= 299:
            raise ClusterError(status, "", f"GET {path}: {status}: {text[:500].decode(errors='replace')}")
        return text.decode(errors="replace")

    async def post(self, path: str, body: Mapping[str, Any]) -> Raw:
        """A new object at a path, such as a TokenReview; the answer."""
        return await self._call("POST", path, body=body)

    async def delete_at(self, path: str) -> None:
        """Delete what lies at a path, in the background."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        await self._call("DELETE", path, body=body)

    async def apply_at(self, path: str, manifest: Mapping[str, Any], *, field_manager: str) -> Raw:
        """Server-side apply to a path, taking the fields over; the object after it."""
        query = {"fieldManager": field_manager, "force": "true"}
        return await self._call("PATCH", path, query=query, body=manifest, content_type=_APPLY)

    async def watch(self, path: str, query: Mapping[str, str], *, silence_seconds: float) -> AsyncIterator[Raw]:
        """The events of a watch, until the server ends it.

        ClusterError when it cannot be begun, breaks, or says nothing (not even a bookmark) for `silence_seconds`.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=REQUEST_TIMEOUT_SECONDS, sock_read=silence_seconds)
        try:
            response = await self._open("GET", path, {**query, "watch": "true"}, None, "application/json", timeout)
            async with response:
                if response.status != 200:
                    text = (await response.read())[:500].decode(errors="replace")
                    raise ClusterError(response.status, "", f"watch {path}: {response.status}: {text}")
                async for line in response.content:
                    event = _parse(line)
                    if event is None:
                        raise ClusterError(0, "NoAnswer", f"watch {path}: a line that is no JSON object")
                    yield event
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            raise ClusterError(0, "NoAnswer", f"watch {path}: {error!r}") from error

    async def delete(
        self, kind: str, namespace: str, name: str, *, uid: str | None = None, grace_seconds: int | None = None
    ) -> None:
        """Delete in the background: dependents follow, with their grace period. An object that is gone is no error."""
        body: Raw = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        try:
            await self._call("DELETE", object_path(kind, namespace, name), body=body)
        except ClusterError as error:
            if error.status != 404:
                raise

    async def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Raw:
        status, text = await self._send(method, path, query=query, body=body, content_type=content_type, accept=accept)
        value = _parse(text)
        if not 200 <= status <= 299:
            words = (value or {}).get("message") or text[:500].decode(errors="replace")
            raise ClusterError(status, (value or {}).get("reason") or "", f"{method} {path}: {status}: {words}")
        if value is None:
            # Taken for an empty list it would say that a job has no children.
            raise ClusterError(0, "NoAnswer", f"{method} {path}: {status} with something else than a JSON object")
        return value

    async def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> tuple[int, bytes]:
        begun = time.monotonic()
        status = 0
        try:
            response = await self._open(method, path, query, body, content_type, REQUEST_TIMEOUT_SECONDS, accept=accept)
            async with response:
                text = await response.read()
                status = int(response.status)
            self.answered_at = time.monotonic()
            return status, text
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise ClusterError(0, "NoAnswer", f"{method} {path}: the API server did not answer: {error!r}") from error
        finally:
            if self.on_request is not None:
                self.on_request(method, status, time.monotonic() - begun)

    async def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Mapping[str, Any] | None,
        content_type: str,
        timeout: Any,
        *,
        accept: str = "application/json",
    ) -> Any:
        # Not call_api: that walks the whole body once more for typed models, and there are none here.
        headers, pairs = {"Accept": accept, "Content-Type": content_type}, list((query or {}).items())
        await self._api.update_params_for_auth(headers, pairs, ["BearerToken"])
        return await self._api.rest_client.request(
            method,
            self._api.configuration.host + path,
            query_params=pairs,
            headers=headers,
            body=body,
            _preload_content=False,
            _request_timeout=timeout,
        )


def _parse(text: bytes) -> Raw | None:
    """The JSON object in `text`, None for anything else (a proxy's page, a cut answer)."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def object_path(kind: str, namespace: str, name: str = "") -> str:
    """URL path of an object, or of a kind's collection in a namespace."""
    group, plural = _PATHS[kind]
    return f"{group}/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")


async def connect(on_request: OnRequest | None = None) -> Client:
    """A client for the cluster that this process runs in, or else for the current context of KUBECONFIG."""
    configuration = kubernetes_client.Configuration()
    if Path("/var/run/secrets/kubernetes.io/serviceaccount/token").exists() and os.environ.get(
        "KUBERNETES_SERVICE_HOST"
    ):
        kubernetes_config.load_incluster_config(client_configuration=configuration)
    else:
        await kubernetes_config.load_kube_config(client_configuration=configuration)
    return Client(kubernetes_client.ApiClient(configuration), on_request)
