"""Reads of the API server: a FineTuneJob, its children, what its pods would mount.

Called by reconcile.py, which has the core parse them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from finetune_operator.api import constants
from finetune_operator.kube.client import Client, ClusterError, Raw


@dataclass(frozen=True)
class Children:
    """Everything with one job's label, as the API server's JSON."""

    jobs: list[Raw]
    config_maps: list[Raw]
    services: list[Raw]
    pods: list[Raw]


async def check_kind_is_served(client: Client) -> None:
    """ClusterError unless the API server serves FineTuneJobs: a watch of what is not there yet would never begin."""
    path = f"/apis/{constants.API_VERSION}"
    try:
        kinds = (await client.read(path)).get("resources") or []
    except ClusterError as error:
        if error.status != 404:
            raise
        kinds = []
    if not any(kind.get("name") == constants.PLURAL for kind in kinds):
        message = f"the API server does not serve {constants.PLURAL} at {path}: install CRD {constants.CRD_NAME}"
        raise ClusterError(404, "NotFound", message)


async def read_job(client: Client, namespace: str, name: str) -> Raw | None:
    """The FineTuneJob as it is now, or None when there is none."""
    return await client.find(constants.KIND, namespace, name)


async def observe_children(client: Client, namespace: str, selector: str) -> Children:
    """The Jobs, ConfigMaps, Services and pods that have the labels of `selector`."""
    # Jobs before pods: a Job seen complete beside pods as they were earlier would look as if it had lost them.
    jobs = await client.list("Job", namespace, selector)
    kinds = ("ConfigMap", "Service", "Pod")
    config_maps, services, pods = await asyncio.gather(*(client.list(kind, namespace, selector) for kind in kinds))
    return Children(jobs=jobs, config_maps=config_maps, services=services, pods=pods)


async def observe_claim(client: Client, namespace: str, name: str) -> str | None:
    """Phase of a PersistentVolumeClaim, None when it does not exist."""
    claim = await client.find("PersistentVolumeClaim", namespace, name)
    return None if claim is None else str((claim.get("status") or {}).get("phase") or "Pending")


async def observe_secret_keys(client: Client, namespace: str, names: Iterable[str]) -> dict[str, frozenset[str] | None]:
    """The keys of each Secret, None for one that does not exist. No value is kept."""
    wanted = sorted(set(names))
    secrets = await asyncio.gather(*(client.find("Secret", namespace, name) for name in wanted))
    return {
        name: None if secret is None else frozenset(secret.get("data") or {})
        for name, secret in zip(wanted, secrets, strict=True)
    }
