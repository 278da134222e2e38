"""The failure doctor's table: what each end of an attempt's pods means."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from finetune_operator.api.constants import Reason
from finetune_operator.core.failure import derive_outcome, find_waiting
from finetune_operator.core.observed import Attempt, Note, Pod, StageJob, Terminated
from finetune_operator.core.records import Outcome, Result, find_outcome, outcome_annotations
from finetune_trainer import contract
from finetune_trainer.contract import ExitCode, Report

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


def ended(code: int, message: str = "", reason: str = "", *, after: int = 0, signal: int | None = None) -> Terminated:
    return Terminated(code, reason, message, signal, AT + timedelta(seconds=after))


def failed_pod(code: int, message: str = "", reason: str = "", *, index: int = 0, after: int = 0, **more: Any) -> Pod:
    terminated = ended(code, message, reason, after=after)
    return Pod(f"tiny-train-0-{index}", index, "Failed", node="node-1", terminated=terminated, **more)


def attempt(*pods: Pod, stage: str = "train", completions: int = 2, **job: Any) -> Attempt:
    stage_job = StageJob("tiny-train-01234567-1", completions=completions, **job)
    return Attempt(stage, "0123456789abcdef", 1, name=stage_job.name, job=stage_job, pods=pods)


def report(code: int, reason: str = "", message: str = "") -> str:
    return contract.encode_report(Report("train", code, reason=reason, message=message)).decode()


CASES = [
    pytest.param(
        (failed_pod(ExitCode.USER_ERROR, report(20, "InvalidRecord", "line 7")),),
        (Result.FAIL, Reason.USER_ERROR, False, "InvalidRecord: line 7"),
        id="an error of the user fails at once and has the stage's words",
    ),
    pytest.param(
        (failed_pod(ExitCode.RETRYABLE),),
        (Result.RETRY, Reason.RETRYABLE_ERROR, True, "code 21"),
        id="a fault outside is tried again and counted",
    ),
    pytest.param(
        (failed_pod(ExitCode.OUT_OF_DEVICE_MEMORY),),
        (Result.FAIL, Reason.OUT_OF_DEVICE_MEMORY, False, "microBatchSize"),
        id="too little device memory fails at once with the fields to change",
    ),
    pytest.param(
        (failed_pod(ExitCode.CORRUPT_ARTIFACT),),
        (Result.FAIL, Reason.CORRUPT_ARTIFACT, False, "Remove the named folder"),
        id="a damaged artifact fails at once",
    ),
    pytest.param(
        (failed_pod(137, reason="OOMKilled"),),
        (Result.RETRY, Reason.OUT_OF_HOST_MEMORY, True, "stages.train.resources.limits.memory"),
        id="a kill for memory names the field of the limit",
    ),
    pytest.param(
        (failed_pod(ExitCode.INTERRUPTED),),
        (Result.RETRY, Reason.INTERRUPTED, False, ""),
        id="an interruption after a checkpoint is not counted",
    ),
    pytest.param(
        (failed_pod(1, "Traceback ...\nValueError: x"),),
        (Result.RETRY, Reason.UNEXPECTED_ERROR, True, "ValueError: x"),
        id="a crash is counted and the end of its log is the evidence",
    ),
    pytest.param(
        (failed_pod(143, disruption=Note("PreemptionByScheduler", "preempted by a pod of priority 9")),),
        (Result.RETRY, Reason.PREEMPTED, False, "priority 9"),
        id="a preemption is not counted",
    ),
    pytest.param(
        (failed_pod(143, disruption=Note("DeletionByTaintManager", "taint")),),
        (Result.RETRY, Reason.NODE_LOST, False, "node-1"),
        id="a tainted node is not counted and is named",
    ),
    pytest.param(
        (Pod("p", 0, "Failed", status=Note("Evicted", "The node was low on resource: memory.")),),
        (Result.RETRY, Reason.EVICTED, False, "low on resource"),
        id="an eviction by the node is not counted",
    ),
    pytest.param(
        (Pod("p", 0, "Failed", status=Note("Evicted", "ephemeral local storage usage exceeds the limit")),),
        (Result.RETRY, Reason.EVICTED, True, "ephemeral-storage"),
        id="an eviction for the stage's own use of disk is counted",
    ),
    pytest.param(
        (Pod("p", 0, "Failed", status=Note("UnexpectedAdmissionError", "no devices")),),
        (Result.RETRY, Reason.POD_FAILED, False, "no devices"),
        id="a node that refuses the pod is not counted",
    ),
    pytest.param(
        (failed_pod(ExitCode.INTERRUPTED, deletion_requested_at=AT),),
        (Result.RETRY, Reason.POD_DELETED, False, "was deleted"),
        id="a pod deleted by hand is not counted",
    ),
    pytest.param(
        (failed_pod(ExitCode.RETRYABLE, index=0, after=1), failed_pod(ExitCode.USER_ERROR, index=1, after=5)),
        (Result.FAIL, Reason.USER_ERROR, False, ""),
        id="of several causes the user's error wins, however late it is seen",
    ),
    pytest.param(
        (failed_pod(ExitCode.RETRYABLE, index=0, after=3), failed_pod(25, index=1, after=9, deletion_requested_at=AT)),
        (Result.RETRY, Reason.POD_DELETED, False, "tiny-train-0-1"),
        id="a peer that notices a deleted pod is not the cause",
    ),
    pytest.param(
        (
            failed_pod(1, index=0, after=3),
            failed_pod(25, index=1, after=9, deletion_requested_at=AT + timedelta(seconds=4)),
        ),
        (Result.RETRY, Reason.UNEXPECTED_ERROR, True, "tiny-train-0-0"),
        id="a pod that the Job controller stops after a crash is not the cause",
    ),
]


@pytest.mark.parametrize(("pods", "expected"), CASES)
def test_what_an_end_means(pods: tuple[Pod, ...], expected: tuple[Result, Reason, bool, str]) -> None:
    outcome = derive_outcome(attempt(*pods))
    assert outcome is not None
    assert (outcome.result, outcome.reason, outcome.counts) == expected[:3]
    assert expected[3] in outcome.message


def done_pod(index: int, message: str) -> Pod:
    return Pod(f"p-{index}", index, "Succeeded", terminated=ended(0, message, "Completed"))


def test_a_stage_is_done_when_every_pod_exited_0_and_the_first_reports_its_artifact() -> None:
    ref = contract.ArtifactRef("finetune/x", contract.digest_of("x"))
    message = contract.encode_report(Report("train", 0, artifacts={"train": ref})).decode()
    assert derive_outcome(attempt(done_pod(0, message))) is None, "the second pod is missing"
    outcome = derive_outcome(attempt(done_pod(0, message), done_pod(1, "")))
    assert outcome is not None
    assert outcome.result is Result.SUCCEEDED
    assert outcome.report is not None
    assert outcome.report.artifacts["train"] == ref


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        pytest.param("train", "", id="no report"),
        pytest.param("train", report(0), id="no artifact"),
        pytest.param("merge", report(0), id="another stage's report"),
        pytest.param(
            "prepare",
            contract.encode_report(
                Report("prepare", 0, artifacts={"prepare": contract.ArtifactRef("p", contract.digest_of("p"))})
            ).decode(),
            id="prepare without the model",
        ),
    ],
)
def test_exit_0_without_a_valid_report_is_a_failure(stage: str, message: str) -> None:
    outcome = derive_outcome(attempt(done_pod(0, message), stage=stage, completions=1))
    assert outcome is not None
    assert (outcome.result, outcome.reason, outcome.counts) == (Result.RETRY, Reason.REPORT_MISSING, True)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"contractVersion":1,"stage":"train","exitCode":0,"artifacts":[1]}', id="artifacts as a list"),
        pytest.param('{"contractVersion":1,"stage":"train","exitCode":0,"metrics":[1]}', id="metrics as a list"),
        pytest.param('{"contractVersion":1,"stage":"train","exitCode":0,"metrics":{"loss":NaN}}', id="a NaN"),
        pytest.param("[" * 4096, id="a deep one"),
    ],
)
def test_a_malformed_report_is_an_outcome_and_no_exception(text: str) -> None:
    outcome = derive_outcome(attempt(done_pod(0, text), completions=1))
    assert outcome is not None
    assert outcome.reason is Reason.REPORT_MISSING
    assert find_outcome(outcome_annotations(outcome)) == outcome


def test_a_job_that_failed_without_a_pod_to_ask_is_a_lost_pod() -> None:
    outcome = derive_outcome(attempt(failed=Note("BackoffLimitExceeded", "Job has reached the backoff limit")))
    assert outcome is not None
    assert (outcome.reason, outcome.counts) == (Reason.POD_DELETED, False)


def test_an_outcome_is_read_back_as_it_was_written() -> None:
    outcome = Outcome(Result.RETRY, Reason.EVICTED, "why", True, 137, AT, AT + timedelta(seconds=3), generation=4)
    assert find_outcome(outcome_annotations(outcome)) == outcome


@pytest.mark.parametrize("text", ["", "{}", '{"result":"Succeeded"}', "[1]", '{"result": 3}'])
def test_a_damaged_record_counts_as_none(text: str) -> None:
    assert find_outcome({"finetune-operator.io/outcome": text}) is None


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        pytest.param(
            Pod("p", 0, "Pending", unschedulable=Note("Unschedulable", "0/3 nodes are available: 3 Insufficient cpu.")),
            Reason.UNSCHEDULABLE,
            id="no node has room",
        ),
        pytest.param(
            Pod("p", 0, "Pending", unschedulable=Note("", "pod has unbound immediate PersistentVolumeClaims.")),
            Reason.CLAIM_NOT_BOUND,
            id="the claim has no volume",
        ),
        pytest.param(
            Pod("p", 0, "Pending", waiting=Note("ImagePullBackOff", "Back-off pulling image")),
            Reason.IMAGE_PULL_FAILED,
            id="the image cannot be pulled",
        ),
        pytest.param(
            Pod("p", 0, "Pending", waiting=Note("CreateContainerConfigError", "secret not found")),
            Reason.CONTAINER_CONFIG_ERROR,
            id="the container cannot be made",
        ),
        pytest.param(Pod("p", 0, "Pending", waiting=Note("ContainerCreating", "")), None, id="it is being started"),
        pytest.param(Pod("p", 0, "Running", running=True), None, id="it runs"),
    ],
)
def test_why_a_pod_does_not_start(pod: Pod, reason: Reason | None) -> None:
    waiting = find_waiting(attempt(pod))
    assert (waiting.reason if waiting else None) == reason
