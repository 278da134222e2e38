"""Kueue preempts a training that really runs: a checkpoint is written before its pods end, and it goes on from that.

A team's queue has room for one training. Somebody else's Job of higher priority takes it, and later gives it back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import kube
import kueue
import pytest
from kueue import TeamQueue
from reports import report_of
from team import TRAINING, Team, condition, failed, make_sources, stage, succeeded, tiny_job

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

STEP = "finetune-operator.io/last-checkpoint-step"
TIME = "finetune-operator.io/last-checkpoint-time"
STEPS = 1800
EVERY = 500
"""Steps between two checkpoints: more than the training makes between the first one and its preemption. What is left
then keeps a fast machine busy for longer than the preemption takes."""
HALF = {"resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"memory": "3Gi"}}}
STAGES = ["prepare", "train", "consolidate"]


@pytest.fixture
def queue(with_kueue: None, team: Team) -> Iterator[TeamQueue]:
    """The team's queue, with room for one training of two pods and nothing beside it."""
    with kueue.team_queue(team.namespace, cpu="1") as made:
        yield made


def queued_job(team: Team, name: str, **spec: Any) -> dict[str, Any]:
    """A job that trains long enough to be preempted and ends with its adapter; its pods ask for half a CPU each."""
    training = {**TRAINING, "maxSteps": STEPS, "checkpointEverySteps": EVERY, "logEverySteps": 1}
    off = {"enabled": False}
    return tiny_job(
        team,
        name,
        training=training,
        stages=dict.fromkeys(STAGES, HALF),
        merge=off,
        evaluate=off,
        retryPolicy={"maxRetries": 0},
        **spec,
    )


def start_rival(team: Team, queue: TeamQueue) -> None:
    """Somebody else's Job of higher priority that takes the whole queue and waits for a signal."""
    container = {
        "name": "rival",
        "image": team.trainer_image,
        "imagePullPolicy": "Never" if kueue.LOCAL else "IfNotPresent",
        "command": ["python3", "-c", "import signal; signal.pause()"],
        "resources": {"requests": {"cpu": "1", "memory": "64Mi"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    queue.rival("rival", cpu="1", containers=[container])
    queue.wait_for_rival("rival", deadline=120)


def trainings(team: Team, name: str) -> list[dict[str, Any]]:
    """The Jobs of the training's attempts, oldest first."""
    return [job for job in team.k8s_jobs(name) if job["metadata"]["labels"]["finetune-operator.io/stage"] == "train"]


def training_pods(team: Team, name: str) -> list[dict[str, Any]]:
    labels = f"finetune-operator.io/job-name={name},finetune-operator.io/stage=train"
    return kube.items("pods", "-n", team.namespace, "-l", labels)


def checkpoints(team: Team, name: str) -> list[int]:
    """Steps of the whole checkpoints on the workspace, oldest first."""
    pattern = f"finetune/jobs/{team.namespace}/{name}/train-*.work/**/step-*/manifest.json"
    return sorted({int(path.split("/step-")[1].split("/")[0]) for path in team.list_files(pattern)})


def annotated_step(item: dict[str, Any]) -> int:
    return int(item["metadata"].get("annotations", {}).get(STEP, -1))


def preempted(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in job.get("status", {}).get("attempts", []) if each["reason"] == "Preempted"]


def wait_for_first_checkpoint(team: Team, name: str) -> None:
    """Until the schedule's first checkpoint stands on the training's Job and on each of its pods."""
    team.wait(name, lambda job: stage(job, "train").get("state") == "Running", 240, "training to run", unless=failed)

    def is_annotated() -> bool:
        items = [*trainings(team, name), *training_pods(team, name)]
        return len(items) == 3 and all(annotated_step(item) >= EVERY for item in items)

    kube.eventually(is_annotated, deadline=180, reason="the first checkpoint on the training's Job and pods")
    [job] = trainings(team, name)
    assert job["metadata"]["annotations"][TIME].endswith("Z")


def preempt(team: Team, queue: TeamQueue, name: str) -> dict[str, Any]:
    """Let the rival take the quota; the FineTuneJob once it says so and no pod of the training is left."""
    start_rival(team, queue)

    def is_told(job: dict[str, Any]) -> bool:
        return bool(preempted(job)) and condition(job, "QuotaReserved").get("status") == "False"

    job = team.wait(name, is_told, 60, "the preemption to be told", unless=failed)
    kube.eventually(lambda: not training_pods(team, name), deadline=120, reason="the training's pods to end")
    return job


def assert_written_before_the_end(job: dict[str, Any], checkpoint: int) -> None:
    """The newest checkpoint is of the preemption and not of the schedule: nothing that was trained is behind it."""
    assert checkpoint > EVERY
    assert checkpoint >= job["status"]["training"]["step"]


def logged_steps(team: Team, job: dict[str, Any]) -> list[int]:
    path = stage(job, "train")["artifact"]["path"] + "/training.jsonl"
    lines = team.toolbox(f"print(open('/workspace/{path}').read())").splitlines()
    return [json.loads(line)["step"] for line in lines if line]


def resumed_from(team: Team, name: str) -> int:
    return int(report_of(team.k8s_jobs(name), "train")["metrics"]["resumedFromStep"])


def test_a_preempted_training_writes_a_checkpoint_and_goes_on_from_it_in_the_same_job(
    team: Team, queue: TeamQueue
) -> None:
    make_sources(team)
    team.apply(queued_job(team, "preempted", queue=queue.spec()))
    wait_for_first_checkpoint(team, "preempted")
    [before] = trainings(team, "preempted")
    job = preempt(team, queue, "preempted")
    assert job["status"]["phase"] == "Queued"
    assert "Preempted to accommodate a workload" in preempted(job)[0]["message"]
    last = checkpoints(team, "preempted")[-1]
    assert_written_before_the_end(job, last)

    queue.remove_rival("rival")
    job = team.wait("preempted", succeeded, 360, "the job to succeed after it got its quota back", unless=failed)
    [after] = trainings(team, "preempted")
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert resumed_from(team, "preempted") == last
    assert logged_steps(team, job) == list(range(1, STEPS + 1)), "no step is lost and none is done twice"
    assert (len(preempted(job)), len(job["status"]["attempts"]), stage(job, "train")["attempt"]) == (1, 1, 1)
    queue.wait_until_used("0")


def test_a_preempted_pipeline_that_reserves_as_a_whole_goes_on_in_a_new_attempt(team: Team, queue: TeamQueue) -> None:
    make_sources(team)
    team.apply(queued_job(team, "whole", queue=queue.spec(policy="wholePipeline")))
    wait_for_first_checkpoint(team, "whole")
    job = preempt(team, queue, "whole")
    last = checkpoints(team, "whole")[-1]
    assert_written_before_the_end(job, last)
    queue.remove_rival("rival")
    job = team.wait("whole", succeeded, 360, "the job to succeed after it got its quota back", unless=failed)
    assert stage(job, "train")["attempt"] == 2
    assert resumed_from(team, "whole") == last
    assert logged_steps(team, job) == list(range(1, STEPS + 1))
    assert [(each["reason"], each["counted"]) for each in job["status"]["attempts"]] == [("Preempted", False)]
    queue.wait_until_used("0")
