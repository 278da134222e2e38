"""A small REST client over the official package's asynchronous ApiClient: objects as plain JSON.

Called by the other modules of kube/. The typed models of the package are not used: every object here is JSON that the
core parses or made, and turning it into models and back costs time and memory for nothing. Every failure is a
ClusterError.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config

from finetune_operator.api import constants

Raw = dict[str, Any]

REQUEST_TIMEOUT_SECONDS = 30
_APPLY = "application/apply-patch+yaml"

_PATHS = {
    constants.KIND: (f"/apis/{constants.API_VERSION}", constants.PLURAL),
    "Job": ("/apis/batch/v1", "jobs"),
    "Pod": ("/api/v1", "pods"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "Service": ("/api/v1", "services"),
    "Secret": ("/api/v1", "secrets"),
    "PersistentVolumeClaim": ("/api/v1", "persistentvolumeclaims"),
    "Event": ("/apis/events.k8s.io/v1", "events"),
}


class ClusterError(Exception):
    """The API server refused or did not answer; tried again. `status` is the HTTP status, 0 without an answer."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        self.status = status
        self.reason = reason
        super().__init__(message)


class Client:
    """One connection pool to one API server. Use as an asynchronous context manager."""

    def __init__(self, api: Any) -> None:
        self._api = api

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

    async def list(self, kind: str, namespace: str, label_selector: str, *, field_selector: str = "") -> list[Raw]:
        """The objects with these labels as they are now (not as of some cache's past)."""
        query = {"labelSelector": label_selector}
        if field_selector:
            query["fieldSelector"] = field_selector
        answer = await self._call("GET", object_path(kind, namespace), query=query)
        items: list[Raw] = answer.get("items") or []
        return items

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

    async def merge(self, kind: str, namespace: str, name: str, patch: Mapping[str, Any], *, field_manager: str) -> Raw:
        """A JSON merge patch of an object that is there; the object after it."""
        path = object_path(kind, namespace, name)
        query = {"fieldManager": field_manager}
        return await self._call("PATCH", path, query=query, body=patch, content_type="application/merge-patch+json")

    async def create(self, kind: str, namespace: str, manifest: Mapping[str, Any]) -> Raw:
        """A new object; ClusterError 409 when the name is taken."""
        return await self._call("POST", object_path(kind, namespace), body=manifest)

    async def read(self, path: str) -> Raw:
        """What lies at a path that is no object of ours, such as a group's list of kinds."""
        return await self._call("GET", path)

    async def post(self, path: str, body: Mapping[str, Any]) -> Raw:
        """A request object such as a TokenReview; the answer."""
        return await self._call("POST", path, body=body)

    async def delete(self, kind: str, namespace: str, name: str, *, uid: str | None = None) -> None:
        """Delete in the background: dependents follow, with their grace period. An object that is gone is no error."""
        body: Raw = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
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
    ) -> Raw:
        try:
            response = await self._api.call_api(
                path,
                method,
                query_params=list((query or {}).items()),
                header_params={"Accept": "application/json", "Content-Type": content_type},
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _request_timeout=REQUEST_TIMEOUT_SECONDS,
            )
            async with response:
                text = await response.read()
                status = response.status
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise ClusterError(0, "NoAnswer", f"{method} {path}: the API server did not answer: {error!r}") from error
        value = _parse(text)
        if not 200 <= status <= 299:
            words = (value or {}).get("message") or text[:500].decode(errors="replace")
            raise ClusterError(status, (value or {}).get("reason") or "", f"{method} {path}: {status}: {words}")
        if value is None:
            # Taken for an empty list it would say that a job has no children.
            raise ClusterError(0, "NoAnswer", f"{method} {path}: {status} with something else than a JSON object")
        return value


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


async def connect() -> Client:
    """A client for the cluster that this process runs in, or else for the current context of KUBECONFIG."""
    configuration = kubernetes_client.Configuration()
    if Path("/var/run/secrets/kubernetes.io/serviceaccount/token").exists() and os.environ.get(
        "KUBERNETES_SERVICE_HOST"
    ):
        kubernetes_config.load_incluster_config(client_configuration=configuration)
    else:
        await kubernetes_config.load_kube_config(client_configuration=configuration)
    return Client(kubernetes_client.ApiClient(configuration))
