"""The client layer against a mock API server: what is sent, and what the answers become."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import kmock as kmock_library
import pytest
from kubernetes.aio import client as kubernetes_client

from finetune_operator.api.constants import LABEL_STAGE, Reason
from finetune_operator.kube.apply import ChildRefused, create_child, write_record
from finetune_operator.kube.client import Client, ClusterError, object_path
from finetune_operator.kube.observe import (
    WARNINGS_BELIEVED_SECONDS,
    Facts,
    Forbidden,
    check_kind_is_served,
    read_log_tail,
)

Server = kmock_library.RawHandler
pytestmark = pytest.mark.kmock(cls=Server)
UID = "11111111-2222-3333-4444-555555555555"
JOBS = "/apis/batch/v1/namespaces/team-a/jobs"
PATH = f"{JOBS}/tiny-prepare-01234567-1"


@pytest.fixture
async def client(kmock: Server) -> AsyncIterator[Client]:
    configuration = kubernetes_client.Configuration(host=str(kmock.url).rstrip("/"))
    async with Client(kubernetes_client.ApiClient(configuration)) as client:
        yield client


def manifest(**metadata: Any) -> dict[str, Any]:
    name = PATH.rsplit("/", maxsplit=1)[-1]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "namespace": "team-a", **metadata}}


def owned(uid: str = UID, name: str = "tiny", kind: str = "FineTuneJob") -> dict[str, Any]:
    labels = {LABEL_STAGE: "prepare"}
    return manifest(labels=labels, ownerReferences=[{"kind": kind, "name": name, "uid": uid, "controller": True}])


def refusal(code: int, message: str = "no") -> kmock_library.Response:
    return kmock_library.Response(status=code, payload={"kind": "Status", "reason": "Why", "message": message})


async def test_an_object_that_is_not_there_is_none(kmock: Server, client: Client) -> None:
    kmock[f"get {PATH}"] << refusal(404)
    assert await client.find("Job", "team-a", "tiny-prepare-01234567-1") is None


async def test_a_refusal_carries_status_reason_and_words(kmock: Server, client: Client) -> None:
    kmock[f"get {PATH}"] << refusal(403, "not yours")
    with pytest.raises(ClusterError, match="403: not yours") as caught:
        await client.find("Job", "team-a", "tiny-prepare-01234567-1")
    assert (caught.value.status, caught.value.reason) == (403, "Why")


async def test_a_server_that_is_away_is_a_cluster_error() -> None:
    configuration = kubernetes_client.Configuration(host="http://127.0.0.1:1")
    async with Client(kubernetes_client.ApiClient(configuration)) as client:
        with pytest.raises(ClusterError, match="did not answer") as caught:
            await client.find("Job", "team-a", "x")
    assert caught.value.status == 0


def taken() -> kmock_library.Response:
    payload = {"kind": "Status", "reason": "AlreadyExists", "message": "it exists"}
    return kmock_library.Response(status=409, payload=payload)


async def test_a_new_child_is_created_by_our_field_manager(kmock: Server, client: Client) -> None:
    kmock[f"post {JOBS}"] << owned()
    assert await create_child(client, owned(), job_name="tiny", job_uid=UID) == owned()
    (request,) = kmock["post"]
    assert dict(request.params) == {"fieldManager": "finetune-operator"}


async def test_a_child_that_was_created_before_is_found(kmock: Server, client: Client) -> None:
    kmock[f"post {JOBS}"] << taken()
    kmock[f"get {PATH}"] << owned()
    assert await create_child(client, owned(), job_name="tiny", job_uid=UID) == owned()


async def test_a_child_that_is_being_deleted_is_waited_for(kmock: Server, client: Client) -> None:
    going = owned()
    going["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:05Z"
    kmock[f"post {JOBS}"] << taken()
    kmock[f"get {PATH}"] << going
    with pytest.raises(ChildRefused, match="still being deleted"):
        await create_child(client, owned(), job_name="tiny", job_uid=UID)


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
    kmock[f"post {JOBS}"] << taken()
    kmock[f"get {PATH}"] << there
    with pytest.raises(ChildRefused, match=words) as caught:
        await create_child(client, owned(), job_name="tiny", job_uid=UID)
    assert caught.value.reason == Reason.NAME_CONFLICT
    assert len(kmock["patch"]) + len(kmock["put"]) + len(kmock["delete"]) == 0


async def test_a_quota_is_told_as_such(kmock: Server, client: Client) -> None:
    kmock[f"post {JOBS}"] << refusal(403, "exceeded quota: compute, requested: count/jobs.batch=1")
    with pytest.raises(ChildRefused, match="exceeded quota: compute") as caught:
        await create_child(client, owned(), job_name="tiny", job_uid=UID)
    assert caught.value.reason == Reason.QUOTA_EXCEEDED


@pytest.mark.parametrize("code", [400, 403, 422])
async def test_a_manifest_that_is_refused_for_good_is_told_to_people(kmock: Server, client: Client, code: int) -> None:
    kmock[f"post {JOBS}"] << refusal(code, "requests: must be less than or equal to cpu limit of 1")
    with pytest.raises(ChildRefused, match=r"cpu limit of 1.*Correct stages.prepare") as caught:
        await create_child(client, owned(), job_name="tiny", job_uid=UID)
    assert caught.value.reason == Reason.CHILD_REFUSED


async def test_a_servers_trouble_is_not_the_manifests(kmock: Server, client: Client) -> None:
    kmock[f"post {JOBS}"] << refusal(429)
    with pytest.raises(ClusterError, match="429"):
        await create_child(client, owned(), job_name="tiny", job_uid=UID)


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


async def test_deletion_is_in_the_background_and_of_this_very_object(kmock: Server, client: Client) -> None:
    kmock[f"delete {PATH}"] << {}
    await client.delete("Job", "team-a", "tiny-prepare-01234567-1", uid=UID)
    (request,) = kmock["delete"]
    assert request.data["propagationPolicy"] == "Background"
    assert request.data["preconditions"] == {"uid": UID}


async def test_what_is_gone_needs_no_deletion_and_no_record(kmock: Server, client: Client) -> None:
    kmock[f"delete {PATH}"] << refusal(404)
    kmock[f"patch {PATH}"] << refusal(404)
    await client.delete("Job", "team-a", "tiny-prepare-01234567-1")
    await write_record(client, "Job", "team-a", "tiny-prepare-01234567-1", {"a": "b"})


async def test_an_outcome_and_the_stop_of_its_job_are_one_write(kmock: Server, client: Client) -> None:
    kmock[f"patch {PATH}"] << owned()
    await write_record(client, "Job", "team-a", "tiny-prepare-01234567-1", {"a": "b"}, deadline=1)
    (request,) = kmock["patch"]
    assert request.headers["Content-Type"] == "application/merge-patch+json"
    assert request.data == {"metadata": {"annotations": {"a": "b"}}, "spec": {"activeDeadlineSeconds": 1}}


async def test_of_a_secret_only_the_keys_are_kept(kmock: Server, client: Client) -> None:
    kmock["get " + object_path("Secret", "team-a", "hub")] << {"data": {"token": "aGZfc2VjcmV0"}}
    kmock["get " + object_path("Secret", "team-a", "gone")] << refusal(404)
    facts = Facts(client, lambda: 0.0)
    keys = await facts.find_secret_keys("team-a", ["hub", "gone", "hub"])
    assert keys == {"hub": frozenset({"token"}), "gone": None}


async def test_what_was_found_is_believed_for_a_while_and_what_was_missing_is_not(
    kmock: Server, client: Client
) -> None:
    clock = [0.0]
    facts = Facts(client, lambda: clock[0])
    kmock["get " + object_path("PersistentVolumeClaim", "team-a", "gone")] << refusal(404)
    kmock["get " + object_path("PersistentVolumeClaim", "team-a", "there")] << owned()
    assert [await facts.find_claim("team-a", "gone") for _ in range(3)] == [None] * 3
    assert len(kmock["get"]) == 3
    for seconds, asked in ((0, 4), (4, 4), (6, 5)):
        clock[0] = seconds
        assert await facts.find_claim("team-a", "there") == owned()
        assert len(kmock["get"]) == asked


async def test_what_many_ask_for_at_once_is_read_once(kmock: Server, client: Client) -> None:
    facts = Facts(client, lambda: 100.0)
    kmock["get /api/v1/namespaces/team-a/resourcequotas"] << {"items": []}
    assert await asyncio.gather(*(facts.find_quotas("team-a") for _ in range(5))) == [[]] * 5
    assert len(kmock) == 1
    kmock["get " + object_path("PersistentVolumeClaim", "team-a", "broken")] << refusal(500)
    results = await asyncio.gather(*(facts.find_claim("team-a", "broken") for _ in range(3)), return_exceptions=True)
    assert all(isinstance(result, ClusterError) for result in results)
    assert len(kmock) == 2


async def test_healthy_objects_share_one_list_of_the_namespaces_warnings(kmock: Server, client: Client) -> None:
    clock = [0.0]
    facts = Facts(client, lambda: clock[0])
    kmock["get " + object_path("Event", "team-a")] << {"items": []}
    assert [await facts.find_warning("team-a", f"uid-{number}") for number in range(3)] == [None] * 3
    assert [request.params["fieldSelector"] for request in kmock["get"]] == ["type=Warning"]
    clock[0] = WARNINGS_BELIEVED_SECONDS + 1
    assert await facts.find_warning("team-a", UID) is None
    assert len(kmock["get"]) == 2


async def test_the_events_of_a_warned_object_are_read_in_turn(kmock: Server, client: Client) -> None:
    def event(reason: str, kind: str, seconds: int) -> dict[str, Any]:
        metadata = {"name": reason.lower(), "creationTimestamp": f"2026-01-01T00:00:{seconds:02}Z"}
        return {"metadata": metadata, "type": kind, "reason": reason, "note": reason, "regarding": {"uid": UID}}

    facts = Facts(client, lambda: 0.0)
    warning = event("FailedMount", "Warning", 1)

    async def answer(request: kmock_library.Request) -> dict[str, Any]:
        about_one = request.params["fieldSelector"] == f"regarding.uid={UID}"
        return {"items": [warning, event("Pulling", "Normal", 9)] if about_one else [warning]}

    kmock["get " + object_path("Event", "team-a")] << answer
    assert await facts.find_warning("team-a", "another") is None
    assert await facts.find_warning("team-a", UID) is None, "what came after the warning shows that it is over"
    assert len(kmock["get"]) == 2


async def test_what_may_not_be_read_is_not_taken_for_missing(kmock: Server, client: Client) -> None:
    facts = Facts(client, lambda: 0.0)
    kmock["get /apis/x/v1/things/hidden"] << refusal(403)
    kmock["get /apis/x/v1/things/gone"] << refusal(404)
    assert await facts.find_at("/apis/x/v1/things/gone") is None
    with pytest.raises(Forbidden):
        await facts.find_at("/apis/x/v1/things/hidden")


async def test_a_log_that_cannot_be_read_is_no_error(kmock: Server, client: Client) -> None:
    kmock["get " + object_path("Pod", "team-a", "gone") + "/log"] << refusal(404)
    kmock["get " + object_path("Pod", "team-a", "there") + "/log"] << b"one\ntwo\n"
    assert await read_log_tail(client, "team-a", "gone", 20) == ""
    assert await read_log_tail(client, "team-a", "there", 20) == "one\ntwo\n"


async def collect(client: Client, path: str) -> list[dict[str, Any]]:
    return [event async for event in client.watch(path, {}, silence_seconds=5)]


async def test_a_watch_gives_its_events_one_by_one(kmock: Server, client: Client) -> None:
    kmock[f"get {JOBS}"] << b'{"type": "ADDED", "object": {}}\n{"type": "BOOKMARK", "object": {}}\n'
    assert [event["type"] for event in await collect(client, JOBS)] == ["ADDED", "BOOKMARK"]


async def test_a_watch_that_is_refused_or_garbled_is_a_cluster_error(kmock: Server, client: Client) -> None:
    pods = object_path("Pod", "team-a")
    kmock[f"get {JOBS}"] << refusal(410)
    kmock[f"get {pods}"] << b"<html>\n"
    with pytest.raises(ClusterError) as caught:
        await collect(client, JOBS)
    assert caught.value.status == 410
    with pytest.raises(ClusterError, match="no JSON object"):
        await collect(client, pods)
