"""What the operator does when things go wrong or are stopped, on a real API server; the test plays the kubelet."""

from __future__ import annotations

import json
from typing import Any

import kube
import kubelet
import pytest
from kubelet import STAGES
from operator_process import OperatorProcess
from submitted import condition, has_phase, stage, submit, wait_for_job

from finetune_operator.api import constants
from finetune_trainer.contract import ExitCode


def patch_job(namespace: str, spec: dict[str, Any], name: str = "tiny") -> None:
    kube.kubectl("patch", "ftj", name, "-n", namespace, "--type=merge", "-p", json.dumps({"spec": spec}))


def has_reason(reason: str) -> Any:
    return lambda job: job.get("status", {}).get("reason") == reason


def test_a_users_error_fails_the_job_at_once_with_the_stages_words(namespace: str, operator: OperatorProcess) -> None:
    submit(namespace)
    (pod,) = kubelet.pods(namespace, "prepare", 1)
    words = kubelet.failure("prepare", ExitCode.USER_ERROR, "InvalidRecord", "faq.jsonl line 7: no field response")
    kubelet.end(namespace, pod, ExitCode.USER_ERROR, words)
    job = wait_for_job(namespace, has_phase("Failed"), reason="the job to fail")
    assert condition(job, "Succeeded")["status"] == "False"
    assert condition(job, "DataPrepared")["reason"] == "UserError"
    assert "faq.jsonl line 7" in job["status"]["message"]
    assert stage(job, "prepare")["exitCode"] == ExitCode.USER_ERROR
    assert len(kube.items("jobs", "-n", namespace)) == 1


def test_a_pod_that_is_lost_costs_an_attempt_and_no_retry(namespace: str, operator: OperatorProcess) -> None:
    submit(namespace, retryPolicy={"maxRetries": 0})
    kubelet.walk(namespace, "prepare")
    first, second = kubelet.pods(namespace, "train", 1, 2)
    kubelet.run(namespace, first)
    kubelet.end(namespace, second, ExitCode.INTERRUPTED, "")
    wait_for_job(namespace, lambda job: stage(job, "train").get("attempt") == 2, reason="the second attempt")
    kubelet.walk(namespace, "train", attempt=2)
    kubelet.walk(namespace, "consolidate", "merge", "evaluate")
    job = wait_for_job(namespace, has_phase("Succeeded"), reason="the job to succeed")
    assert job["status"]["restarts"] == 1
    (attempt,) = job["status"]["attempts"]
    assert (attempt["reason"], attempt["counted"]) == ("Interrupted", False)


def test_counted_failures_end_in_retries_exhausted(namespace: str, operator: OperatorProcess) -> None:
    submit(namespace, retryPolicy={"maxRetries": 1})
    for attempt in (1, 2):
        (pod,) = kubelet.pods(namespace, "prepare", attempt)
        kubelet.end(namespace, pod, 137, "", reason="OOMKilled")
    job = wait_for_job(namespace, has_phase("Failed"), reason="the job to fail")
    assert job["status"]["reason"] == "RetriesExhausted"
    assert "OutOfHostMemory" in job["status"]["message"]
    assert "stages.prepare.resources.limits.memory" in job["status"]["message"]


def test_exit_0_without_a_report_is_a_failure(namespace: str, operator: OperatorProcess) -> None:
    submit(namespace, retryPolicy={"maxRetries": 0})
    (pod,) = kubelet.pods(namespace, "prepare", 1)
    kubelet.end(namespace, pod, 0, "done!")
    job = wait_for_job(namespace, has_phase("Failed"), reason="the job to fail")
    assert "ReportMissing" in job["status"]["message"]


def test_suspend_stops_the_stage_and_resume_goes_on_with_it(namespace: str, operator: OperatorProcess) -> None:
    submit(namespace)
    kubelet.walk(namespace, "prepare")
    kubelet.pods(namespace, "train", 1, 2)
    patch_job(namespace, {"suspend": True})
    job = wait_for_job(
        namespace, lambda job: condition(job, "Suspended").get("status") == "True", reason="the job to be suspended"
    )
    assert job["status"]["phase"] == "Suspended"
    assert kube.items("pods", "-n", namespace, "-l", kubelet.selector("train")) == []
    patch_job(namespace, {"suspend": False, "evaluate": {"maxNewTokens": 8}})
    kubelet.walk(namespace, "train", attempt=2)
    kubelet.walk(namespace, "consolidate", "merge", "evaluate")
    job = wait_for_job(namespace, has_phase("Succeeded"), reason="the job to succeed")
    assert stage(job, "prepare")["attempt"] == 1
    assert job["status"]["restarts"] == 0


