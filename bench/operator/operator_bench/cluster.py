"""What a run needs in the cluster and takes away again: fake nodes, a namespace with a workspace.

Called by ../bench.py. Everything made carries fake_nodes.LABEL or lies in a namespace with PREFIX, so that a run that
was killed leaves nothing that the next one does not remove.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import fake_nodes
from measures import parse_requests
from raw_api import FINETUNEJOBS, JOBS, Api, ApiError, Object

PREFIX = "bench-operator-"
NAMESPACES = "/api/v1/namespaces"
NODES = "/api/v1/nodes"
VOLUMES = "/api/v1/persistentvolumes"
SETTLE_SECONDS = 3.0
"""After a run, before requests are counted: the Job controller's last writes and events."""


class BenchProblem(Exception):
    """The benchmark cannot be run here; the message says why and what to do."""


async def wait_until(check: Callable[[], Any], what: str, seconds: float) -> None:
    """Ask `check`, a coroutine function, until it is true; BenchProblem after `seconds`."""
    ends = time.monotonic() + seconds
    while not await check():
        if time.monotonic() > ends:
            raise BenchProblem(f"{what} did not happen within {seconds:g} s")
        await asyncio.sleep(0.2)


async def make_nodes(api: Api, count: int) -> None:
    """Fake nodes, ready for pods."""
    for index in range(count):
        await ignoring(409, api.call("POST", NODES, fake_nodes.node(index)))

    async def ready() -> bool:
        listed = await api.call("GET", NODES, query={"labelSelector": fake_nodes.SELECTOR})
        return sum(_is_ready(node) for node in listed["items"]) >= count

    try:
        await wait_until(ready, f"{count} fake nodes becoming ready", 60)
    except BenchProblem as problem:
        how = f"python3 hack/cluster/cluster.py kwok up --stages {fake_nodes.STAGES_FILE}"
        raise BenchProblem(f"{problem}: is KWOK running? `{how}` starts it") from problem


def _is_ready(node: Object) -> bool:
    conditions = node.get("status", {}).get("conditions") or ()
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


async def make_namespace(api: Api, name: str) -> None:
    """A namespace in which the pods of a FineTuneJob start at once."""
    await api.call("POST", NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    volume, claim = fake_nodes.workspace(name)
    await ignoring(409, api.call("POST", VOLUMES, volume))
    claims = f"{NAMESPACES}/{name}/persistentvolumeclaims"
    await api.call("POST", claims, claim)
    await api.call("POST", f"{NAMESPACES}/{name}/serviceaccounts", fake_nodes.publisher(name))

    async def ready() -> bool:
        accounts = await api.call("GET", f"{NAMESPACES}/{name}/serviceaccounts")
        found = {each["metadata"]["name"] for each in accounts["items"]}
        bound = await api.call("GET", f"{claims}/{fake_nodes.CLAIM}")
        return {"default", fake_nodes.PUBLISHER} <= found and bound["status"].get("phase") == "Bound"

    await wait_until(ready, f"namespace {name} getting its service account and its bound claim", 60)


async def remove_namespace(api: Api, name: str) -> None:
    """Delete a namespace with all in it, and wait: what is still being deleted would slow the next run down.

    FineTuneJobs go first, one request for all, so that no operator of the cluster starts their stages anew.
    """
    for path in (FINETUNEJOBS, JOBS):
        query = {"propagationPolicy": "Background"}
        await ignoring(404, api.call("DELETE", path.format(namespace=name), query=query))
    await ignoring(404, api.call("DELETE", f"{NAMESPACES}/{name}"))

    async def gone() -> bool:
        try:
            await api.call("GET", f"{NAMESPACES}/{name}")
        except ApiError as error:
            return error.status == 404
        return False

    await wait_until(gone, f"namespace {name} going away", 1800)
    await ignoring(404, api.call("DELETE", f"{VOLUMES}/fake-{name}"))


async def clean_up(api: Api) -> None:
    """Remove what this or an earlier run has made."""
    listed = await api.call("GET", NAMESPACES)
    names = [each["metadata"]["name"] for each in listed["items"]]
    for name in names:
        if name.startswith(PREFIX):
            await remove_namespace(api, name)
    for path in (VOLUMES, NODES):
        await api.call("DELETE", path, query={"labelSelector": fake_nodes.SELECTOR})


async def count_requests(api: Api) -> Counter[str]:
    """Requests that the API server has answered so far, without the noise."""
    return parse_requests(await api.text("GET", "/metrics"))


async def ignoring(status: int, call: Any) -> None:
    """Await a call for which this HTTP status is no error."""
    try:
        await call
    except ApiError as error:
        if error.status != status:
            raise
