"""Nodes that fail under a training, on a real API server, scheduler and node lifecycle controller.

The nodes are the test's own, and it plays their kubelets. Seconds that are asserted are those of the design's promise:
a node's fault is noticed within 5 and the gang is there again within 30.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kube
import kubelet
import posts
import pytest
import worker_nodes
from kubelet import STAGES
from operator_account import Account
from operator_process import OperatorProcess
from submitted import condition, events, has_phase, stage, submit, wait_for_job

from finetune_operator.core.nodes import LABEL_HEALTH, LABEL_INSTANCE_TYPE
from finetune_trainer.contract import ExitCode

NOTICED_SECONDS = 5
GANG_SECONDS = 30
DRAIN_SECONDS = 20
"""Grace of a gang's pods by the operator's default."""


@pytest.fixture
def operator(
    namespace: str, account: Account, tmp_path: Path, endpoint: dict[str, str], request: pytest.FixtureRequest
) -> Iterator[OperatorProcess]:
    """The operator with its progress endpoint; a test's parameter is its configuration file."""
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(getattr(request, "param", {})))
    environment = {**account.environment, **endpoint, "FINETUNE_CONFIG_FILE": str(config)}
    process = OperatorProcess(namespace, tmp_path / "operator.log", **environment)
    process.start()
    yield process
    process.stop()


def wait_for_gang(namespace: str, attempt: int, *, deadline: float = 30) -> list[kube.Object]:
    """The training pods of an attempt, by index, as soon as the scheduler has given each a node; they run then."""

    def bound() -> list[kube.Object]:
        pods = kube.items("pods", "-n", namespace, "-l", kubelet.selector("train", attempt))
        return pods if len(pods) == 2 and all(pod["spec"].get("nodeName") for pod in pods) else []

    found: list[kube.Object] = kube.eventually(
        bound, deadline=deadline, reason=f"two pods of attempt {attempt} with a node each"
    )
    for pod in found:
        kubelet.run(namespace, pod)
    wait_for_job(
        namespace,
        lambda job: (stage(job, "train").get("attempt"), stage(job, "train").get("state")) == (attempt, "Running"),
        reason=f"attempt {attempt} to run",
    )
    return sorted(found, key=lambda pod: str(pod["spec"]["hostname"]))


def nodes_of(pods: list[kube.Object]) -> set[str]:
    return {pod["spec"]["nodeName"] for pod in pods}


def node_affinity(namespace: str, attempt: int) -> dict[str, Any]:
    """What the attempt's Job asks of its nodes."""
    (k8s_job,) = kube.items("jobs", "-n", namespace, "-l", kubelet.selector("train", attempt))
    found: dict[str, Any] = k8s_job["spec"]["template"]["spec"].get("affinity", {}).get("nodeAffinity", {})
    return found