def test_deletion_of_a_running_job_leaves_nothing(namespace: str, operator: OperatorProcess) -> None:
    submit(namespace)
    kubelet.walk(namespace, "prepare")
    kubelet.pods(namespace, "train", 1, 2)
    kube.kubectl("delete", "ftj", "tiny", "-n", namespace, "--wait=true", "--timeout=20s")

    def left() -> list[kube.Object]:
        kinds = "jobs,pods,services"
        return kube.items(kinds, "-n", namespace, "-l", constants.LABEL_JOB_UID)

    kube.eventually(lambda: not left(), deadline=60, reason="the garbage collector to remove every child")


def test_an_object_of_a_childs_name_that_is_not_ours_is_refused(namespace: str, operator: OperatorProcess) -> None:
    submit(namespace)
    (pod,) = kubelet.pods(namespace, "prepare", 1)
    name = pod["metadata"]["labels"]["batch.kubernetes.io/job-name"]
    kube.kubectl("delete", "ftj", "tiny", "-n", namespace)
    kube.eventually(
        lambda: not kube.items("jobs,pods", "-n", namespace, "-l", constants.LABEL_JOB_UID),
        deadline=60,
        reason="the first job's children to go",
    )
    container = {"name": "mine", "image": "example.invalid/mine"}
    kube.apply(
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": name, "namespace": namespace, "labels": {"mine": "yes"}},
            "spec": {"suspend": True, "template": {"spec": {"restartPolicy": "Never", "containers": [container]}}},
        }
    )
    submit(namespace)
    job = wait_for_job(namespace, has_reason("NameConflict"), reason="the conflict to be told")
    assert name in job["status"]["message"]
    (theirs,) = kube.items("jobs", "-n", namespace)
    assert theirs["metadata"]["labels"]["mine"] == "yes"
    assert "ownerReferences" not in theirs["metadata"]
    kube.kubectl("delete", "job", name, "-n", namespace)
    kubelet.pods(namespace, "prepare", 1)


def test_a_deadline_stops_the_job(namespace: str, operator: OperatorProcess) -> None:
    submit(namespace, activeDeadlineSeconds=3)
    job = wait_for_job(namespace, has_phase("Failed"), reason="the deadline")
    assert job["status"]["reason"] == "DeadlineExceeded"
    assert kube.items("pods", "-n", namespace) == []


def test_a_finished_job_is_deleted_when_its_time_is_over(namespace: str, operator: OperatorProcess) -> None:
    submit(namespace, ttlSecondsAfterFinished=1, evaluate={"enabled": False, "prompts": None}, merge={"enabled": False})
    kubelet.walk(namespace, "prepare", "train", "consolidate")
    kube.eventually(lambda: not kube.items("ftj", "-n", namespace), deadline=30, reason="the job's deletion")


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        pytest.param(
            {"accelerator": {"type": "neuron", "instanceType": "ml.trn1.32xlarge", "nodes": 1}},
            "accelerator.type",
            id="Trainium",
        ),
        pytest.param({"publish": {"s3": {"uri": "s3://bucket/model"}}}, "publish", id="publishing"),
    ],
)
def test_what_is_not_available_yet_is_said_and_nothing_starts(
    namespace: str, operator: OperatorProcess, spec: dict[str, Any], field: str
) -> None:
    submit(namespace, **spec)
    job = wait_for_job(namespace, has_reason("FeatureNotAvailable"), reason="the refusal")
    assert condition(job, "Validated")["status"] == "False"
    assert field in condition(job, "Validated")["message"]
    assert kube.items("jobs", "-n", namespace) == []


def test_a_missing_claim_and_a_missing_key_are_waited_for(namespace: str, operator: OperatorProcess) -> None:
    model = {"source": "hf://org/gated", "tokenSecretRef": {"name": "hub", "key": "token"}}
    submit(namespace, model=model)
    job = wait_for_job(namespace, has_reason("SecretMissing"), reason="the missing Secret to be told")
    assert condition(job, "StorageReady")["status"] == "False"
    assert job["status"]["phase"] == "Pending"
    kube.kubectl("create", "secret", "generic", "hub", "-n", namespace, "--from-literal=token=hf_secret")
    (pod,) = kubelet.pods(namespace, "prepare", 1)
    sources = pod["spec"]["volumes"][0]["projected"]["sources"]
    assert {"secret": {"name": "hub", "items": [{"key": "token", "path": "secrets/model-token"}]}} in sources
    assert "hf_secret" not in json.dumps(kube.items("configmaps,ftj,events", "-n", namespace))


def test_pods_that_cannot_start_show_the_schedulers_words(namespace: str, operator: OperatorProcess) -> None:
    """The test's claim has no volume, which the scheduler says first."""
    submit(namespace)
    job = wait_for_job(namespace, has_reason("ClaimNotBound"), reason="the scheduler's words")
    assert "nodes are available" in job["status"]["message"]
    assert stage(job, STAGES[0])["state"] == "Starting"
    assert condition(job, "StorageReady")["status"] == "False"
