"""What the operator keeps between events, against a mock API server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import kmock as kmock_library
import pytest
from builders import job_body
from kubernetes.aio import client as kubernetes_client

from finetune_operator.api import constants
from finetune_operator.config import OperatorConfig
from finetune_operator.handlers import Operator
from finetune_operator.health import ECHO_SECONDS, WatchEchoes
from finetune_operator.kube.client import Client, object_path
from finetune_operator.progress.server import monotonic

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


def connected(client: Client) -> Operator:
    """An operator as start() leaves it, without a watch."""
    operator = Operator(OperatorConfig(trainer_image="registry.example/trainer:1"))
    operator._client = client
    return operator


def serve_refused_job(kmock: Server, **spec: Any) -> None:
    """A job whose one reconcile writes its status and one event."""
    kmock[f"get {JOB}"] << job_body(publish={"s3": {"uri": "s3://bucket/model"}}, **spec)
    kmock[f"patch {JOB}/status"] << {"metadata": {"resourceVersion": "2"}}


async def test_a_job_deleted_right_after_our_write_does_not_look_like_a_dead_watch(
    kmock: Server, client: Client
) -> None:
    clock = Clock()
    operator = connected(client)
    operator._echoes = WatchEchoes(clock)
    serve_refused_job(kmock)

    async def deleted(_: kmock_library.Request) -> dict[str, Any]:
        operator.job_changed("DELETED", *KEY, "3")
        return {}

    kmock[f"post {EVENTS}"] << deleted
    await operator._process(KEY)
    kmock[f"get {JOB}"] << kmock_library.Response(status=404, payload={"kind": "Status"})
    await operator._process(KEY)
    clock.ahead += ECHO_SECONDS + 1
    assert operator.problems() == []


async def test_a_refused_job_is_looked_at_again_when_its_time_is_over(kmock: Server, client: Client) -> None:
    operator = connected(client)
    serve_refused_job(kmock, ttlSecondsAfterFinished=60)
    kmock[f"post {EVENTS}"] << {}
    after = await operator._process(KEY)
    assert after is not None
    assert 50 < after <= 60
