"""Helm upgrades the operator and its leader is killed while a job trains: nothing restarts and nothing runs twice."""

from __future__ import annotations

from typing import Any

import kube
import pytest
from chart_release import Release
from team import STAGES, TRAINING, Team, failed, make_sources, stage, succeeded, tiny_job

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

STEPS = 3000
"""Half a minute of training or more: longer than one upgrade, and what comes after it may meet any stage."""
HAND_OVER_SECONDS = 15.0


def reached(job: dict[str, Any]) -> tuple[int, int]:
    """How far the job is: stages done, and the training's step."""
    status = job.get("status", {})
    done = sum(each["state"] == "Succeeded" for each in status.get("stages", []))
    return done, status.get("training", {}).get("step", 0)


def children(team: Team) -> dict[str, str]:
    """Name by uid of every Job and pod that the job has had so far and that is still there."""
    found = kube.items("jobs,pods", "-n", team.namespace, "-l", "finetune-operator.io/job-name=upgraded")
    return {each["metadata"]["uid"]: each["metadata"]["name"] for each in found}


def wait_until_further(team: Team, than: tuple[int, int], reason: str) -> dict[str, Any]:
    return team.wait("upgraded", lambda job: reached(job) > than, 120, reason, unless=failed)


def test_an_upgrade_and_the_leaders_death_leave_a_training_alone(team: Team, release: Release) -> None:
    make_sources(team)
    training = {**TRAINING, "maxSteps": STEPS, "checkpointEverySteps": 1000}
    team.apply(tiny_job(team, "upgraded", training=training))
    job = team.wait("upgraded", lambda job: reached(job)[1] > 0, 240, "the training's first step", unless=failed)
    made, pods = children(team), release.pods()

    release.upgrade("--set=podAnnotations.round=second")
    assert not set(release.pods().values()) & set(pods.values()), "the upgrade replaced the operator's pod"
    job = wait_until_further(team, reached(team.job("upgraded")), "the new pod to hear of the training")
    assert stage(job, "train")["state"] == "Running", "the training outlasted the upgrade"

    release.upgrade("--set=replicaCount=2")
    pods = release.pods()
    assert len(pods) == 2
    leader = kube.eventually(
        lambda: release.leader() if release.leader() in pods else None,
        deadline=HAND_OVER_SECONDS,
        reason="one of the new pods to lead",
    )
    before = reached(team.job("upgraded"))
    kube.kubectl("delete", "pod", leader, "-n", release.namespace, "--grace-period=0", "--force")
    kube.eventually(
        lambda: release.leader() not in ("", leader), deadline=HAND_OVER_SECONDS, reason="the other pod to lead"
    )
    wait_until_further(team, before, "the other pod to hear of the job")

    job = team.wait("upgraded", succeeded, 240, "the job to succeed", unless=failed)
    assert made.items() <= children(team).items(), "the Jobs and pods of the training are the same"
    assert [
        k8s_job["metadata"]["labels"]["finetune-operator.io/stage"] for k8s_job in team.k8s_jobs("upgraded")
    ] == STAGES
    assert {each["name"]: each["attempt"] for each in job["status"]["stages"]} == dict.fromkeys(STAGES, 1)
    assert (job["status"]["restarts"], job["status"]["attempts"]) == (0, [])
