"""Writes: children, records, the status and events. Called by reconcile.py only."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from finetune_operator.api import constants
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.core.failure import judge_refusal
from finetune_operator.kube.client import Client, ClusterError, Raw

RECORD_MANAGER = f"{constants.FIELD_MANAGER}-record"
"""Owner of the outcome annotations, apart from the child's other fields."""
STATUS_MANAGER = f"{constants.FIELD_MANAGER}-status"


class ChildRefused(Exception):
    """A child cannot be made now, for a reason that a person should see; looked at again after a while."""

    def __init__(self, reason: constants.Reason, message: str) -> None:
        self.reason = reason
        super().__init__(message)


async def create_child(client: Client, manifest: Mapping[str, Any], *, job_name: str, job_uid: str) -> Raw:
    """Create a child of the FineTuneJob, or find it created; ChildRefused when that cannot be now.

    Created, not applied: an object of that name that is somebody else's is then never touched, and the API server
    itself refuses a second one, whoever asks.
    """
    kind, metadata = manifest["kind"], manifest["metadata"]
    namespace, name = metadata["namespace"], metadata["name"]
    try:
        return await client.create(kind, namespace, manifest, field_manager=constants.FIELD_MANAGER)
    except ClusterError as error:
        if error.status == 409 and error.reason == "AlreadyExists":
            return await _existing(client, manifest, job_name=job_name, job_uid=job_uid)
        stage = metadata.get("labels", {}).get(constants.LABEL_STAGE, "")
        refusal = judge_refusal(kind, name, stage, error.status, str(error))
        if refusal is None:
            raise
        raise ChildRefused(refusal.reason, refusal.message) from error


async def _existing(client: Client, manifest: Mapping[str, Any], *, job_name: str, job_uid: str) -> Raw:
    kind, metadata = manifest["kind"], manifest["metadata"]
    there = await client.find(kind, metadata["namespace"], metadata["name"])
    if there is None:
        raise ClusterError(409, "Conflict", f"{kind} {metadata['name']} came and went; to be tried again")
    if _controller(there).get("uid") != job_uid:
        raise ChildRefused(constants.Reason.NAME_CONFLICT, _conflict(job_name, manifest, there))
    if there["metadata"].get("deletionTimestamp"):
        message = f"{kind} {metadata['name']} of an earlier attempt is still being deleted."
        raise ChildRefused(constants.Reason.STARTING, message)
    return there


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


async def write_record(
    client: Client, kind: str, namespace: str, name: str, annotations: Mapping[str, str], *, deadline: int | None = None
) -> Raw | None:
    """Put annotations on a child; the child after it, None when it is gone: then it has nothing to remember.

    `deadline` is a Job's new activeDeadlineSeconds: outcome and stop are one write.
    """
    patch: Raw = {"metadata": {"annotations": dict(annotations)}}
    if deadline is not None:
        patch["spec"] = {"activeDeadlineSeconds": deadline}
    try:
        # No apply: that would create the child anew if somebody has just deleted it.
        return await client.merge(kind, namespace, name, patch, field_manager=RECORD_MANAGER)
    except ClusterError as error:
        if error.status == 404:
            return None
        raise


async def write_status(client: Client, namespace: str, name: str, uid: str, status: FineTuneJobStatus) -> Raw:
    """The one status write; the object after it."""
    manifest = {
        "apiVersion": constants.API_VERSION,
        "kind": constants.KIND,
        "metadata": {"name": name, "namespace": namespace, "uid": uid},
        "status": status.as_json(),
    }
    return await client.apply(manifest, field_manager=STATUS_MANAGER, subresource="status", force=True)


async def post_event(
    client: Client,
    regarding: Mapping[str, str],
    reason: str,
    message: str,
    *,
    warning: bool,
    now: datetime,
    instance: str,
) -> None:
    """One event of a FineTuneJob; `regarding` has its namespace, name and uid."""
    manifest = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"generateName": f"{regarding['name']}-", "namespace": regarding["namespace"]},
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": f"{constants.GROUP}/operator",
        "reportingInstance": instance or constants.FIELD_MANAGER,
        "action": "Reconcile",
        "reason": reason,
        "note": message,
        "type": "Warning" if warning else "Normal",
        "regarding": {"apiVersion": constants.API_VERSION, "kind": constants.KIND, **regarding},
    }
    await client.create("Event", regarding["namespace"], manifest)
