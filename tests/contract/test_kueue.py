"""Jobs that queue, on a real API server with the real Kueue; the test plays the kubelet.

Quotas are counted in CPUs: a stage's pod asks for half of one, and training has two pods.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kube
import kubelet
import kueue
import pytest
import worker_nodes
from kubelet import NOWHERE, STAGES
from kueue import TeamQueue
from operator_account import Account
from operator_process import OperatorProcess
from submitted import condition, has_phase, stage, submit, wait_for_job

from finetune_operator.api import constants
from finetune_operator.core.nodes import LABEL_INSTANCE_TYPE
from finetune_trainer import contract

pytestmark = pytest.mark.timeout(1200)  # the first start of a machine builds Kueue

HALF = {
    name: {"nodeSelector": NOWHERE, "resources": {"requests": {"cpu": "500m", "memory": "64Mi"}}} for name in STAGES
}
"""spec.stages of a job whose pods ask for half a CPU each and stay unscheduled."""
ONE_STAGE, TRAINING = "500m", "1"
"""CPUs that the ClusterQueue says are reserved for a stage of one pod, and for training."""


@pytest.fixture
def namespace(crd: None) -> Iterator[str]:
    """A fresh namespace, named as HyperPod names a team's."""
    name = f"hyperpod-ns-research-{uuid.uuid4().hex[:6]}"
    kube.kubectl("create", "namespace", name)
    yield name
    kube.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def queue(with_kueue: None, namespace: str) -> Iterator[TeamQueue]:
    """The team's queue, with room for one training and nothing beside it."""
    with kueue.team_queue(namespace, cpu="1", team=namespace.removeprefix("hyperpod-ns-")) as made:
        yield made


@pytest.fixture
def rival(queue: TeamQueue) -> Any:
    """Makes somebody else's Job that takes the whole queue."""

    def make(name: str = "rival", *, cpu: str = "1", priority: str = "inference-priority") -> None:
        queue.rival(name, cpu=cpu, priority=priority, nodeSelector=NOWHERE)

    return make


def k8s_jobs(namespace: str, stage_name: str | None = None) -> list[kube.Object]:
    selector = constants.LABEL_JOB_UID if stage_name is None else kubelet.selector(stage_name)
    return kube.items("jobs", "-n", namespace, "-l", selector)


def k8s_job(namespace: str, stage_name: str) -> kube.Object:
    (found,) = kube.eventually(
        lambda: k8s_jobs(namespace, stage_name), deadline=30, reason=f"the Job of stage {stage_name}"
    )
    return found  # type: ignore[no-any-return]


def wait_for_no_pods(namespace: str, stage_name: str) -> None:
    kube.eventually(
        lambda: not kube.items("pods", "-n", namespace, "-l", kubelet.selector(stage_name)),
        deadline=30,
        reason=f"the pods of {stage_name} to go",
    )


def quota(job: kube.Object) -> dict[str, Any]:
    return condition(job, "QuotaReserved")


def is_queued(job: kube.Object) -> bool:
    return has_phase("Queued")(job) and quota(job).get("status") == "False"


def is_admitted(job: kube.Object) -> bool:
    return quota(job).get("status") == "True" and job["status"]["phase"] != "Queued"


def has_artifact(stage_name: str) -> Any:
    return lambda job: stage(job, stage_name).get("state") == "Succeeded"


def preempted(job: kube.Object) -> list[dict[str, Any]]:
    return [each for each in job.get("status", {}).get("attempts", []) if each["reason"] == "Preempted"]


def events(namespace: str, reason: str) -> list[kube.Object]:
    found = kube.items("events.events.k8s.io", "-n", namespace)
    return [each for each in found if each["reason"] == reason and each["regarding"]["kind"] == constants.KIND]


def own_words(workload: kube.Object, kind: str) -> tuple[str, str]:
    """Reason and message of a Workload's condition."""
    found = next(each for each in workload["status"]["conditions"] if each["type"] == kind)
    return found["reason"], found["message"]


