"""Faults, injected into real jobs on a real cluster: nothing is lost, nothing runs twice, and the reason is said."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import kube
import pytest
from team import (
    STAGES,
    TRAINING,
    Team,
    condition,
    failed,
    logged_steps,
    make_sources,
    records_text,
    stage,
    succeeded,
    tiny_job,
    training_metrics,
    training_pods,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def stage_names(jobs: list[dict[str, Any]]) -> Counter[str]:
    return Counter(job["metadata"]["labels"]["finetune-operator.io/stage"] for job in jobs)


def operator_restarts(namespace: str) -> int:
    pods = kube.items("pods", "-n", namespace, "-l", "app.kubernetes.io/name=finetune-operator")
    return sum(status["restartCount"] for pod in pods for status in pod["status"].get("containerStatuses", []))


def test_a_killed_training_pod_costs_the_steps_since_the_last_checkpoint(team: Team) -> None:
    """The training takes several times longer than the status may lag behind it (10 s), or the pod's end comes late."""
    make_sources(team)
    steps, every = 3000, 100
    training = {**TRAINING, "maxSteps": steps, "checkpointEverySteps": every, "logEverySteps": 1}
    team.apply(tiny_job(team, "killed", training=training))

    def has_checkpoint(job: dict[str, Any]) -> bool:
        checkpoint = job.get("status", {}).get("training", {}).get("lastCheckpoint") or {}
        return bool(checkpoint.get("step", 0) >= every)

    team.wait("killed", has_checkpoint, 240, "a first checkpoint", unless=failed)
    [_, victim] = training_pods(team, "killed")
    kube.kubectl("delete", "pod", "-n", team.namespace, victim["metadata"]["name"], "--grace-period=0", "--force")

    job = team.wait("killed", succeeded, 360, "the job to succeed after its pod was killed", unless=failed)
    assert stage(job, "train")["attempt"] == 2
    assert job["status"]["restarts"] == 1
    assert stage_names(team.k8s_jobs("killed")) == {**dict.fromkeys(STAGES, 1), "train": 2}
    assert logged_steps(team, job) == list(range(1, steps + 1)), "every step is logged once"
    assert training_metrics(team, "killed", 2)["resumedFromStep"] >= every, (
        "the second attempt went on, it did not begin again"
    )


def test_the_operator_killed_in_every_stage_loses_nothing_and_starts_nothing_twice(
    team: Team, operator_namespace: str
) -> None:
    make_sources(team)
    team.apply(tiny_job(team, "orphan"))
    for name in STAGES:
        team.wait(
            "orphan",
            lambda job, name=name: stage(job, name).get("state") in {"Running", "Succeeded"},
            240,
            f"stage {name} to start",
            unless=failed,
        )
        labels = "app.kubernetes.io/name=finetune-operator"
        kube.kubectl("delete", "pod", "-n", operator_namespace, "-l", labels, "--grace-period=0", "--force")
    job = team.wait("orphan", succeeded, 240, "the job to succeed", unless=failed)
    assert stage_names(team.k8s_jobs("orphan")) == dict.fromkeys(STAGES, 1)
    assert all(stage(job, name)["attempt"] == 1 for name in STAGES)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"training": {**TRAINING, "learningRate": -1}}, ["learningRate"]),
        ({"model": {"source": "ftp://somewhere"}}, ["source"]),
        ({"training": {**TRAINING, "maxStep": 5}}, ["maxStep"]),
    ],
    ids=["a negative learning rate", "an unknown source", "a misspelt field"],
)
def test_the_api_server_refuses_a_wrong_spec(team: Team, spec: dict[str, Any], words: list[str]) -> None:
    job = tiny_job(team, "wrong", **spec)
    told = kube.kubectl("create", "--validate=strict", "-f", "-", stdin=json.dumps(job), check=False)
    assert "created" not in told
    assert all(word in told for word in words)


def test_what_is_not_available_yet_is_said_and_nothing_is_started(team: Team, operator_namespace: str) -> None:
    before = operator_restarts(operator_namespace)
    trainium = {"type": "neuron", "instanceType": "ml.trn1.32xlarge", "nodes": 1}
    team.apply(tiny_job(team, "later", accelerator=trainium, training={**TRAINING, "precision": "bf16"}))
    job = team.wait(
        "later", lambda job: condition(job, "Validated").get("status") == "False", 30, "a Validated condition"
    )
    assert "accelerator.type" in condition(job, "Validated")["message"]
    assert team.k8s_jobs("later") == []
    assert operator_restarts(operator_namespace) == before


def test_a_broken_line_is_named_by_file_line_and_field_and_not_tried_again(team: Team) -> None:
    make_sources(team)
    records = [{"instruction": "a?", "response": "b."} for _ in range(5)] + [{"instruction": "no response"}]
    team.write("sources/broken.jsonl", records_text(records))
    dataset = {"source": "workspace:///sources/broken.jsonl", "format": "dolly", "maxLength": 64}
    team.apply(tiny_job(team, "broken", dataset=dataset))
    job = team.wait("broken", failed, 120, "the job to fail")
    told = condition(job, "Succeeded")["message"]
    assert "broken.jsonl" in told
    assert "6" in told
    assert "response" in told
    assert stage(job, "prepare")["state"] == "Failed"
    assert stage_names(team.k8s_jobs("broken")) == {"prepare": 1}


def test_a_truncated_shard_is_named_and_refused(team: Team) -> None:
    """Consolidate is held back by a node selector, so that the shard can be cut before it is read."""
    make_sources(team)
    hold = {"finetune-operator.io/e2e-hold": team.namespace}
    team.apply(tiny_job(team, "cut", stages={"consolidate": {"nodeSelector": hold}}))
    job = team.wait(
        "cut", lambda job: stage(job, "train").get("state") == "Succeeded", 240, "training to end", unless=failed
    )
    [shard] = team.list_files(f"finetune/jobs/{team.namespace}/cut/train-*/checkpoint/rank-00001.safetensors")
    team.toolbox(f"import os; p = '/workspace/{shard}'; os.chmod(p, 0o644); os.truncate(p, os.path.getsize(p) - 64)")
    [node, *_] = stage(job, "train")["nodes"]
    [(key, value)] = hold.items()
    kube.kubectl("label", "node", node, f"{key}={value}", "--overwrite")
    try:
        job = team.wait("cut", failed, 180, "the job to fail")
    finally:
        kube.kubectl("label", "node", node, f"{key}-")
    assert "rank-00001.safetensors" in condition(job, "Succeeded")["message"]
    assert stage(job, "consolidate")["state"] == "Failed"
    assert team.list_files(f"finetune/jobs/{team.namespace}/cut/consolidate-*/manifest.json") == []


def test_deleting_a_running_job_leaves_nothing_in_the_cluster_and_its_files_in_the_workspace(team: Team) -> None:
    make_sources(team)
    team.apply(tiny_job(team, "gone", training={**TRAINING, "maxSteps": 2000}))
    team.wait("gone", lambda job: stage(job, "train").get("state") == "Running", 180, "training to run", unless=failed)
    kube.kubectl("delete", "finetunejob", "gone", "-n", team.namespace, "--timeout=60s")

    def left() -> bool:
        return not kube.items(
            "jobs,pods,configmaps,services", "-n", team.namespace, "-l", "finetune-operator.io/job-name=gone"
        )

    kube.eventually(left, deadline=120, reason="every child of the deleted job to go")
    assert team.list_files(f"finetune/jobs/{team.namespace}/gone/prepare-*/manifest.json")
