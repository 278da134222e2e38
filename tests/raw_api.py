"""The API server as it is, over aiohttp: requests with JSON, and watches that resume by resourceVersion.

For what kubectl is too slow for: benchmarks and tests that make or see thousands of objects. KUBECONFIG names the
cluster, in whatever way it says who one is.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config

Object = dict[str, Any]

JOBS = "/apis/batch/v1/namespaces/{namespace}/jobs"
PODS = "/api/v1/namespaces/{namespace}/pods"
FINETUNEJOBS = "/apis/finetune-operator.io/v1alpha1/namespaces/{namespace}/finetunejobs"

MERGE_PATCH = "application/merge-patch+json"
WATCH_SECONDS = 3600
TOO_MANY_REQUESTS_TRIES = 10


class ApiError(Exception):
    """The API server refused; `status` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


@dataclass(frozen=True)
class Access:
    """Where the API server is and how to be let in. `tls` is None for plain HTTP."""

    server: str
    tls: ssl.SSLContext | None
    headers: Mapping[str, str]


async def read_access(path: str | None = None) -> Access:
    """The current context of the kubeconfig at `path`, or of KUBECONFIG."""
    found = kubernetes_client.Configuration()
    await kubernetes_config.load_kube_config(config_file=path, client_configuration=found)
    tls = None
    if found.host.startswith("https:"):
        tls = ssl.create_default_context(cafile=found.ssl_ca_cert)
        if found.cert_file:
            tls.load_cert_chain(found.cert_file, found.key_file)
    token = found.api_key.get("BearerToken")
    return Access(found.host, tls, {"Authorization": token} if token else {})


class Api:
    """One connection pool to the API server. Use as an asynchronous context manager."""

    def __init__(self, access: Access) -> None:
        self._access = access
        connector = aiohttp.TCPConnector(limit=0, ssl=access.tls or True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        self._session = aiohttp.ClientSession(
            access.server, connector=connector, headers=access.headers, timeout=timeout
        )

    async def __aenter__(self) -> Api:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | bytes | None = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        """The answer's JSON. `body` is JSON, or its bytes. ApiError for what is not 2xx."""
        value: Object = json.loads(await self.text(method, path, body, query=query, content_type=content_type))
        return value

    async def text(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | bytes | None = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> str:
        """The answer as it is. ApiError for what is not 2xx."""
        data = json.dumps(body).encode() if isinstance(body, Mapping) else body
        timeout = aiohttp.ClientTimeout(total=120)
        for patience in range(TOO_MANY_REQUESTS_TRIES, 0, -1):
            async with self._session.request(
                method, path, data=data, params=query, headers={"Content-Type": content_type}, timeout=timeout
            ) as answer:
                text = await answer.text()
                if answer.status == 429 and patience > 1:  # as just after a CRD was made; nothing was done
                    await asyncio.sleep(float(answer.headers.get("Retry-After", 1)))
                    continue
                if not 200 <= answer.status <= 299:
                    raise ApiError(answer.status, f"{method} {path}: {answer.status}: {text[:500]}")
                return text
        raise AssertionError("the last try returns or raises")

    async def watch(
        self, path: str, *, selector: str = "", version: str | None = None
    ) -> AsyncIterator[tuple[str, Object]]:
        """(type, object) of each event, without end. `version` None: what is there comes first, as ADDED.

        A watch that the server ends is begun again where it stopped; one whose version is too old (410) is an ApiError.
        """
        query = {"labelSelector": selector} if selector else {}
        if version is None:
            listed = await self.call("GET", path, query=query)
            version = listed["metadata"]["resourceVersion"]
            for item in listed["items"]:
                yield "ADDED", item
        while True:
            query |= {
                "watch": "true",
                "allowWatchBookmarks": "true",
                "resourceVersion": version,
                "timeoutSeconds": str(WATCH_SECONDS),
            }
            async with self._session.get(path, params=query) as answer:
                if answer.status != 200:
                    raise ApiError(answer.status, f"watch of {path}: {answer.status}: {await answer.text()}")
                async for line in _lines(answer.content):
                    event = json.loads(line)
                    kind, item = event["type"], event["object"]
                    if kind == "ERROR":
                        raise ApiError(item.get("code", 0), f"watch of {path}: {item.get('message')}")
                    version = item["metadata"]["resourceVersion"]
                    if kind != "BOOKMARK":
                        yield kind, item


async def _lines(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Whole lines, of whatever length."""
    rest = bytearray()
    async for chunk in stream.iter_any():
        rest += chunk
        if b"\n" in chunk:
            *whole, last = bytes(rest).split(b"\n")
            for line in whole:
                yield line
            rest = bytearray(last)