def set_suspend(namespace: str, value: bool) -> None:
    patch = json.dumps({"spec": {"suspend": value}})
    kube.kubectl("patch", "ftj", "tiny", "-n", namespace, "--type=merge", "-p", patch)


def test_without_kueue_a_queued_job_waits_and_goes_on_when_kueue_comes(
    namespace: str, operator: OperatorProcess, kueue_switch: kueue.Switch
) -> None:
    """First in this file: the others bring Kueue up."""
    kueue_switch.off()
    team = namespace.removeprefix("hyperpod-ns-")
    submit(namespace, queue=TeamQueue(namespace, team).spec(), stages=HALF)
    job = wait_for_job(namespace, is_queued, reason="the job to wait")
    assert (job["status"]["reason"], quota(job)["reason"]) == ("QueueUnavailable", "QueueUnavailable")
    assert "Install Kueue, or remove spec.queue" in job["status"]["message"]
    assert k8s_job(namespace, "prepare")["spec"]["suspend"]
    kueue_switch.on()
    with kueue.team_queue(namespace, cpu="1", team=team):
        wait_for_job(namespace, is_admitted, reason="the new Kueue to admit the job", deadline=90)
        kubelet.walk(namespace, "prepare")
        wait_for_job(namespace, has_artifact("prepare"), reason="prepare to succeed")


def test_a_stage_waits_for_quota_in_kueues_words_and_is_started_by_kueue_alone(
    namespace: str, operator: OperatorProcess, queue: TeamQueue, rival: Any
) -> None:
    rival()
    queue.wait_for_rival("rival")
    submit(namespace, queue=queue.spec(), stages=HALF)
    waiting = wait_for_job(
        namespace,
        lambda job: is_queued(job) and "insufficient unused quota" in quota(job)["message"],
        reason="Kueue's words",
    )
    job = k8s_job(namespace, "prepare")
    assert (quota(waiting)["reason"], quota(waiting)["message"]) == own_words(queue.workload_of(job), "QuotaReserved")
    assert waiting["status"]["reason"] == "Queued"
    assert job["spec"]["suspend"]
    wanted = {kueue.QUEUE_LABEL: queue.local_queue, kueue.PRIORITY_LABEL: "fine-tuning-priority"}
    assert wanted.items() <= job["metadata"]["labels"].items()
    assert wanted.items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert kube.items("pods", "-n", namespace, "-l", kubelet.selector("prepare")) == []

    queue.remove_rival("rival")
    wait_for_job(namespace, is_admitted, reason="the admission")
    (job,) = k8s_jobs(namespace, "prepare")
    owners = {
        entry["manager"]
        for entry in kube.get("job", job["metadata"]["name"], "-n", namespace, "--show-managed-fields")["metadata"][
            "managedFields"
        ]
        if "f:suspend" in entry.get("fieldsV1", {}).get("f:spec", {})
    }
    assert not job["spec"]["suspend"]
    assert owners
    assert not any(owner.startswith(constants.FIELD_MANAGER) for owner in owners), "only Kueue lifts a suspension"
    kubelet.walk(namespace, *STAGES)
    wait_for_job(namespace, has_phase("Succeeded"), reason="the job to succeed")
    for reason in ("Queued", "Admitted"):
        kube.eventually(lambda reason=reason: events(namespace, reason), deadline=10, reason=f"event {reason}")


