"""Reads of the API server: a FineTuneJob, its children, what its pods would mount.

Called by reconcile.py, which has the core parse them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from finetune_operator.api import constants
from finetune_operator.kube.client import Client, Raw


@dataclass(frozen=True)
class Children:
    """Everything with one job's label, as the API server's JSON."""

    jobs: list[Raw]
    config_maps: list[Raw]
    services: list[Raw]
    pods: list[Raw]


async def read_job(client: Client, namespace: str, name: str) -> Raw | None:
    """The FineTuneJob as it is now, or None when there is none."""
    return await client.find(constants.KIND, namespace, name)


async def observe_children(client: Client, namespace: str, selector: str) -> Children:
    """The Jobs, ConfigMaps, Services and pods that have the labels of `selector`."""
    kinds = ("Job", "ConfigMap", "Service", "Pod")
    jobs, config_maps, services, pods = await asyncio.gather(
        *(client.list(kind, namespace, selector) for kind in kinds)
    )
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
