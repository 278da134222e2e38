"""The headless Service of a distributed stage: it goes with its attempt, and one that is not ours is left alone."""

from __future__ import annotations

import json
from typing import Any

import kube
import kubelet
from operator_process import OperatorProcess
from submitted import condition, submit, wait_for_job

RATE, OTHER_RATE = 0.001, 0.002
"""The first is that of a job of builders.py."""


def train_with(namespace: str, learning_rate: float) -> None:
    patch = {"spec": {"suspend": False, "training": {"learningRate": learning_rate}}}
    kube.kubectl("patch", "ftj", "tiny", "-n", namespace, "--type=merge", "-p", json.dumps(patch))


def suspend(namespace: str) -> None:
    kube.kubectl("patch", "ftj", "tiny", "-n", namespace, "--type=merge", "-p", '{"spec":{"suspend":true}}')
    wait_for_job(
        namespace, lambda job: condition(job, "Suspended").get("status") == "True", reason="the job to be suspended"
    )


def names(namespace: str, kind: str, *flags: str) -> list[str]:
    return [each["metadata"]["name"] for each in kube.items(kind, "-n", namespace, *flags)]


def trainings(namespace: str) -> list[str]:
    return names(namespace, "jobs", "-l", kubelet.selector("train"))


def wait_for_training(namespace: str, *, other_than: str = "") -> str:
    """Name of the one training that there is."""

    def only() -> Any:
        found = trainings(namespace)
        return found[0] if len(found) == 1 and found[0] != other_than else None

    name: str = kube.eventually(only, deadline=30, reason="one training")
    return name


def test_a_changed_training_takes_its_service_with_it_and_leaves_one_of_its_name_alone(
    namespace: str, operator: OperatorProcess
) -> None:
    submit(namespace)
    kubelet.walk(namespace, "prepare")
    first = wait_for_training(namespace)
    kube.eventually(lambda: names(namespace, "services") == [first], deadline=10, reason="the training's Service")

    suspend(namespace)
    train_with(namespace, OTHER_RATE)
    second = wait_for_training(namespace, other_than=first)
    kube.eventually(
        lambda: names(namespace, "services") == [second], deadline=30, reason="the Service to follow its training"
    )

    suspend(namespace)
    kube.kubectl("create", "service", "clusterip", first, "-n", namespace, "--clusterip=None")
    train_with(namespace, RATE)
    job = wait_for_job(
        namespace, lambda job: job.get("status", {}).get("reason") == "NameConflict", reason="the conflict to be told"
    )
    assert f"Service {first} exists" in job["status"]["message"]
    assert trainings(namespace) == []
    assert kube.get("service", first, "-n", namespace)["metadata"].get("ownerReferences") is None
    kube.kubectl("delete", "service", first, "-n", namespace)
    assert wait_for_training(namespace) == first