def test_each_stage_holds_its_own_quota_and_another_job_uses_what_is_free_between(
    namespace: str, operator: OperatorProcess, queue: TeamQueue
) -> None:
    submit(namespace, queue=queue.spec(), stages=HALF)
    kubelet.pods(namespace, "prepare", 1)
    queue.wait_until_used(ONE_STAGE)
    kubelet.walk(namespace, "prepare")
    kubelet.pods(namespace, "train", 1, 2)
    queue.wait_until_used(TRAINING)
    submit(namespace, name="other", queue=queue.spec(), stages=HALF)
    wait_for_job(namespace, is_queued, reason="the other job to wait for the training", name="other")
    kubelet.walk(namespace, "train")
    kubelet.pods(namespace, "consolidate", 1)
    wait_for_job(namespace, is_admitted, reason="the other job to take what is free", name="other")
    queue.wait_until_used("1")
    for name in ("consolidate", "merge", "evaluate"):
        kubelet.walk(namespace, name)
    wait_for_job(namespace, has_phase("Succeeded"), reason="the first job to succeed")
    queue.wait_until_used(ONE_STAGE)
    kube.kubectl("delete", "ftj", "other", "-n", namespace, "--wait=true", "--timeout=20s")
    queue.wait_until_used("0")


def test_a_preempted_training_shows_it_and_goes_on_in_the_same_job(
    namespace: str, operator: OperatorProcess, queue: TeamQueue, rival: Any
) -> None:
    submit(namespace, queue=queue.spec(), stages=HALF, retryPolicy={"maxRetries": 0})
    kubelet.walk(namespace, "prepare")
    for pod in kubelet.pods(namespace, "train", 1, 2):
        kubelet.run(namespace, pod)
    wait_for_job(namespace, lambda job: stage(job, "train").get("state") == "Running", reason="training to run")
    before = k8s_job(namespace, "train")
    rival()
    queue.wait_for_rival("rival")
    job = wait_for_job(namespace, lambda job: is_queued(job) and preempted(job), reason="the preemption to be told")
    (attempt,) = preempted(job)
    assert (attempt["stage"], attempt["attempt"], attempt["counted"]) == ("train", 1, False)
    assert "Preempted to accommodate a workload" in attempt["message"]
    assert quota(job)["reason"] in ("Preempted", "Pending")
    wait_for_no_pods(namespace, "train")

    operator.restart()
    queue.remove_rival("rival")
    wait_for_job(namespace, is_admitted, reason="the job to be admitted again", deadline=60)
    kubelet.walk(namespace, *STAGES[1:])
    job = wait_for_job(namespace, has_phase("Succeeded"), reason="the job to succeed")
    (after,) = k8s_jobs(namespace, "train")
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert (len(preempted(job)), len(job["status"]["attempts"]), stage(job, "train")["attempt"]) == (1, 1, 1)
    kube.eventually(lambda: len(events(namespace, "Preempted")) == 1, deadline=10, reason="one event of the preemption")


def test_a_preemption_while_no_operator_looks_is_told_afterwards(
    namespace: str, operator: OperatorProcess, queue: TeamQueue, rival: Any
) -> None:
    submit(namespace, queue=queue.spec(), stages=HALF)
    kubelet.walk(namespace, "prepare")
    kubelet.pods(namespace, "train", 1, 2)
    wait_for_job(namespace, is_admitted, reason="training to be admitted")
    operator.kill()
    rival()
    queue.wait_for_rival("rival")
    queue.remove_rival("rival")
    wait_until_admitted_again(queue, k8s_job(namespace, "train"))
    operator.start()
    kubelet.walk(namespace, "train")
    wait_for_job(namespace, has_artifact("train"), reason="the training to succeed")
    job = wait_for_job(namespace, preempted, reason="the preemption to be told")
    assert [each["stage"] for each in preempted(job)] == ["train"]


def wait_until_admitted_again(queue: TeamQueue, job: kube.Object) -> None:
    def is_again() -> bool:
        conditions = queue.workload_of(job)["status"]["conditions"]
        return any(each["type"] == "Evicted" and each["status"] == "False" for each in conditions)

    kube.eventually(is_again, deadline=60, reason="Kueue to admit the preempted Job again")


