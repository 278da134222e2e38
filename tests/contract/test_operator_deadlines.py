"""What ends an attempt because of time, and the time between two attempts, on a real API server and Job controller."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import kube
import kubelet
import posts
import pytest
from kubelet import NOWHERE, OVERRIDES
from operator_account import Account
from operator_process import OperatorProcess, make_claim
from submitted import condition, events, has_phase, stage, submit, wait_for_job

from finetune_operator.core.records import ANNOTATION_OUTCOME
from finetune_operator.core.times import parse_time

SHORT = {"evaluate": {"enabled": False, "prompts": None}, "merge": {"enabled": False}}
"""spec of a job that ends with consolidate."""
HANG_SECONDS = 3
FIRST_WAIT_SECONDS = 1


@pytest.fixture
def impatient(namespace: str, account: Account, tmp_path: Path, endpoint: dict[str, str]) -> Iterator[OperatorProcess]:
    """An operator that takes a training for hanging after HANG_SECONDS, and waits FIRST_WAIT_SECONDS to try again."""
    make_claim(namespace)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"hang": {"seconds": HANG_SECONDS}}))
    environment = {
        **account.environment,
        **endpoint,
        "FINETUNE_CONFIG_FILE": str(config),
        "FINETUNE_RETRY_FIRST_SECONDS": str(FIRST_WAIT_SECONDS),
    }
    process = OperatorProcess(namespace, tmp_path / "operator.log", **environment)
    process.start()
    yield process
    process.stop()


def test_a_training_that_posts_no_step_any_more_hangs_and_is_begun_again(
    namespace: str, impatient: OperatorProcess, endpoint: dict[str, str], tmp_path: Path
) -> None:
    submit(namespace, retryPolicy={"maxRetries": 1}, **SHORT)
    kubelet.walk(namespace, "prepare")
    pods = kubelet.pods(namespace, "train", 1, 2)
    for pod in pods:
        kubelet.run(namespace, pod)
    wait_for_job(namespace, lambda job: stage(job, "train").get("state") == "Running", reason="training to run")
    with posts.poster(endpoint["FINETUNE_PROGRESS_URL"], namespace, pods[0], tmp_path / "rank-0") as poster:
        poster.post({"step": 5, "totalSteps": 40, "lastCheckpoint": 4})
    job = wait_for_job(
        namespace, lambda job: job.get("status", {}).get("attempts"), reason="the hang to be found", deadline=15
    )
    (attempt,) = job["status"]["attempts"]
    assert (attempt["stage"], attempt["reason"], attempt["counted"]) == ("train", "Hanging", True)
    assert "no step after step 5 for" in attempt["message"]
    assert f"{HANG_SECONDS} are allowed" in attempt["message"]
    assert "node" not in attempt, "of a gang that hangs no single node is to blame"
    assert condition(job, "Healthy")["reason"] == "Hanging"

    kubelet.pods(namespace, "train", 2, 2)
    kubelet.walk(namespace, "train", attempt=2)
    kubelet.walk(namespace, "consolidate")
    job = wait_for_job(namespace, has_phase("Succeeded"), reason="the job to succeed")
    assert [each["lostSteps"] for each in job["status"]["attempts"]] == [1]
    assert condition(job, "Healthy")["status"] == "True"
    (event,) = events(namespace, "HangDetected", 1)
    assert "no step after step 5" in event["note"]


def test_a_stages_own_deadline_costs_a_retry_and_the_waits_between_attempts_grow(
    namespace: str, impatient: OperatorProcess
) -> None:
    """The first attempt of prepare ends at its deadline, the second by running out of memory, the third well."""
    stages = {**OVERRIDES, "prepare": {"nodeSelector": NOWHERE, "activeDeadlineSeconds": 5}}
    submit(namespace, retryPolicy={"maxRetries": 2}, stages=stages, **SHORT)
    (pod,) = kubelet.pods(namespace, "prepare", 1)
    kubelet.run(namespace, pod)
    job = wait_for_job(namespace, lambda job: job.get("status", {}).get("attempts"), reason="the deadline", deadline=20)
    (attempt,) = job["status"]["attempts"]
    assert (attempt["reason"], attempt["counted"]) == ("StageDeadlineExceeded", True)
    assert "stages.prepare.activeDeadlineSeconds" in attempt["message"]

    (pod,) = kubelet.pods(namespace, "prepare", 2)
    kubelet.end(namespace, pod, 137, "", reason="OOMKilled")
    kubelet.walk(namespace, "prepare", attempt=3)
    kubelet.walk(namespace, "train", "consolidate")
    job = wait_for_job(namespace, has_phase("Succeeded"), reason="the job to succeed")
    assert [each["reason"] for each in job["status"]["attempts"]] == ["StageDeadlineExceeded", "OutOfHostMemory"]
    first, second = waits(namespace, "prepare")
    assert FIRST_WAIT_SECONDS <= first <= 1.2 * FIRST_WAIT_SECONDS + 2, "with jitter, and whole seconds rounded"
    assert 2 * FIRST_WAIT_SECONDS <= second <= 1.2 * 2 * FIRST_WAIT_SECONDS + 2


def waits(namespace: str, name: str) -> list[float]:
    """Seconds from the end of each attempt of a stage to the next one's Job."""
    k8s_jobs = kube.items(
        "jobs", "-n", namespace, "-l", kubelet.selector(name), "--sort-by=.metadata.creationTimestamp"
    )
    # The last one's end, a success, stands on the next stage's Job.
    ends = [parse_time(outcome(k8s_job)["finishedAt"]) for k8s_job in k8s_jobs[:-1]]
    begins = [parse_time(k8s_job["metadata"]["creationTimestamp"]) for k8s_job in k8s_jobs]
    return [
        (begin - end) / timedelta(seconds=1)
        for end, begin in zip(ends, begins[1:], strict=True)
        if begin is not None and end is not None
    ]


def outcome(k8s_job: kube.Object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(k8s_job["metadata"]["annotations"][ANNOTATION_OUTCOME])
    return found
