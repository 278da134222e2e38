"""A coordination.k8s.io/v1 Lease as leader election uses it: its record, and the object that writes it.

Called by leadership.py. Only the shape of the object is here; who may hold it, and when, is decided there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

LEASE_API_VERSION = "coordination.k8s.io/v1"

Raw = dict[str, Any]


@dataclass(frozen=True)
class LeaseRecord:
    """Who holds the lease: the Lease's spec. Times are MicroTime texts of the holder's clock, for people only."""

    holder: str = ""
    """Identity of the holder, empty when it was given up."""
    lease_seconds: int = 1
    """How long a candidate waits after the record's last change before it may take the lease."""
    acquire_time: str = ""
    renew_time: str = ""
    transitions: int = 0
    """How often the lease went to another holder."""


def parse_lease(raw: Mapping[str, Any]) -> LeaseRecord:
    """The record of a Lease. A field that is missing, as in a Lease made by hand, counts as nobody's."""
    spec = raw.get("spec") or {}
    return LeaseRecord(
        holder=spec.get("holderIdentity") or "",
        lease_seconds=spec.get("leaseDurationSeconds") or 1,
        acquire_time=spec.get("acquireTime") or "",
        renew_time=spec.get("renewTime") or "",
        transitions=spec.get("leaseTransitions") or 0,
    )


def lease_manifest(namespace: str, name: str, record: LeaseRecord, there: Mapping[str, Any] | None) -> Raw:
    """The Lease with this record: a new one, or `there` with its metadata kept.

    The resourceVersion of `there` goes along, so that a write over somebody else's is refused with 409.
    """
    spec: Raw = {
        "holderIdentity": record.holder,
        "leaseDurationSeconds": record.lease_seconds,
        "leaseTransitions": record.transitions,
    }
    if record.acquire_time:
        spec["acquireTime"] = record.acquire_time
    if record.renew_time:
        spec["renewTime"] = record.renew_time
    metadata = {"name": name, "namespace": namespace} if there is None else dict(there["metadata"])
    metadata.pop("managedFields", None)
    return {"apiVersion": LEASE_API_VERSION, "kind": "Lease", "metadata": metadata, "spec": spec}


def micro_time(moment: datetime) -> str:
    """metav1.MicroTime: RFC 3339 in UTC with six digits of fraction."""
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