def test_a_pod_that_ends_of_the_preemption_does_not_end_the_attempt(
    namespace: str, operator: OperatorProcess, queue: TeamQueue, rival: Any
) -> None:
    """A finalizer of the test keeps the stopped pods for as long as their grace period may last."""
    held = "finetune-operator.io/test"
    submit(namespace, queue=queue.spec(), stages=HALF)
    kubelet.walk(namespace, "prepare")
    stopping = kubelet.pods(namespace, "train", 1, 2)
    for pod in stopping:
        kubelet.run(namespace, pod)
        add = json.dumps([{"op": "add", "path": "/metadata/finalizers/-", "value": held}])
        kube.kubectl("patch", "pod", pod["metadata"]["name"], "-n", namespace, "--type=json", "-p", add)
    rival()
    queue.wait_for_rival("rival")
    queue.remove_rival("rival")
    wait_until_admitted_again(queue, k8s_job(namespace, "train"))
    for pod in stopping:
        kubelet.end(namespace, pod, contract.ExitCode.INTERRUPTED, "")
    wait_for_job(namespace, lambda job: len(preempted(job)) == 1, reason="the preemption to be told")
    for pod in stopping:
        drop = json.dumps({"metadata": {"finalizers": None}})
        kube.kubectl("patch", "pod", pod["metadata"]["name"], "-n", namespace, "--type=merge", "-p", drop)
    gone = {pod["metadata"]["uid"] for pod in stopping}
    kube.eventually(
        lambda: not gone & {pod["metadata"]["uid"] for pod in kube.items("pods", "-n", namespace)},
        deadline=30,
        reason="the stopped pods to go",
    )
    kubelet.walk(namespace, "train")
    job = wait_for_job(namespace, has_artifact("train"), reason="the training to succeed")
    assert [(each["reason"], each["attempt"]) for each in job["status"]["attempts"]] == [("Preempted", 1)]
    assert stage(job, "train")["attempt"] == 1


def test_a_missing_queue_is_told_in_kueues_words(namespace: str, operator: OperatorProcess, queue: TeamQueue) -> None:
    submit(namespace, queue=queue.spec(name="hyperpod-ns-other-localqueue"), stages=HALF)
    words = "LocalQueue hyperpod-ns-other-localqueue doesn't exist"
    job = wait_for_job(namespace, lambda job: quota(job).get("message") == words, reason="Kueue's words")
    assert (quota(job)["reason"], job["status"]["phase"]) == ("Inadmissible", "Queued")
    assert words in job["status"]["message"]
    queue.make("hyperpod-ns-other-localqueue")
    wait_for_job(namespace, is_admitted, reason="the admission")


def test_a_missing_priority_class_is_named(namespace: str, operator: OperatorProcess, queue: TeamQueue) -> None:
    submit(namespace, queue=queue.spec(priorityClass="no-such-priority"), stages=HALF)
    job = wait_for_job(
        namespace, lambda job: job.get("status", {}).get("reason") == "QueueUnavailable", reason="the remedy"
    )
    assert "WorkloadPriorityClass no-such-priority" in job["status"]["message"]


def test_a_queue_that_is_drained_stops_the_stage_and_lets_it_go_on_later(
    namespace: str, operator: OperatorProcess, queue: TeamQueue
) -> None:
    submit(namespace, queue=queue.spec(), stages=HALF)
    kubelet.pods(namespace, "prepare", 1)
    wait_for_job(namespace, is_admitted, reason="the admission")
    queue.patch({"stopPolicy": "HoldAndDrain"})
    job = wait_for_job(namespace, lambda job: is_queued(job) and preempted(job), reason="the drain to be told")
    assert "The ClusterQueue is stopped" in preempted(job)[0]["message"]
    wait_for_no_pods(namespace, "prepare")
    queue.patch({"stopPolicy": "None"})
    wait_for_job(namespace, is_admitted, reason="the job to be admitted again", deadline=60)
    kubelet.walk(namespace, "prepare")
    wait_for_job(namespace, has_artifact("prepare"), reason="prepare to succeed")


