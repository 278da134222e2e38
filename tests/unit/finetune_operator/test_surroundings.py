"""What is looked up around a job, against a mock API server: how often, and what its answers and refusals mean."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import kmock as kmock_library
import pytest
from kubernetes.aio import client as kubernetes_client
from simulated import SETTINGS, Simulation

from finetune_operator.core.observed import Observed
from finetune_operator.core.preflight import Findings
from finetune_operator.core.silence import SILENT_SECONDS
from finetune_operator.core.stages import derive_pipeline
from finetune_operator.kube.client import Client, object_path
from finetune_operator.kube.observe import Facts
from finetune_operator.surroundings import check_job, hear_silent, plan_queue

Server = kmock_library.RawHandler
pytestmark = pytest.mark.kmock(cls=Server)
EVENTS = object_path("Event", "team-a")
KUEUE = "kueue.x-k8s.io/v1beta1"
PRIORITY = f"/apis/{KUEUE}/workloadpriorityclasses/urgent"


@pytest.fixture
async def facts(kmock: Server) -> AsyncIterator[Facts]:
    configuration = kubernetes_client.Configuration(host=str(kmock.url).rstrip("/"))
    async with Client(kubernetes_client.ApiClient(configuration)) as client:
        yield Facts(client, lambda: 0.0)


def refusal(code: int) -> kmock_library.Response:
    return kmock_library.Response(status=code, payload={"kind": "Status", "reason": "Why", "message": "no"})


async def hear(facts: Facts, simulation: Simulation, seconds: float) -> Observed:
    now = simulation.now + timedelta(seconds=seconds)
    return await hear_silent(facts, simulation.job, simulation.observe(), now)


async def test_a_job_whose_pods_start_or_whose_scheduler_speaks_costs_no_request(kmock: Server, facts: Facts) -> None:
    simulation = Simulation()
    simulation.settle()
    assert await hear(facts, simulation, 3600) == simulation.observe(), "its pods have no node"
    (pod,) = simulation.pods_of("prepare")
    pod["status"]["containerStatuses"] = [{"name": "stage", "state": {"running": {}}}]
    pod["spec"]["nodeName"] = "node-1"
    assert await hear(facts, simulation, 3600) == simulation.observe()
    assert len(kmock) == 0


async def test_a_job_whose_pods_are_refused_is_asked_about_once_in_a_while_and_told_by_uid(
    kmock: Server, facts: Facts
) -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.pods.clear()
    (job,) = simulation.jobs.values()
    words = 'pods "x" is forbidden: exceeded quota: team'
    uid = job["metadata"]["uid"]
    event = {
        "metadata": {},
        "type": "Warning",
        "reason": "FailedCreate",
        "note": words,
        "regarding": {"uid": uid},
    }
    kmock[f"get {EVENTS}"] << {"items": [event]}
    assert (await hear(facts, simulation, SILENT_SECONDS - 1)).events == {}
    assert len(kmock) == 0
    heard = await hear(facts, simulation, SILENT_SECONDS)
    assert {name: (note.reason, note.message) for name, note in heard.events.items()} == {
        job["metadata"]["name"]: ("FailedCreate", words)
    }
    assert await hear(facts, simulation, SILENT_SECONDS + 1) == heard
    asked = [request.params["fieldSelector"] for request in kmock["get"]]
    assert asked == ["type=Warning", f"regarding.uid={uid}"]
    later = simulation.now + timedelta(seconds=SILENT_SECONDS)
    current = derive_pipeline(simulation.job, heard, SETTINGS, later).current
    assert current is not None
    assert (current.reason, words in current.message) == ("QuotaExceeded", True)
    assert current.wake_at is not None
    assert current.wake_at > later


async def test_events_that_may_not_be_read_or_are_none_are_no_error(kmock: Server, facts: Facts) -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.pods.clear()
    kmock[f"get {EVENTS}"] << refusal(403)
    heard = await hear(facts, simulation, SILENT_SECONDS)
    current = derive_pipeline(simulation.job, heard, SETTINGS, simulation.now + timedelta(seconds=60)).current
    assert current is not None
    assert "kubectl describe job" in current.message


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(refusal(404), ["There is no WorkloadPriorityClass urgent: create it"], id="missing"),
        pytest.param(
            refusal(403),
            ["may not read WorkloadPriorityClass urgent", "queue.clusterQueues", "policy perStage"],
            id="forbidden, as in a namespaced installation",
        ),
    ],
)
async def test_a_priority_class_that_may_not_be_read_is_not_said_to_be_missing(
    kmock: Server, facts: Facts, answer: Any, words: list[str]
) -> None:
    kmock[f"get {PRIORITY}"] << answer
    simulation = Simulation(kueue_installed=True)
    simulation.change(queue={"name": "research", "policy": "wholePipeline", "priorityClass": "urgent"})
    job, observed = simulation.job, simulation.observe()
    pipeline = derive_pipeline(job, observed, SETTINGS, simulation.now)
    plan = await plan_queue(facts, job, observed, pipeline, SETTINGS, KUEUE, simulation.now)
    assert plan.create is None
    assert plan.problem is not None
    assert plan.problem.reason == "QueueUnavailable"
    assert [each for each in words if each not in plan.problem.message] == []


async def test_a_reservation_has_the_value_of_its_priority_class_and_a_dry_run_makes_none(
    kmock: Server, facts: Facts
) -> None:
    kmock[f"get {PRIORITY}"] << {"metadata": {"name": "urgent"}, "value": 7}
    made = []
    for dry_run in (False, True):
        simulation = Simulation(kueue_installed=True)
        simulation.change(
            queue={"name": "research", "policy": "wholePipeline", "priorityClass": "urgent"}, dryRun=dry_run
        )
        job, observed = simulation.job, simulation.observe()
        pipeline = derive_pipeline(job, observed, SETTINGS, simulation.now)
        made.append((await plan_queue(facts, job, observed, pipeline, SETTINGS, KUEUE, simulation.now)).create)
    assert made[0] is not None
    assert (made[0]["spec"]["priority"], made[1]) == (7, None)


MODEL = {
    "hiddenSize": 4096,
    "layers": 32,
    "heads": 32,
    "kvHeads": 8,
    "intermediateSize": 14336,
    "vocabSize": 128256,
    "parameters": 8_030_261_248,
}
"""Far too large for a training pod's default memory."""


def test_a_training_that_is_done_is_not_held_against_a_table_any_more() -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.run_stage("prepare", model=MODEL)
    found = []
    for _ in range(2):
        simulation.settle()
        pipeline, _ = simulation.decide()
        found.append(check_job(simulation.job, pipeline, SETTINGS).findings)
        simulation.run_stage("train")
    assert found[0].refused is not None
    assert found[0].refused.reason == "InvalidSpec"
    assert found[1] == Findings()