def required(namespace: str, attempt: int) -> dict[str, Any]:
    (term,) = node_affinity(namespace, attempt)["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    return dict(term)


def not_named(*nodes: str) -> list[dict[str, Any]]:
    return [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in sorted(nodes)]


def attempt_of(job: kube.Object, number: int) -> dict[str, Any]:
    attempts = job.get("status", {}).get("attempts", [])
    return next((each for each in attempts if (each["stage"], each["attempt"]) == ("train", number)), {})


def wait_until_noticed(namespace: str, attempt: int) -> dict[str, Any]:
    """The entry of an attempt that a node's fault has ended just now, and that a person is told so."""
    job = wait_for_job(
        namespace, lambda job: attempt_of(job, attempt), reason="the fault to be noticed", deadline=NOTICED_SECONDS
    )
    entry = attempt_of(job, attempt)
    assert stage(job, "train")["state"] == "Retrying"
    assert condition(job, "Healthy")["status"] == "False"
    assert condition(job, "Healthy")["message"] == entry["message"]
    return entry


def write_checkpoints_and_end(namespace: str, pods: list[kube.Object]) -> None:
    """The kubelets' and trainings' part of an orderly end: SIGTERM, a checkpoint, exit code 25."""

    def deleted() -> list[kube.Object]:
        there = kube.get("pods", "-n", namespace, *(pod["metadata"]["name"] for pod in pods))
        found = there["items"] if there["kind"] == "List" else [there]
        return found if all(pod["metadata"].get("deletionTimestamp") for pod in found) else []

    asked = kube.eventually(deleted, deadline=NOTICED_SECONDS, reason="the gang's pods to be asked to stop")
    assert {pod["metadata"]["deletionGracePeriodSeconds"] for pod in asked} == {DRAIN_SECONDS}
    words = kubelet.failure("train", ExitCode.INTERRUPTED, "Interrupted", "the checkpoint is written")
    for pod in pods:
        kubelet.end(namespace, pod, ExitCode.INTERRUPTED, words)
    kubelet.remove(namespace, *pods)


def wait_until_recovered(namespace: str, attempt: int) -> dict[str, Any]:
    job = wait_for_job(
        namespace,
        lambda job: attempt_of(job, attempt).get("recoverySeconds") is not None,
        reason="the recovery to be told",
    )
    assert condition(job, "Healthy")["status"] == "True"
    return attempt_of(job, attempt)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("operator", [{"nodes": {"faultsToAvoid": 1}}], indirect=True, ids=[""])
def test_nodes_that_hyperpod_marks_or_takes_away_cost_no_retry_and_get_no_pod_again(
    namespace: str, operator: OperatorProcess, endpoint: dict[str, str], tmp_path: Path
) -> None:
    """One job through three faults: the label, the taint, the Node deleted. It may not fail once."""
    with worker_nodes.made(namespace, 5, labels={LABEL_HEALTH: "Schedulable"}) as nodes:
        submit(namespace, stages=nodes.overrides(*STAGES), retryPolicy={"maxRetries": 0})
        kubelet.walk(namespace, "prepare")

        def train(attempt: int, step: int, checkpoint: int) -> list[kube.Object]:
            """The gang of an attempt once it has come so far."""
            pods = wait_for_gang(namespace, attempt)
            post(pods[0], attempt, step, checkpoint)
            return pods

        def post(pod: kube.Object, attempt: int, step: int, checkpoint: int) -> None:
            folder = tmp_path / f"attempt-{attempt}-step-{step}"
            with posts.poster(endpoint["FINETUNE_PROGRESS_URL"], namespace, pod, folder) as poster:
                poster.post({"step": step, "totalSteps": 40, "lastCheckpoint": checkpoint})

        def recover(attempt: int, began: float) -> None:
            kubelet.pods(namespace, "train", attempt, 2, deadline=GANG_SECONDS - (time.monotonic() - began))

        faulty: list[str] = []
        details = {"type": "NeuronError", "reason": "NeuronHang", "timestamp": "2026-11-24T10:00:00Z", "message": "nd3"}

        # The label. The pods still run, and write a checkpoint of their last step in their grace period.
        pods = train(1, step=12, checkpoint=10)
        assert required(namespace, 1) == {
            "matchExpressions": [{"key": LABEL_HEALTH, "operator": "In", "values": ["Schedulable"]}]
        }
        faulty.append(pods[1]["spec"]["nodeName"])
        nodes.fault(faulty[0], details)
        began = time.monotonic()
        nodes.label(faulty[0], "UnschedulablePendingReplacement")
        entry = wait_until_noticed(namespace, 1)
        assert (entry["reason"], entry["node"], entry["counted"]) == ("NodeFault", faulty[0], False)
        assert "UnschedulablePendingReplacement" in entry["message"]
        assert "NeuronError/NeuronHang at 2026-11-24T10:00:00Z: nd3" in entry["message"]
        assert "lostSteps" not in entry, "the pods may still write a checkpoint"
        post(pods[0], 1, step=13, checkpoint=13)
        write_checkpoints_and_end(namespace, pods)
        recover(2, began)

        # The taint, on a node of the second attempt. Its pods have no time for a checkpoint.
        pods = train(2, step=22, checkpoint=20)
        assert wait_until_recovered(namespace, 1)["lostSteps"] == 0
        assert required(namespace, 2)["matchFields"] == not_named(*faulty)
        assert not nodes_of(pods) & set(faulty)
        faulty.append(pods[0]["spec"]["nodeName"])
        began = time.monotonic()
        nodes.taint(faulty[1], unhealthy=True)
        entry = wait_until_noticed(namespace, 2)
        assert (entry["reason"], entry["node"], entry["counted"]) == ("NodeFault", faulty[1], False)
        assert "tainted" in entry["message"]
        write_checkpoints_and_end(namespace, pods)
        recover(3, began)

        # The Node goes. Nobody would end its pod; its peer has its grace.
        pods = train(3, step=30, checkpoint=30)
        assert wait_until_recovered(namespace, 2)["lostSteps"] == 2
        assert not nodes_of(pods) & set(faulty)
        nodes.label(faulty[0], "Schedulable")
        nodes.taint(faulty[1], unhealthy=False)
        faulty.append(pods[0]["spec"]["nodeName"])
        began = time.monotonic()
        nodes.delete(faulty[2])
        entry = wait_until_noticed(namespace, 3)
        assert (entry["reason"], entry["node"], entry["counted"]) == ("NodeLost", faulty[2], False)
        write_checkpoints_and_end(namespace, pods[1:])
        recover(4, began)

        # The two that never failed are the only ones that are not avoided, though HyperPod has given the others back.
        assert nodes_of(wait_for_gang(namespace, 4)) == set(nodes.names) - set(faulty)
        assert required(namespace, 4)["matchFields"] == not_named(*faulty)
        assert wait_until_recovered(namespace, 3)["lostSteps"] == 0
        kubelet.walk(namespace, "train", attempt=4)
        kubelet.walk(namespace, "consolidate", "merge", "evaluate")
        job = wait_for_job(namespace, has_phase("Succeeded"), reason="the job to succeed")
        assert job["status"]["restarts"] == 3
        told = events(namespace, "NodeFaultDetected", 3)
        assert [node in event["note"] for node, event in zip(faulty, told, strict=True)] == [True] * 3
        assert "NeuronError/NeuronHang at 2026-11-24T10:00:00Z: nd3" in told[0]["note"]
        assert "2 steps lost" in events(namespace, "AttemptRestarted", 3)[1]["note"]


@pytest.mark.timeout(240)
def test_a_node_whose_kubelet_falls_silent_is_given_up_as_soon_as_kubernetes_says_so(
    namespace: str, operator: OperatorProcess
) -> None:
    """A cluster without HyperPod's labels: no node has to have one, and the lost node is taken last."""
    with worker_nodes.made(namespace, 4) as nodes:
        submit(namespace, stages=nodes.overrides(*STAGES), retryPolicy={"maxRetries": 0})
        kubelet.walk(namespace, "prepare")
        pods = wait_for_gang(namespace, 1)
        assert node_affinity(namespace, 1) == {}
        dead = pods[1]["spec"]["nodeName"]
        nodes.silence(dead)
        kube.wait_for("node", dead, until=is_unknown, deadline=90, reason=f"node {dead} to be given up by Kubernetes")
        began = time.monotonic()
        entry = wait_until_noticed(namespace, 1)
        assert (entry["reason"], entry["node"], entry["counted"]) == ("NodeLost", dead, False)
        assert "does not answer" in entry["message"]
        write_checkpoints_and_end(namespace, pods[:1])
        kubelet.pods(namespace, "train", 2, 2, deadline=GANG_SECONDS - (time.monotonic() - began))
        assert dead not in nodes_of(wait_for_gang(namespace, 2))
        assert node_affinity(namespace, 2) == {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 100, "preference": {"matchFields": not_named(dead)}}
            ]
        }
        (event,) = events(namespace, "NodeFaultDetected", 1)
        assert f"node {dead}" in event["note"]
        kubelet.walk(namespace, "train", attempt=2)
        kubelet.walk(namespace, "consolidate", "merge", "evaluate")
        wait_for_job(namespace, has_phase("Succeeded"), reason="the job to succeed")