def test_suspension_and_deletion_give_the_quota_back(
    namespace: str, operator: OperatorProcess, queue: TeamQueue
) -> None:
    submit(namespace, queue=queue.spec(), stages=HALF)
    kubelet.walk(namespace, "prepare")
    kubelet.pods(namespace, "train", 1, 2)
    queue.wait_until_used(TRAINING)
    set_suspend(namespace, True)
    wait_for_job(
        namespace, lambda job: condition(job, "Suspended").get("status") == "True", reason="the job to be suspended"
    )
    queue.wait_until_used("0")
    set_suspend(namespace, False)
    kubelet.pods(namespace, "train", 2, 2)
    queue.wait_until_used(TRAINING)
    kube.kubectl("delete", "ftj", "tiny", "-n", namespace, "--wait=true", "--timeout=20s")
    queue.wait_until_used("0")
    kube.eventually(lambda: not queue.workloads(), deadline=30, reason="the Workloads to go")


def test_a_job_that_waits_for_quota_can_be_suspended_and_deleted(
    namespace: str, operator: OperatorProcess, queue: TeamQueue, rival: Any
) -> None:
    rival()
    queue.wait_for_rival("rival")
    submit(namespace, queue=queue.spec(), stages=HALF)
    wait_for_job(namespace, is_queued, reason="the job to wait")
    set_suspend(namespace, True)
    job = wait_for_job(
        namespace, lambda job: condition(job, "Suspended").get("status") == "True", reason="the job to be suspended"
    )
    assert job["status"]["phase"] == "Suspended"
    queue.remove_rival("rival")
    set_suspend(namespace, False)
    wait_for_job(namespace, is_admitted, reason="the admission")
    kube.kubectl("delete", "ftj", "tiny", "-n", namespace, "--wait=true", "--timeout=20s")
    queue.wait_until_used("0")


@pytest.fixture
def placed(with_kueue: None, namespace: str) -> Iterator[TeamQueue]:
    """The team's queue, whose flavor has nodes of its own."""
    team = namespace.removeprefix("hyperpod-ns-")
    with kueue.team_queue(namespace, cpu="1", team=team, with_node_labels=True) as made:
        yield made


def reservations(queue: TeamQueue) -> list[kube.Object]:
    return [
        each
        for each in queue.workloads()
        if any(owner["kind"] == constants.KIND for owner in each["metadata"].get("ownerReferences") or [])
    ]


def test_a_whole_pipeline_holds_its_quota_from_the_first_stage_to_the_last(
    namespace: str, operator: OperatorProcess, placed: TeamQueue
) -> None:
    submit(namespace, queue=placed.spec(policy="wholePipeline"), stages=HALF)
    wait_for_job(namespace, is_admitted, reason="the first job's admission")
    submit(namespace, name="second", queue=placed.spec(policy="wholePipeline"), stages=HALF)
    wait_for_job(namespace, is_queued, reason="the second job to wait", name="second")
    placed.wait_until_used(TRAINING)  # the ClusterQueue's own figures come a moment after the admission
    for name in STAGES:
        pods = kubelet.pods(namespace, name, 1, 2 if name == "train" else 1)
        if name == "train":
            operator.restart()
            for pod in pods:
                kubelet.run(namespace, pod)
            wait_for_job(namespace, lambda job: stage(job, "train")["state"] == "Running", reason="the training to run")
        for pod in pods:
            assert placed.used() == TRAINING
            assert placed.node_labels.items() <= pod["spec"]["nodeSelector"].items()
            assert kueue.QUEUE_LABEL not in pod["metadata"]["labels"]
            kubelet.end(namespace, pod)
        wait_for_job(namespace, lambda job, name=name: stage(job, name)["state"] == "Succeeded", reason=name)
        if name != STAGES[-1]:
            assert is_queued(kube.get("ftj", "second", "-n", namespace))
    job = wait_for_job(namespace, has_phase("Succeeded"), reason="the job to succeed")
    assert job["status"]["restarts"] == 0, "an operator that starts must not take a running stage for preempted"
    wait_for_job(namespace, is_admitted, reason="the second job to get the quota", name="second")
    (reservation,) = reservations(placed)
    assert reservation["metadata"]["ownerReferences"][0]["name"] == "second"
    assert "finalizers" not in reservation["metadata"]
    kube.kubectl("delete", "ftj", "second", "-n", namespace, "--wait=true", "--timeout=20s")
    placed.wait_until_used("0")


