"""A job's way through its stages on a real API server with the real Job controller; the test plays the kubelet."""

from __future__ import annotations

import itertools
import json
import threading
import time
from typing import Any

import kube
import kubelet
from kubelet import STAGES
from operator_process import OperatorProcess
from reports import report_of
from submitted import condition, has_phase, stage, submit, wait_for_job

from finetune_operator.api import constants

MEMORY_LIMIT_MB = 200


def test_a_job_walks_all_stages_and_tells_its_story(namespace: str, operator: OperatorProcess) -> None:
    submit(namespace)
    kubelet.walk(namespace, *STAGES)
    job = wait_for_job(namespace, has_phase("Succeeded"), reason="the job to succeed")
    status = job["status"]
    assert [each["state"] for each in status["stages"]] == ["Succeeded"] * 5
    assert status["stage"] == "5/5 evaluate"
    assert status["progress"] == "100%"
    assert status["restarts"] == 0
    assert status["trainableParameters"] == 4096
    assert status["training"]["step"] == 40
    assert status["evaluation"]["prompts"][0]["tuned"] == "A machine."
    assert set(status["artifacts"]) == {"adapter", "model", "evaluation"}
    types = ["Succeeded", "Validated", "StorageReady", "Healthy", "Suspended"]
    types += ["DataPrepared", "Trained", "Consolidated", "Merged", "Evaluated"]
    assert [each["type"] for each in status["conditions"]] == types
    assert {each["observedGeneration"] for each in status["conditions"]} == {job["metadata"]["generation"]}

    for kind in ("jobs", "services"):
        for child in kube.items(kind, "-n", namespace, "-l", constants.LABEL_JOB_UID):
            (owner,) = child["metadata"]["ownerReferences"]
            assert (owner["kind"], owner["uid"]) == ("FineTuneJob", job["metadata"]["uid"])
            assert owner["controller"]
            assert owner["blockOwnerDeletion"]
    services = kube.items("services", "-n", namespace)
    assert len(services) == 1, "only train has more than one pod"
    assert "finalizers" not in job["metadata"]

    def reasons() -> set[str]:
        return {
            event["reason"]
            for event in kube.items("events.events.k8s.io", "-n", namespace)
            if event["regarding"]["kind"] == "FineTuneJob"
        }

    wanted = {"StageStarted", "StageSucceeded", "CheckpointVerified", "EvalPassed"}
    kube.eventually(lambda: reasons() == wanted, deadline=10, reason=f"the events {wanted}")
    peak = operator.peak_memory_mb()
    print(f"operator: peak memory {peak:.0f} MB")
    assert peak < MEMORY_LIMIT_MB


def test_an_operator_killed_in_every_stage_makes_no_second_job(namespace: str, operator: OperatorProcess) -> None:
    submit(namespace)
    for name in STAGES:
        present = kubelet.pods(namespace, name, 1, 2 if name == "train" else 1)
        operator.restart()
        for pod in present:
            kubelet.end(namespace, pod)
    job = wait_for_job(namespace, has_phase("Succeeded"), reason="the job to succeed")
    assert len(kube.items("jobs", "-n", namespace)) == len(STAGES)
    assert job["status"]["restarts"] == 0
    assert job["status"]["attempts"] == []


def test_a_finished_job_is_left_alone_by_a_new_operator(namespace: str, operator: OperatorProcess) -> None:
    submit(namespace, evaluate={"enabled": False, "prompts": None}, merge={"enabled": False})
    kubelet.walk(namespace, "prepare", "train", "consolidate")
    before = wait_for_job(namespace, has_phase("Succeeded"), reason="the job to succeed")
    assert stage(before, "merge")["state"] == "Skipped"
    assert condition(before, "Merged")["reason"] == "Skipped"
    operator.restart()
    submit(namespace, name="other")
    kubelet.pods(namespace, "prepare", 1)
    wait_for_job(namespace, has_phase("Preparing"), reason="the new operator to work", name="other")
    after = kube.get("ftj", "tiny", "-n", namespace)
    assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]


def test_the_next_stage_is_handed_to_within_a_second(
    namespace: str, operator: OperatorProcess, record_property: Any
) -> None:
    """Seconds from the end of a stage's last pod, as written, to the next stage's first pod, as seen."""
    seen: dict[str, float] = {}

    def watch() -> None:
        for pod in kube.watch("pods", "-n", namespace, "-l", constants.LABEL_STAGE, seconds=60):
            seen.setdefault(pod["metadata"]["labels"][constants.LABEL_STAGE], time.monotonic())
            if len(seen) == len(STAGES):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    submit(namespace)
    ended: dict[str, float] = {}
    for name in STAGES:
        for pod in kubelet.pods(namespace, name, 1, 2 if name == "train" else 1):
            message = kubelet.report(namespace, pod)
            ended[name] = time.monotonic()
            kubelet.end(namespace, pod, message=message)
    watcher.join(timeout=30)
    seconds = [seen[after] - ended[before] for before, after in itertools.pairwise(STAGES)]
    record_property("handoff_seconds", seconds)
    print(f"hand-off seconds, kubectl patch included: {[round(each, 3) for each in seconds]}")
    assert sorted(seconds)[len(seconds) // 2] < 1


def test_stage_json_is_what_the_stage_was_promised(namespace: str, operator: OperatorProcess) -> None:
    submit(namespace)
    kubelet.walk(namespace, "prepare")
    (pod, _) = kubelet.pods(namespace, "train", 1, 2)
    name = pod["metadata"]["labels"]["batch.kubernetes.io/job-name"]
    config = json.loads(pod["metadata"]["annotations"][constants.ANNOTATION_STAGE_JSON])
    assert kube.items("configmaps", "-n", namespace, "-l", constants.LABEL_JOB_UID) == [], "a Job has all that it needs"
    assert config["rendezvous"] == f"{name}-0.{name}:29400"
    assert config["parallelism"]["worldSize"] == 2
    assert set(config["inputs"]) == {"model", "prepare"}
    assert pod["spec"]["subdomain"] == name
    assert pod["spec"]["hostname"] in (f"{name}-0", f"{name}-1")
    k8s_jobs = kube.items("jobs", "-n", namespace, "-l", constants.LABEL_JOB_UID)
    stored = report_of(k8s_jobs, "prepare")
    (done,) = (job for job in k8s_jobs if job["metadata"]["labels"][constants.LABEL_STAGE] == "prepare")
    assert constants.ANNOTATION_REPORT not in done["metadata"]["annotations"], "train's Job remembers it"
    assert set(stored["artifacts"]) == {"prepare", "model"}