def is_unknown(node: kube.Object) -> bool:
    return any(each["type"] == "Ready" and each["status"] == "Unknown" for each in node["status"]["conditions"])


TRAINIUM = {"cpu": "128", "memory": "512Gi", "aws.amazon.com/neurondevice": "16"}
"""A trn1.32xlarge with the device plugin that the HyperPod chart pins, which calls a chip neurondevice."""


@pytest.mark.parametrize("operator", [{"featureGates": {"Neuron": True}}], indirect=True, ids=[""])
def test_devices_are_asked_for_by_the_name_that_the_nodes_give_them(namespace: str, operator: OperatorProcess) -> None:
    kind = "ml.trn1.32xlarge"
    with worker_nodes.made(namespace, 1, labels={LABEL_INSTANCE_TYPE: kind}, room=TRAINIUM) as nodes:
        accelerator = {"type": "neuron", "instanceType": kind, "nodes": 1}
        submit(namespace, accelerator=accelerator, stages=nodes.overrides("prepare", "compile"))
        kubelet.walk(namespace, "prepare")
        (pod,) = kubelet.pods(namespace, "compile", 1)
        limits = pod["spec"]["containers"][0]["resources"]["limits"]
        wanted = {name: count for name, count in limits.items() if "/" in name}
        assert wanted == {"aws.amazon.com/neurondevice": "16"}
        kube.wait_for(
            *("pod", pod["metadata"]["name"], "-n", namespace),
            until=lambda pod: pod["spec"].get("nodeName") == nodes.names[0],
            deadline=10,
            reason="the scheduler to find the devices",
        )
