"""Operators that a chart has installed in the cluster: they would act on the objects of a benchmark or test too.

Scaled to zero for as long as `paused` lasts, and back afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from raw_api import MERGE_PATCH, Api

SELECTOR = {"labelSelector": "app.kubernetes.io/name=finetune-operator"}
SECONDS = 60.0
"""Longest time that their pods take to go away."""


class OtherOperatorRan(Exception):
    """Somebody installed or scaled an operator meanwhile: what was measured or found beside it says nothing."""


@asynccontextmanager
async def paused(api: Api) -> AsyncIterator[None]:
    """No operator of a chart runs inside; OtherOperatorRan at the end if one may have. TimeoutError if one stays."""
    replicas: dict[str, int] = {}
    try:
        for deployment in (await api.call("GET", "/apis/apps/v1/deployments", query=SELECTOR))["items"]:
            metadata, count = deployment["metadata"], deployment["spec"].get("replicas", 1)
            if count:
                path = f"/apis/apps/v1/namespaces/{metadata['namespace']}/deployments/{metadata['name']}"
                await _scale(api, path, 0)
                replicas[path] = count
        async with asyncio.timeout(SECONDS):
            while (await api.call("GET", "/api/v1/pods", query=SELECTOR))["items"]:
                await asyncio.sleep(0.2)
        before = await _generations(api)
        yield
        if await _generations(api) != before:
            raise OtherOperatorRan("an operator was installed, upgraded or scaled meanwhile: run this again alone")
    finally:
        for path, count in replicas.items():
            await asyncio.shield(_scale(api, path, count))


async def _generations(api: Api) -> dict[str, int]:
    """Uid of each Deployment of an operator, and how often its spec was changed."""
    found = (await api.call("GET", "/apis/apps/v1/deployments", query=SELECTOR))["items"]
    return {deployment["metadata"]["uid"]: deployment["metadata"]["generation"] for deployment in found}


async def _scale(api: Api, path: str, replicas: int) -> None:
    await api.call("PATCH", path, {"spec": {"replicas": replicas}}, content_type=MERGE_PATCH)
