"""A node that HyperPod takes out of service, and a rank that stands still, under a training that really runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kube
import pytest
from team import (
    TRAINING,
    Team,
    condition,
    failed,
    logged_steps,
    make_sources,
    stage,
    succeeded,
    tiny_job,
    training_metrics,
    training_pods,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

HEALTH = "sagemaker.amazonaws.com/node-health-status"
STEPS = 1500
"""A training of half a minute on two cores, which is disturbed in its first seconds."""
STAND_STILL = """
import glob, os, signal
for path in glob.glob("/tmp/train-*/started-*"):
    os.kill(int(open(path).read()), signal.SIGSTOP)
    print("stopped", path)
"""
"""Run in a training pod: its rank does nothing any more, and does not end either."""


def mark(node: str, health: str | None) -> None:
    """HyperPod's label of its node's health; None takes it away."""
    kube.kubectl("label", "node", node, f"{HEALTH}-" if health is None else f"{HEALTH}={health}", "--overwrite")


@pytest.fixture
def marks_taken_back() -> Iterator[None]:
    """Every node has the label afterwards that it had: where one has it, every training looks for healthy nodes."""

    def marks() -> dict[str, str | None]:
        return {node["metadata"]["name"]: node["metadata"]["labels"].get(HEALTH) for node in kube.items("nodes")}

    before = marks()
    yield
    for node, health in marks().items():
        if node in before and health != before[node]:
            mark(node, before[node])


def events(team: Team, name: str, reason: str) -> list[str]:
    found = kube.items("events.events.k8s.io", "-n", team.namespace)
    return [each["note"] for each in found if each["reason"] == reason and each["regarding"]["name"] == name]


def trains(job: dict[str, Any]) -> bool:
    """A first post of the training has come."""
    return stage(job, "train").get("state") == "Running" and "step" in job["status"].get("training", {})


def test_a_node_that_hyperpod_reboots_costs_no_step_and_no_retry(team: Team, marks_taken_back: None) -> None:
    """Only the checkpoint of the grace period is there to go on from, and only this node."""
    make_sources(team)
    steps = {**TRAINING, "maxSteps": STEPS, "checkpointEverySteps": STEPS, "logEverySteps": 1}
    team.apply(tiny_job(team, "rebooted", training=steps, retryPolicy={"maxRetries": 0}))
    team.wait("rebooted", trains, 240, "training to post", unless=failed)
    [node] = {pod["spec"]["nodeName"] for pod in training_pods(team, "rebooted")}
    mark(node, "UnschedulablePendingReboot")

    job = team.wait(
        "rebooted", lambda job: job.get("status", {}).get("attempts"), 5, "the fault to be noticed", unless=failed
    )
    [attempt] = job["status"]["attempts"]
    assert (attempt["reason"], attempt["node"], attempt["counted"]) == ("NodeFault", node, False)
    assert "HyperPod labelled the node UnschedulablePendingReboot" in attempt["message"]
    assert condition(job, "Healthy")["status"] == "False"

    def waits(job: dict[str, Any]) -> bool:
        return stage(job, "train").get("attempt") == 2 and job["status"]["reason"] == "Unschedulable"

    job = team.wait("rebooted", waits, 30, "the next attempt's pods to wait for a node", unless=failed)
    assert f"HyperPod keeps pods off node {node} (UnschedulablePendingReboot)" in condition(job, "Succeeded")["message"]
    assert condition(job, "Healthy")["status"] == "False", "until training goes on"

    mark(node, "Schedulable")
    job = team.wait("rebooted", succeeded, 240, "the job to succeed", unless=failed)
    [attempt] = job["status"]["attempts"]
    assert attempt["lostSteps"] == 0
    assert attempt["recoverySeconds"] > 0
    assert job["status"]["restarts"] == 1
    metrics = training_metrics(team, "rebooted", 2)
    print(
        f"resumed from step {metrics['resumedFromStep']} of {STEPS}, {metrics['stepSeconds']} s for the rest: {attempt}"
    )
    assert 0 < metrics["resumedFromStep"] < STEPS
    assert logged_steps(team, job) == list(range(1, STEPS + 1)), "no step is lost or done twice"
    assert len(events(team, "rebooted", "NodeFaultDetected")) == 1
    [told] = events(team, "rebooted", "AttemptRestarted")
    assert "0 steps lost" in told


def test_a_rank_that_stands_still_is_found_and_training_goes_on_from_its_checkpoint(team: Team) -> None:
    make_sources(team)
    every = 50
    steps = {**TRAINING, "maxSteps": STEPS, "checkpointEverySteps": every, "logEverySteps": 1}
    team.apply(tiny_job(team, "still", training=steps, stages={"train": {"hangSeconds": 30}}))
    team.wait("still", trains, 240, "training to post", unless=failed)
    checkpoints = f"finetune/jobs/{team.namespace}/still/train-*.work/checkpoints/step-*/manifest.json"
    kube.eventually(lambda: team.list_files(checkpoints), deadline=60, reason="a first checkpoint")
    [_, pod] = training_pods(team, "still")
    told = kube.kubectl(
        "exec", "-i", "-n", team.namespace, pod["metadata"]["name"], "--", "python3", "-", stdin=STAND_STILL
    )
    assert "stopped" in told

    job = team.wait(
        "still", lambda job: job.get("status", {}).get("attempts"), 60, "the hang to be found", unless=failed
    )
    [attempt] = job["status"]["attempts"]
    assert (attempt["stage"], attempt["reason"], attempt["counted"]) == ("train", "Hanging", True)
    assert "30 are allowed" in attempt["message"]
    assert condition(job, "Healthy")["reason"] == "Hanging"

    job = team.wait("still", succeeded, 300, "the job to succeed", unless=failed)
    [attempt] = job["status"]["attempts"]
    metrics = training_metrics(team, "still", 2)
    print(
        f"resumed from step {metrics['resumedFromStep']} of {STEPS}, {metrics['stepSeconds']} s for the rest: {attempt}"
    )
    assert metrics["resumedFromStep"] >= every
    assert metrics["resumedFromStep"] % every == 0
    assert attempt["lostSteps"] < 2 * every
    assert logged_steps(team, job) == list(range(1, STEPS + 1)), "every step is logged once"
    [event] = events(team, "still", "HangDetected")
    assert "no step after step" in event