def test_a_whole_pipeline_that_is_preempted_waits_again_and_goes_on(
    namespace: str, operator: OperatorProcess, placed: TeamQueue
) -> None:
    submit(namespace, queue=placed.spec(policy="wholePipeline"), stages=HALF, retryPolicy={"maxRetries": 0})
    kubelet.walk(namespace, "prepare")
    for pod in kubelet.pods(namespace, "train", 1, 2):
        kubelet.run(namespace, pod)
    (before,) = reservations(placed)
    placed.rival("rival", cpu="1", nodeSelector=NOWHERE)
    placed.wait_for_rival("rival")
    job = wait_for_job(namespace, lambda job: is_queued(job) and preempted(job), reason="the preemption to be told")
    (attempt,) = preempted(job)
    assert (attempt["stage"], attempt["counted"]) == ("train", False)
    (after,) = reservations(placed)
    assert after["metadata"]["name"] != before["metadata"]["name"]
    wait_for_no_pods(namespace, "train")

    placed.remove_rival("rival")
    wait_for_job(namespace, is_admitted, reason="the job to be admitted again", deadline=60)
    kubelet.walk(namespace, "train", attempt=2)
    kubelet.walk(namespace, *STAGES[2:])
    job = wait_for_job(namespace, has_phase("Succeeded"), reason="the job to succeed")
    assert len(preempted(job)) == len(job["status"]["attempts"]) == 1


def test_a_whole_pipeline_that_is_suspended_gives_its_quota_back(
    namespace: str, operator: OperatorProcess, placed: TeamQueue
) -> None:
    submit(namespace, queue=placed.spec(policy="wholePipeline"), stages=HALF)
    kubelet.pods(namespace, "prepare", 1)
    placed.wait_until_used(TRAINING)
    set_suspend(namespace, True)
    placed.wait_until_used("0")
    assert reservations(placed) == []
    set_suspend(namespace, False)
    placed.wait_until_used(TRAINING)


def test_devices_that_nodes_and_queue_name_differently_are_told_with_both_names(
    namespace: str, account: Account, queue: TeamQueue, tmp_path: Path
) -> None:
    kind, offered, covered = "ml.trn1.32xlarge", "aws.amazon.com/neurondevice", "aws.amazon.com/neuron"

    def cover(device: str) -> None:
        quota = [
            {"name": name, "nominalQuota": most} for name, most in (("cpu", "1k"), ("memory", "8Ti"), (device, "64"))
        ]
        flavor = {"name": queue.flavor, "resources": quota}
        queue.patch({"resourceGroups": [{"coveredResources": ["cpu", "memory", device], "flavors": [flavor]}]})

    cover(covered)
    process = OperatorProcess(
        namespace, tmp_path / "operator.log", **account.environment, FINETUNE_FEATURE_GATES="Neuron=true"
    )
    process.start()
    try:
        with worker_nodes.made(namespace, 1, labels={LABEL_INSTANCE_TYPE: kind}, room={offered: "16"}):
            submit(namespace, queue=queue.spec(), accelerator={"type": "neuron", "instanceType": kind, "nodes": 1})
            job = wait_for_job(
                namespace,
                lambda job: job.get("status", {}).get("reason") == "NeuronResourceNameMismatch",
                reason="the two names",
            )
            told = job["status"]["message"]
            assert (
                f"Nodes of type {kind} offer {offered}, but ClusterQueue {queue.cluster_queue} covers {covered}" in told
            )
            assert k8s_jobs(namespace) == []
            cover(offered)
            k8s_job(namespace, "prepare")
    finally:
        process.stop()
