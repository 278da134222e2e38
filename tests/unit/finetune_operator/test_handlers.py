"""What the operator keeps between events, against a mock API server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import kmock as kmock_library
import pytest
from builders import job_body
from kubernetes.aio import client as kubernetes_client
from workloads import reserved, workload

from finetune_operator.api import constants
from finetune_operator.config import OperatorConfig
from finetune_operator.core.settings import Settings
from finetune_operator.handlers import Operator
from finetune_operator.health import ECHO_SECONDS, WatchEchoes
from finetune_operator.kube.client import Client, object_path
from finetune_operator.kube.observe import Facts
from finetune_operator.progress.server import monotonic
from finetune_operator.reconcile import Cluster
from finetune_operator.work_queue import Key, WorkQueue

Server = kmock_library.RawHandler
pytestmark = pytest.mark.kmock(cls=Server)
KEY = ("team-a", "tiny")
JOB = object_path(constants.KIND, *KEY)
EVENTS = object_path("Event", "team-a")


class Clock:
    """The loop's clock, which a test may put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return monotonic() + self.ahead


@pytest.fixture
async def client(kmock: Server) -> AsyncIterator[Client]:
    configuration = kubernetes_client.Configuration(host=str(kmock.url).rstrip("/"))
    async with Client(kubernetes_client.ApiClient(configuration)) as client:
        yield client


def connected(client: Client, **spec: Any) -> Operator:
    """An operator as start() leaves it, without a watch, that knows one job."""
    operator = Operator(OperatorConfig(core=Settings(trainer_image="registry.example/trainer:1")))
    operator._client = client
    operator._cluster = Cluster(client, operator._cache, Facts(client, monotonic))
    operator.job_changed("ADDED", refused_job(**spec))
    return operator


def refused_job(version: str = "1", **spec: Any) -> dict[str, Any]:
    """A job whose one reconcile writes its status and one event."""
    body = job_body(publish={"s3": {"uri": "s3://bucket/model"}}, **spec)
    body["metadata"]["resourceVersion"] = version
    return body


async def look_and_tell(operator: Operator) -> None:
    """One round, and the write of the status that it found."""
    await operator._process(KEY)
    await operator._write_report(KEY)


def wakes_of(operator: Operator) -> list[Key]:
    """Takes the place of the operator's queue; filled with the keys that are woken."""
    woken: list[Key] = []
    operator._queue = WorkQueue(lambda key: woken.append(key))  # type: ignore[arg-type,return-value]
    operator._queue.wake = lambda key, after=0.0: woken.append(key)  # type: ignore[method-assign,misc]
    return woken


async def test_a_job_deleted_right_after_our_write_does_not_look_like_a_dead_watch(
    kmock: Server, client: Client
) -> None:
    clock = Clock()
    operator = connected(client)
    operator._echoes = WatchEchoes(clock)
    kmock[f"patch {JOB}/status"] << refused_job("2")

    async def deleted(_: kmock_library.Request) -> dict[str, Any]:
        operator.job_changed("DELETED", refused_job("3"))
        return {}

    kmock[f"post {EVENTS}"] << deleted
    await look_and_tell(operator)
    await operator._process(KEY)
    clock.ahead += ECHO_SECONDS + 1
    assert operator.problems() == []


async def test_a_refused_job_is_looked_at_again_when_its_time_is_over(kmock: Server, client: Client) -> None:
    operator = connected(client, ttlSecondsAfterFinished=60)
    kmock[f"patch {JOB}/status"] << refused_job("2")
    kmock[f"post {EVENTS}"] << {}
    after = await operator._process(KEY)
    assert after is not None
    assert 58 < after <= 60


async def test_our_own_write_needs_no_answer_and_a_foreign_change_does(kmock: Server, client: Client) -> None:
    operator = connected(client)
    kmock[f"patch {JOB}/status"] << refused_job("2")
    kmock[f"post {EVENTS}"] << {}
    await look_and_tell(operator)
    woken = wakes_of(operator)
    operator.job_changed("MODIFIED", refused_job("2"))
    assert woken == [], "the echo of our own status write"
    operator.job_changed("MODIFIED", refused_job("3"))
    assert woken == [KEY]


async def test_a_status_that_was_overtaken_is_not_written_but_derived_anew(kmock: Server, client: Client) -> None:
    operator = connected(client)
    woken = wakes_of(operator)
    await operator._process(KEY)
    operator.job_changed("MODIFIED", refused_job("2", suspend=True) | {"status": {"phase": "Succeeded"}})
    woken.clear()
    await operator._write_report(KEY)
    assert len(kmock) == 0, "nothing was written"
    assert woken == [KEY]
    assert operator._reports == {}


async def test_only_the_newest_status_is_written_and_none_when_there_is_no_change_left(
    kmock: Server, client: Client
) -> None:
    operator = connected(client)
    kmock[f"patch {JOB}/status"] << refused_job("2")
    kmock[f"post {EVENTS}"] << {}
    await operator._process(KEY)
    first = operator._reports[KEY]
    await operator._process(KEY)
    assert operator._reports[KEY] is not first
    await operator._write_report(KEY)
    await operator._write_report(KEY)
    await operator._process(KEY)
    assert operator._reports == {}
    assert [request.method.value for request in kmock] == ["PATCH", "POST"]


KUEUE = "/apis/kueue.x-k8s.io"
WORKLOADS = f"{KUEUE}/v1beta1/workloads"


def watched(server: Server, *, workloads: list[dict[str, Any]]) -> None:
    """Kueue is served, with these Workloads; watches of them tell nothing."""

    async def answer(request: kmock_library.Request) -> dict[str, Any] | bytes:
        listed = {"metadata": {"resourceVersion": "5"}, "items": workloads}
        return b"" if "watch" in request.params else listed

    server[f"get {KUEUE}"] << {"versions": [{"version": "v1beta1"}]}
    server[f"get {WORKLOADS}"] << answer


async def test_no_job_is_looked_at_before_the_workloads_are_known(kmock: Server, client: Client) -> None:
    operator = connected(client)
    watched(kmock, workloads=[workload(*reserved(0))])
    begin = asyncio.create_task(operator._begin(client))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not begin.done(), "without its Workload a job looks as if it had lost its quota"
    operator._spawn(operator._follow_kueue(client), "kueue")
    await asyncio.wait_for(begin, 5)
    assert operator._cache.kueue_installed
    assert operator._cache.count_children()["Workload"] == 1
    await operator.stop()


async def test_kueue_may_go_and_come_back(kmock: Server, client: Client) -> None:
    operator = connected(client)
    watched(kmock, workloads=[workload(*reserved(0))])
    watches = await operator._meet_kueue("kueue.x-k8s.io/v1beta1")
    operator._forget_kueue(watches)
    assert not operator._cache.kueue_installed
    assert operator._cache.count_children()["Workload"] == 0
    await operator._meet_kueue("kueue.x-k8s.io/v1beta1")
    assert operator._cache.kueue_installed
    assert operator._cache.count_children()["Workload"] == 1
    await operator.stop()
