"""The client layer against a mock API server: what is sent, and what the answers become."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import kmock as kmock_library
import pytest
from kubernetes.aio import client as kubernetes_client

from finetune_operator.api.constants import Reason
from finetune_operator.kube.apply import ChildRefused, apply_child, write_record
from finetune_operator.kube.client import Client, ClusterError, object_path
from finetune_operator.kube.observe import check_kind_is_served, observe_children, observe_secret_keys

Server = kmock_library.RawHandler
pytestmark = pytest.mark.kmock(cls=Server)
UID = "11111111-2222-3333-4444-555555555555"
PATH = "/api/v1/namespaces/team-a/configmaps/tiny-prepare-01234567-1"


@pytest.fixture
async def client(kmock: Server) -> AsyncIterator[Client]:
    configuration = kubernetes_client.Configuration(host=str(kmock.url).rstrip("/"))
    async with Client(kubernetes_client.ApiClient(configuration)) as client:
        yield client


def manifest(**metadata: Any) -> dict[str, Any]:
    name = PATH.rsplit("/", maxsplit=1)[-1]
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "team-a", **metadata}}


def owned(uid: str = UID, name: str = "tiny", kind: str = "FineTuneJob") -> dict[str, Any]:
    return manifest(ownerReferences=[{"kind": kind, "name": name, "uid": uid, "controller": True}])


def refusal(code: int, message: str = "no") -> kmock_library.Response:
    return kmock_library.Response(status=code, payload={"kind": "Status", "reason": "Why", "message": message})


async def test_an_object_that_is_not_there_is_none(kmock: Server, client: Client) -> None:
    kmock[f"get {PATH}"] << refusal(404)
    assert await client.find("ConfigMap", "team-a", "tiny-prepare-01234567-1") is None


async def test_a_refusal_carries_status_reason_and_words(kmock: Server, client: Client) -> None:
    kmock[f"get {PATH}"] << refusal(403, "not yours")
    with pytest.raises(ClusterError, match="403: not yours") as caught:
        await client.find("ConfigMap", "team-a", "tiny-prepare-01234567-1")
    assert (caught.value.status, caught.value.reason) == (403, "Why")


async def test_a_server_that_is_away_is_a_cluster_error() -> None:
    configuration = kubernetes_client.Configuration(host="http://127.0.0.1:1")
    async with Client(kubernetes_client.ApiClient(configuration)) as client:
        with pytest.raises(ClusterError, match="did not answer") as caught:
            await client.find("ConfigMap", "team-a", "x")
    assert caught.value.status == 0


async def test_a_new_child_is_applied_server_side_by_our_field_manager(kmock: Server, client: Client) -> None:
    kmock[f"get {PATH}"] << refusal(404)
    kmock[f"patch {PATH}"] << owned()
    await apply_child(client, owned(), job_name="tiny", job_uid=UID)
    (request,) = kmock["patch"]
    assert request.headers["Content-Type"] == "application/apply-patch+yaml"
    assert dict(request.params) == {"fieldManager": "finetune-operator", "force": "false"}


@pytest.mark.parametrize(
    ("there", "words"),
    [
        pytest.param(manifest(), "it has no owner", id="nobody's"),
        pytest.param(owned("other", "deploy", "Deployment"), "it belongs to Deployment deploy", id="a stranger's"),
        pytest.param(owned("other"), "is still being removed", id="a deleted job's of the same name"),
    ],
)
async def test_an_object_that_is_not_ours_is_never_written(
    kmock: Server, client: Client, there: dict[str, Any], words: str
) -> None:
    kmock[f"get {PATH}"] << there
    with pytest.raises(ChildRefused, match=words) as caught:
        await apply_child(client, owned(), job_name="tiny", job_uid=UID)
    assert caught.value.reason == Reason.NAME_CONFLICT
    assert len(kmock["patch"]) == 0


async def test_a_quota_is_told_as_such(kmock: Server, client: Client) -> None:
    kmock[f"get {PATH}"] << refusal(404)
    kmock[f"patch {PATH}"] << refusal(403, "exceeded quota: compute, requested: count/configmaps=1")
    with pytest.raises(ChildRefused, match="exceeded quota: compute") as caught:
        await apply_child(client, owned(), job_name="tiny", job_uid=UID)
    assert caught.value.reason == Reason.QUOTA_EXCEEDED


@pytest.mark.parametrize("code", [400, 403, 422])
async def test_a_manifest_that_is_refused_for_good_is_told_to_people(kmock: Server, client: Client, code: int) -> None:
    kmock[f"get {PATH}"] << refusal(404)
    kmock[f"patch {PATH}"] << refusal(code, "requests: must be less than or equal to cpu limit of 1")
    with pytest.raises(ChildRefused, match=r"cpu limit of 1.*Correct spec.stages") as caught:
        await apply_child(client, owned(), job_name="tiny", job_uid=UID)
    assert caught.value.reason == Reason.CHILD_REFUSED


async def test_a_servers_trouble_is_not_the_manifests(kmock: Server, client: Client) -> None:
    kmock[f"get {PATH}"] << refusal(404)
    kmock[f"patch {PATH}"] << refusal(429)
    with pytest.raises(ClusterError, match="429"):
        await apply_child(client, owned(), job_name="tiny", job_uid=UID)


async def test_an_answer_that_is_no_json_object_is_no_empty_list(kmock: Server, client: Client) -> None:
    kmock["get " + object_path("Pod", "team-a")] << b"<html>"
    with pytest.raises(ClusterError, match="something else than a JSON object"):
        await client.list("Pod", "team-a", "a=b")


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(refusal(404), id="no such group"),
        pytest.param({"resources": [{"name": "others"}]}, id="another kind of the group"),
    ],
)
async def test_a_missing_crd_is_an_error_with_its_name(kmock: Server, client: Client, answer: Any) -> None:
    kmock["get /apis/finetune-operator.io/v1alpha1"] << answer
    with pytest.raises(ClusterError, match=r"install CRD finetunejobs\.finetune-operator\.io"):
        await check_kind_is_served(client)


async def test_a_crd_that_is_there_is_found(kmock: Server, client: Client) -> None:
    kmock["get /apis/finetune-operator.io/v1alpha1"] << {"resources": [{"name": "finetunejobs"}]}
    await check_kind_is_served(client)


async def test_pods_are_read_after_jobs(kmock: Server, client: Client) -> None:
    asked, too_early = asyncio.Event(), []

    async def jobs(_: kmock_library.Request) -> dict[str, Any]:
        try:
            await asyncio.wait_for(asked.wait(), timeout=0.2)
        except asyncio.TimeoutError:
            return {"items": []}
        too_early.append("Pod")
        return {"items": []}

    async def pods(_: kmock_library.Request) -> dict[str, Any]:
        asked.set()
        return {"items": []}

    for kind in ("ConfigMap", "Service"):
        kmock["get " + object_path(kind, "team-a")] << {"items": []}
    kmock["get " + object_path("Job", "team-a")] << jobs
    kmock["get " + object_path("Pod", "team-a")] << pods
    await observe_children(client, "team-a", "a=b")
    assert asked.is_set()
    assert too_early == []


async def test_deletion_is_in_the_background_and_of_this_very_object(kmock: Server, client: Client) -> None:
    kmock[f"delete {PATH}"] << {}
    await client.delete("ConfigMap", "team-a", "tiny-prepare-01234567-1", uid=UID)
    (request,) = kmock["delete"]
    assert request.data["propagationPolicy"] == "Background"
    assert request.data["preconditions"] == {"uid": UID}


async def test_what_is_gone_needs_no_deletion_and_no_record(kmock: Server, client: Client) -> None:
    kmock[f"delete {PATH}"] << refusal(404)
    kmock[f"patch {PATH}"] << refusal(404)
    await client.delete("ConfigMap", "team-a", "tiny-prepare-01234567-1")
    await write_record(client, "ConfigMap", "team-a", "tiny-prepare-01234567-1", {"a": "b"})


async def test_of_a_secret_only_the_keys_are_kept(kmock: Server, client: Client) -> None:
    kmock["get " + object_path("Secret", "team-a", "hub")] << {"data": {"token": "aGZfc2VjcmV0"}}
    kmock["get " + object_path("Secret", "team-a", "gone")] << refusal(404)
    keys = await observe_secret_keys(client, "team-a", ["hub", "gone", "hub"])
    assert keys == {"hub": frozenset({"token"}), "gone": None}
