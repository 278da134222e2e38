"""The failure doctor's table: what each end of an attempt's pods means."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from finetune_operator.api.constants import Reason
from finetune_operator.core.failure import PATIENCE_SECONDS, Hang, derive_outcome, find_waiting, judge_refusal
from finetune_operator.core.nodes import NodeState
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
        (Result.RETRY, Reason.NODE_REFUSED, False, "no devices"),
        id="a device plugin that refuses the pod is not counted",
    ),
    *(
        pytest.param(
            (Pod("p", 0, "Failed", status=Note(reason, "Node didn't have enough resource")),),
            (Result.RETRY, Reason.NODE_REFUSED, False, "enough resource"),
            id=f"a kubelet that refuses the pod with {reason} is not counted",
        )
        for reason in ("OutOfcpu", "OutOfaws.amazon.com/neuron", "NodeAffinity", "TopologyAffinityError")
    ),
    pytest.param(
        (Pod("p", 0, "Failed", status=Note("Strange", "something new")),),
        (Result.RETRY, Reason.POD_FAILED, False, "something new"),
        id="a word of the kubelet that the table does not know is shown and not counted",
    ),
    pytest.param(
        (Pod("p", 0, "Failed", status=Note("Evicted", 'Usage of EmptyDir volume "scratch" exceeds the limit "1Gi".')),),
        (Result.RETRY, Reason.EVICTED, True, "EmptyDir"),
        id="an eviction for a full scratch volume is counted",
    ),
    pytest.param(
        (failed_pod(143, disruption=Note("TerminationByKubelet", "Pod was terminated: imminent node shutdown.")),),
        (Result.RETRY, Reason.NODE_LOST, False, "node shutdown"),
        id="a node that shuts down is not counted",
    ),
    pytest.param(
        (Pod("p", 0, "Failed", status=Note("NodeShutdown", "Pod was rejected as the node is shutting down.")),),
        (Result.RETRY, Reason.NODE_LOST, False, "shutting down"),
        id="a node that shuts down refuses the pod",
    ),
    pytest.param(
        (failed_pod(137, reason="ContainerStatusUnknown"),),
        (Result.RETRY, Reason.NODE_LOST, False, "lost sight"),
        id="a container that the kubelet lost is not counted",
    ),
    pytest.param(
        (failed_pod(128, "exec: no such file", reason="StartError"),),
        (Result.RETRY, Reason.CONTAINER_CONFIG_ERROR, True, "no such file"),
        id="a container that cannot be started is counted",
    ),
    pytest.param(
        (failed_pod(137),),
        (Result.RETRY, Reason.KILLED, True, "signal 9"),
        id="a kill that is not for memory is counted",
    ),
    pytest.param(
        (failed_pod(143),),
        (Result.RETRY, Reason.KILLED, True, "signal 15"),
        id="a SIGTERM from nowhere is counted",
    ),
    pytest.param((failed_pod(139),), (Result.RETRY, Reason.CRASHED, True, "signal 11"), id="a segmentation fault"),
    pytest.param((failed_pod(134),), (Result.RETRY, Reason.CRASHED, True, "signal 6"), id="an abort"),
    pytest.param((failed_pod(135),), (Result.RETRY, Reason.CRASHED, True, "SIGBUS"), id="a bus error"),
    pytest.param(
        (failed_pod(ExitCode.RETRYABLE, report(21, "PeerLost", "rank 1 lost rank 0")),),
        (Result.RETRY, Reason.COLLECTIVE_TIMEOUT, True, "rank 1 lost rank 0"),
        id="a rank that lost its peers with nothing to explain it",
    ),
    pytest.param(
        (failed_pod(ExitCode.RETRYABLE, report(21, "Terminated", "asked to stop")),),
        (Result.RETRY, Reason.INTERRUPTED, False, "asked to stop"),
        id="a stage that was told to stop before it had a checkpoint is not counted",
    ),
    pytest.param(
        (failed_pod(ExitCode.RETRYABLE, report(21, "Terminated", "asked to stop"), deletion_requested_at=AT),),
        (Result.RETRY, Reason.POD_DELETED, False, "was deleted"),
        id="a pod deleted by hand before a checkpoint is not counted",
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
            failed_pod(ExitCode.RETRYABLE, report(21, "PeerLost", "lost rank 1"), index=0, after=1),
            failed_pod(139, index=1, after=9),
        ),
        (Result.RETRY, Reason.CRASHED, True, "tiny-train-0-1"),
        id="a rank that lost a peer is not the cause although its end is seen first",
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
            Pod("p", 0, "Pending", unschedulable=Note("", 'persistentvolumeclaim "workspace" not found')),
            Reason.CLAIM_MISSING,
            id="the claim was deleted",
        ),
        pytest.param(
            Pod("p", 0, "Pending", waiting=Note("ImagePullBackOff", "Back-off pulling image")),
            Reason.IMAGE_PULL_FAILED,
            id="the image cannot be pulled",
        ),
        pytest.param(
            Pod("p", 0, "Pending", waiting=Note("CreateContainerConfigError", 'secret "hub" not found')),
            Reason.SECRET_MISSING,
            id="a Secret is missing",
        ),
        pytest.param(
            Pod("p", 0, "Pending", waiting=Note("CreateContainerError", "context deadline exceeded")),
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


SOUND = NodeState("node-1", ready="True")
SICK = NodeState("node-2", health="UnschedulablePendingReboot", ready="True")
SILENT = NodeState("node-2", ready="Unknown")


def running_pod(index: int, node: str, **more: Any) -> Pod:
    return Pod(f"tiny-train-0-{index}", index, "Running", node=node, running=True, **more)


@pytest.mark.parametrize(
    ("state", "deleted", "reason", "words"),
    [
        pytest.param(SICK, False, Reason.NODE_FAULT, "UnschedulablePendingReboot", id="a label of HyperPod"),
        pytest.param(SILENT, False, Reason.NODE_LOST, "does not answer", id="a kubelet that is silent"),
        pytest.param(None, True, Reason.NODE_LOST, "was deleted", id="a deleted node"),
    ],
)
def test_a_faulty_node_ends_an_attempt_whose_pods_still_run(
    state: NodeState | None, deleted: bool, reason: Reason, words: str
) -> None:
    nodes = {"node-1": SOUND} if state is None else {"node-1": SOUND, "node-2": state}
    going = attempt(running_pod(0, "node-1"), running_pod(1, "node-2"))
    assert derive_outcome(going, nodes={"node-1": SOUND}) is None
    outcome = derive_outcome(going, nodes=nodes, deleted_nodes=frozenset({"node-2"} if deleted else ()))
    assert outcome is not None
    assert (outcome.result, outcome.reason, outcome.counts) == (Result.RETRY, reason, False)
    assert (outcome.pod, outcome.node, outcome.nodes) == ("tiny-train-0-1", "node-2", ("node-1", "node-2"))
    assert "Pod tiny-train-0-1 on node node-2" in outcome.message
    assert words in outcome.message
    assert "last checkpoint" in outcome.message


@pytest.mark.parametrize("code", [1, 134, ExitCode.RETRYABLE, ExitCode.INTERRUPTED])
def test_a_faulty_node_explains_what_its_peers_say(code: int) -> None:
    gang = attempt(failed_pod(code, index=0, after=1), running_pod(1, "node-2"))
    outcome = derive_outcome(gang, nodes={"node-1": SOUND, "node-2": SILENT})
    assert outcome is not None
    assert (outcome.reason, outcome.node) == (Reason.NODE_LOST, "node-2")


@pytest.mark.parametrize(
    ("code", "why", "reason"),
    [
        pytest.param(ExitCode.USER_ERROR, "", Reason.USER_ERROR, id="the data is wrong on every node"),
        pytest.param(137, "OOMKilled", Reason.OUT_OF_HOST_MEMORY, id="what silences nodes must be counted"),
    ],
)
def test_a_faulty_node_is_no_excuse_for(code: int, why: str, reason: Reason) -> None:
    pod = Pod("p", 0, "Failed", node="node-2", terminated=ended(code, reason=why))
    outcome = derive_outcome(attempt(pod), nodes={"node-2": SICK})
    assert outcome is not None
    assert outcome.reason is reason


@pytest.mark.parametrize("code", [ExitCode.CORRUPT_ARTIFACT, ExitCode.OUT_OF_DEVICE_MEMORY])
def test_a_verdict_for_good_is_not_taken_from_a_faulty_node(code: int) -> None:
    pod = Pod("p", 0, "Failed", node="node-2", terminated=ended(code))
    outcome = derive_outcome(attempt(pod), nodes={"node-2": SICK})
    assert outcome is not None
    assert (outcome.result, outcome.reason) == (Result.RETRY, Reason.NODE_FAULT)


def test_a_counted_end_waits_for_what_becomes_of_the_peers_nodes() -> None:
    """A dead node shows after 40 s, and its peers fail at once: maxRetries must not pay for it."""
    gang = attempt(failed_pod(1, index=0), running_pod(1, "node-2"))
    nodes = {"node-1": SOUND, "node-2": NodeState("node-2", ready="True")}
    assert derive_outcome(gang, nodes=nodes, now=AT + timedelta(seconds=PATIENCE_SECONDS - 1)) is None
    late = derive_outcome(gang, nodes=nodes, now=AT + timedelta(seconds=PATIENCE_SECONDS))
    assert late is not None
    assert (late.reason, late.counts) == (Reason.UNEXPECTED_ERROR, True)
    both = attempt(failed_pod(1, index=0), Pod("p", 1, "Failed", node="node-2", terminated=ended(25)))
    outcome = derive_outcome(both, nodes=nodes, now=AT)
    assert outcome is not None, "nothing is left to wait for"


def test_an_end_that_costs_nothing_or_is_final_is_not_waited_with() -> None:
    nodes = {"node-1": SOUND, "node-2": NodeState("node-2", ready="True")}
    for code in (ExitCode.INTERRUPTED, ExitCode.USER_ERROR):
        gang = attempt(failed_pod(code, index=0), running_pod(1, "node-2"))
        assert derive_outcome(gang, nodes=nodes, now=AT) is not None


def test_a_hang_is_counted_and_blames_no_node_of_a_gang() -> None:
    gang = attempt(running_pod(0, "node-1"), running_pod(1, "node-2"))
    outcome = derive_outcome(gang, hung=Hang(step=40, seconds=601.2, limit_seconds=600))
    assert outcome is not None
    assert (outcome.reason, outcome.counts, outcome.pod, outcome.node) == (
        Reason.HANGING,
        True,
        "tiny-train-0-0",
        None,
    )
    assert "no step after step 40 for 601 seconds, 600 are allowed" in outcome.message


def test_a_node_explains_a_hang() -> None:
    gang = attempt(running_pod(0, "node-1"), running_pod(1, "node-2"))
    outcome = derive_outcome(gang, nodes={"node-2": SICK}, hung=Hang(40, 601, 600))
    assert outcome is not None
    assert outcome.reason is Reason.NODE_FAULT


def test_a_suspended_jobs_pods_have_no_outcome_and_neither_have_those_left_over_when_it_goes_on() -> None:
    stopped = failed_pod(ExitCode.INTERRUPTED, deletion_requested_at=AT)
    assert derive_outcome(attempt(stopped, queued=True, suspended=True)) is None
    later, earlier = AT + timedelta(seconds=5), AT - timedelta(seconds=5)
    for started_at in (later, None):
        going_on = attempt(stopped, running_pod(0, "node-1"), queued=True, started_at=started_at)
        assert derive_outcome(going_on) is None
    for queued, started_at in ((True, earlier), (False, later)):
        going_on = attempt(stopped, running_pod(0, "node-1"), queued=queued, started_at=started_at)
        outcome = derive_outcome(going_on)
        assert outcome is not None
        assert outcome.reason is Reason.POD_DELETED, "deleted by somebody, and not by a preemption"


def test_a_stage_that_is_stopped_at_its_deadline_is_counted_whatever_its_pods_say() -> None:
    over = Note("DeadlineExceeded", "Job was active longer than specified deadline")
    for pods in ((), (failed_pod(ExitCode.INTERRUPTED, deletion_requested_at=AT),), (running_pod(0, "node-1"),)):
        outcome = derive_outcome(attempt(*pods, failed=over))
        assert outcome is not None
        assert (outcome.reason, outcome.counts) == (Reason.STAGE_DEADLINE_EXCEEDED, True)
        assert "longer than specified deadline" in outcome.message


def test_a_recorded_outcome_wins_over_the_jobs_deadline() -> None:
    recorded = Outcome(Result.RETRY, Reason.NODE_FAULT, "why")
    stopped = attempt(failed=Note("DeadlineExceeded", "x"))
    assert derive_outcome(replace(stopped, recorded=recorded)) is recorded


def test_an_outcome_knows_the_step_of_the_stages_report() -> None:
    text = contract.encode_report(Report("train", 25, "Interrupted", "m", metrics={"step": 12})).decode()
    outcome = derive_outcome(attempt(failed_pod(ExitCode.INTERRUPTED, text)))
    assert outcome is not None
    assert (outcome.step, outcome.pod, outcome.node) == (12, "tiny-train-0-0", "node-1")


def test_no_secret_of_a_containers_words_gets_into_the_message() -> None:
    spoken = report(21, "HubRefused", "GET https://user:hunter2@hub/x with Bearer abcdefgh12345678 failed")
    for text in (spoken, "token=hf_abcdefghijklmnop and password: hunter2\nhf_abcdefghijklmnop"):
        outcome = derive_outcome(attempt(failed_pod(ExitCode.RETRYABLE, text)))
        assert outcome is not None
        assert not any(secret in outcome.message for secret in ("hunter2", "abcdefgh12345678", "hf_abc"))


@pytest.mark.parametrize(
    ("about", "event", "reason"),
    [
        pytest.param("p", Note("FailedMount", 'secret "hub" not found'), Reason.SECRET_MISSING, id="a Secret"),
        pytest.param(
            "p", Note("FailedMount", "references non-existent secret key: token"), Reason.SECRET_MISSING, id="a key"
        ),
        pytest.param("p", Note("FailedMount", "mount.lustre: no route"), Reason.MOUNT_FAILED, id="a file system"),
        pytest.param("p", Note("FailedCreatePodSandBox", "cni"), Reason.CONTAINER_CONFIG_ERROR, id="the network"),
        pytest.param("p", Note("Unheard", "of"), None, id="a word that the table does not know"),
    ],
)
def test_an_event_tells_what_no_status_says(about: str, event: Note, reason: Reason | None) -> None:
    creating = attempt(Pod("p", 0, "Pending", node="node-1", waiting=Note("ContainerCreating", "")))
    assert find_waiting(creating) is None
    waiting = find_waiting(creating, events={about: event})
    assert (waiting.reason if waiting else None) == reason


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        pytest.param("pods is forbidden: exceeded quota: team", Reason.QUOTA_EXCEEDED, id="a quota"),
        pytest.param("violates PodSecurity", Reason.CHILD_REFUSED, id="a policy"),
    ],
)
def test_pods_that_are_refused_are_told_by_the_jobs_event(message: str, reason: Reason) -> None:
    waiting = find_waiting(attempt(), events={"tiny-train-01234567-1": Note("FailedCreate", message)})
    assert waiting is not None
    assert waiting.reason is reason
    assert message in waiting.message


@pytest.mark.parametrize(
    ("status", "words", "reason"),
    [
        pytest.param(409, "exists", Reason.NAME_CONFLICT, id="a name that is taken"),
        pytest.param(403, "exceeded quota: team", Reason.QUOTA_EXCEEDED, id="a quota"),
        pytest.param(403, "violates PodSecurity", Reason.CHILD_REFUSED, id="a policy"),
        pytest.param(422, "spec.template: Invalid value", Reason.CHILD_REFUSED, id="an invalid override"),
        pytest.param(500, 'failed calling webhook "mjob.kb.io"', Reason.CHILD_REFUSED, id="a webhook that is away"),
        pytest.param(500, "etcdserver: timeout", None, id="the server's own trouble"),
    ],
)
def test_what_a_refusal_means(status: int, words: str, reason: Reason | None) -> None:
    waiting = judge_refusal("Job", "tiny-train-1", "train", status, words)
    assert (waiting.reason if waiting else None) == reason
    assert waiting is None or words in waiting.message
