"""Writes: server-side apply of children, records, deletions, the status and events. Called by reconcile.py only."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from finetune_operator.api import constants
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.kube.client import Client, ClusterError, Raw

RECORD_MANAGER = f"{constants.FIELD_MANAGER}-record"
"""Owner of the outcome annotations, apart from the child's other fields."""
STATUS_MANAGER = f"{constants.FIELD_MANAGER}-status"


class ChildRefused(Exception):
    """A child cannot be made now, for a reason that a person should see; looked at again after a while."""

    def __init__(self, reason: constants.Reason, message: str) -> None:
        self.reason = reason
        super().__init__(message)


async def apply_child(client: Client, manifest: Mapping[str, Any], *, job_name: str, job_uid: str) -> None:
    """Create or complete a child of the FineTuneJob; ChildRefused when that cannot be now.

    An object of that name that is not this job's is never touched: server-side apply would take it over, so its owner
    is looked at first.
    """
    kind, metadata = manifest["kind"], manifest["metadata"]
    there = await client.find(kind, metadata["namespace"], metadata["name"])
    if there is not None:
        if _controller(there).get("uid") != job_uid:
            raise ChildRefused(constants.Reason.NAME_CONFLICT, _conflict(job_name, manifest, there))
        if there["metadata"].get("deletionTimestamp"):
            message = f"{kind} {metadata['name']} of an earlier attempt is still being deleted."
            raise ChildRefused(constants.Reason.STARTING, message)
    try:
        await client.apply(manifest, field_manager=constants.FIELD_MANAGER, force=there is not None)
    except ClusterError as error:
        if error.status == 403 and "exceeded quota" in str(error):
            message = f"{kind} {metadata['name']} cannot be created: {error}."
            raise ChildRefused(constants.Reason.QUOTA_EXCEEDED, message) from error
        if error.status in (400, 403, 422):
            # Not the server's trouble: the same manifest is refused each time, so the status has to say it.
            message = (
                f"{kind} {metadata['name']} cannot be created: {error}. Correct spec.stages or the operator's defaults "
                "for the stage, or let the namespace's policies admit it."
            )
            raise ChildRefused(constants.Reason.CHILD_REFUSED, message) from error
        raise


def _controller(there: Raw) -> dict[str, Any]:
    owners = there["metadata"].get("ownerReferences") or []
    return next((owner for owner in owners if owner.get("controller")), {})


def _conflict(job_name: str, manifest: Mapping[str, Any], there: Raw) -> str:
    kind, name, namespace = manifest["kind"], manifest["metadata"]["name"], manifest["metadata"]["namespace"]
    owner = _controller(there)
    if owner.get("kind") == constants.KIND and owner.get("name") == job_name:
        return f"{kind} {name} of a deleted FineTuneJob with this name is still being removed."
    whose = f"it belongs to {owner['kind']} {owner['name']}" if owner else "it has no owner"
    return (
        f"{kind} {name} exists in namespace {namespace} and is not this job's ({whose}): remove it or rename the job."
    )


async def write_record(client: Client, kind: str, namespace: str, name: str, annotations: Mapping[str, str]) -> None:
    """Put an attempt's outcome on its child. A child that is gone meanwhile has nothing to remember."""
    patch = {"metadata": {"annotations": dict(annotations)}}
    try:
        # No apply: that would create the child anew if somebody has just deleted it.
        await client.merge(kind, namespace, name, patch, field_manager=RECORD_MANAGER)
    except ClusterError as error:
        if error.status != 404:
            raise


async def write_status(client: Client, namespace: str, name: str, uid: str, status: FineTuneJobStatus) -> str:
    """The one status write; the object's resourceVersion after it."""
    manifest = {
        "apiVersion": constants.API_VERSION,
        "kind": constants.KIND,
        "metadata": {"name": name, "namespace": namespace, "uid": uid},
        "status": status.as_json(),
    }
    after = await client.apply(manifest, field_manager=STATUS_MANAGER, subresource="status", force=True)
    return str(after["metadata"]["resourceVersion"])


async def post_event(
    client: Client,
    regarding: Mapping[str, Any],
    reason: str,
    message: str,
    *,
    warning: bool,
    now: datetime,
    instance: str,
) -> None:
    """One event of a FineTuneJob."""
    metadata = regarding["metadata"]
    manifest = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"generateName": f"{metadata['name']}-", "namespace": metadata["namespace"]},
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": f"{constants.GROUP}/operator",
        "reportingInstance": instance or constants.FIELD_MANAGER,
        "action": "Reconcile",
        "reason": reason,
        "note": message,
        "type": "Warning" if warning else "Normal",
        "regarding": {
            "apiVersion": constants.API_VERSION,
            "kind": constants.KIND,
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        },
    }
    await client.create("Event", metadata["namespace"], manifest)
