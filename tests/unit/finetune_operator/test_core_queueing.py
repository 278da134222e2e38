"""What Kueue's Workload is read as, and what is said of a job by it. The objects are as Kueue 0.12.2 writes them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pytest
from builders import make_job
from workloads import JOB_UID, NOW, at, condition, evicted, pending, readmitted, recorded, reserved, workload

from finetune_operator.api.constants import LABEL_QUEUE, LABEL_QUEUE_PRIORITY
from finetune_operator.core.queueing import (
    NO_WORKLOAD_SECONDS,
    Eviction,
    PodSetUpdate,
    QueueState,
    Workload,
    derive_queue_state,
    find_api_version,
    no_workload_at,
    parse_workload,
    queue_labels,
    queue_wait_seconds,
)

QUEUE = {"name": "hyperpod-ns-research-localqueue", "priorityClass": "fine-tuning-priority"}
SHORT_OF = (
    "couldn't assign flavors to pod set main: insufficient unused quota for cpu in flavor ml.trn1.32xlarge, 2 more "
    "needed"
)
PREEMPTED = "Preempted to accommodate a workload (UID: u, JobUID: j) due to prioritization in the ClusterQueue"


@dataclass(frozen=True)
class K8sJob:
    """A stage's Job as far as the queue is concerned."""

    name: str = "tiny-train-01234567-1"
    created_at: datetime | None = NOW
    suspended: bool = True
    started_at: datetime | None = None


def state(raw: dict[str, Any] | None, *, installed: bool = True, seconds: float = 0, **job: Any) -> QueueState | None:
    parsed = None if raw is None else parse_workload(raw)
    moment = NOW + timedelta(seconds=seconds)
    return derive_queue_state(make_job(queue=QUEUE), K8sJob(**job), parsed, kueue_installed=installed, now=moment)


def test_a_workload_that_waits_is_read_with_kueues_words() -> None:
    assert parse_workload(workload(pending(SHORT_OF))) == Workload(
        name="job-tiny-train-01234567-1-0a1b2",
        uid="w-1",
        owner_kind="Job",
        owner_uid=JOB_UID,
        queue="hyperpod-ns-research-localqueue",
        waiting_reason="Pending",
        waiting_message=SHORT_OF,
    )


def test_an_admitted_workload_has_its_queue_its_flavors_and_its_time() -> None:
    read = parse_workload(workload(*reserved(5), flavors={"cpu": "cheap", "aws.amazon.com/neuron": "ml.trn1.32xlarge"}))
    assert (read.quota_reserved, read.admitted, read.was_admitted, read.admitted_at) == (True, True, True, at(5))
    assert read.cluster_queue == "hyperpod-ns-research-clusterqueue"
    assert read.flavors == {"aws.amazon.com/neuron": "ml.trn1.32xlarge", "cpu": "cheap"}
    assert (read.waiting_reason, read.waiting_message) == ("", "")


def test_a_workload_that_has_quota_and_waits_for_a_check_says_for_which() -> None:
    raw = workload(reserved(5)[0])
    raw["status"]["admissionChecks"] = [
        {"name": "capacity", "state": "Pending", "message": "2 nodes are being made", "lastTransitionTime": "x"},
        {
            "name": "zone",
            "state": "Ready",
            "message": "",
            "lastTransitionTime": "x",
            "podSetUpdates": [{"name": "main", "nodeSelector": {"zone": "a"}, "tolerations": [{"key": "spot"}]}],
        },
    ]
    read = parse_workload(raw)
    assert (read.waiting_reason, read.waiting_message) == (
        "UnsatisfiedChecks",
        "capacity: Pending. 2 nodes are being made; zone: Ready.",
    )
    assert read.updates == (PodSetUpdate(node_selector={"zone": "a"}, tolerations=({"key": "spot"},)),)


def test_an_eviction_is_read_until_quota_is_reserved_again() -> None:
    during = parse_workload(workload(*reserved(5), evicted("Preempted", PREEMPTED, 60)))
    assert during.evicted == Eviction("Preempted", PREEMPTED, at(60))
    assert (during.quota_reserved, during.readmitted) == (True, None)
    after = parse_workload(readmitted(PREEMPTED, again=90))
    assert after.evicted is None
    assert after.readmitted == Eviction("", PREEMPTED, at(90))
    assert (after.admitted, after.requeued, after.evictions) == (True, True, {"Preempted": 1})


def test_the_newer_version_of_the_api_is_read_alike() -> None:
    old, new = readmitted(PREEMPTED, again=90), readmitted(PREEMPTED, again=90)
    new["apiVersion"] = "kueue.x-k8s.io/v1beta2"
    status = new["status"]
    status["accumulatedPastExecutionTimeSeconds"] = status.pop("accumulatedPastExexcutionTimeSeconds")
    assert parse_workload(new) == parse_workload(old)


def test_a_workload_that_kueue_has_only_just_got_is_read() -> None:
    raw = workload()
    del raw["status"]
    read = parse_workload(raw)
    assert (read.waiting_reason, read.quota_reserved, read.active) == ("", False, True)


@pytest.mark.parametrize(
    ("group", "found"),
    [
        pytest.param(None, None, id="no Kueue"),
        pytest.param({"versions": [{"version": "v1alpha1"}]}, None, id="a version that is not understood"),
        pytest.param({"versions": [{"version": "v1beta2"}]}, "kueue.x-k8s.io/v1beta2", id="the newer one"),
        pytest.param(
            {"versions": [{"version": "v1beta2"}, {"version": "v1beta1"}]}, "kueue.x-k8s.io/v1beta1", id="both"
        ),
    ],
)
def test_the_version_is_one_that_is_served_and_understood(group: dict[str, Any] | None, found: str | None) -> None:
    assert find_api_version(group) == found


@pytest.mark.parametrize(
    ("queue", "labels"),
    [
        pytest.param(None, {}, id="no queue"),
        pytest.param({"name": "q"}, {LABEL_QUEUE: "q"}, id="a queue"),
        pytest.param(
            {"name": "q", "priorityClass": "p"}, {LABEL_QUEUE: "q", LABEL_QUEUE_PRIORITY: "p"}, id="and a priority"
        ),
        pytest.param({"name": "q", "priorityClass": "p", "policy": "wholePipeline"}, {}, id="a reservation carries it"),
    ],
)
def test_only_a_stage_that_queues_by_itself_carries_the_labels(queue: Any, labels: dict[str, str]) -> None:
    assert queue_labels(make_job(queue=queue).spec.queue) == labels


def test_a_job_without_a_queue_has_no_state_of_one() -> None:
    assert derive_queue_state(make_job(), K8sJob(), None, kueue_installed=True, now=NOW) is None


@pytest.mark.parametrize(
    ("raw", "status", "reason", "words", "waits"),
    [
        pytest.param(workload(), "False", "Queued", "has not considered", True, id="Kueue has not looked at it"),
        pytest.param(workload(pending(SHORT_OF)), "False", "Pending", SHORT_OF, True, id="no quota is free"),
        pytest.param(
            workload(condition("QuotaReserved", "False", "Inadmissible", "LocalQueue q doesn't exist")),
            "False",
            "Inadmissible",
            "LocalQueue q doesn't exist",
            True,
            id="no such queue",
        ),
        pytest.param(workload(reserved(5)[0]), "False", "UnsatisfiedChecks", "waits in", True, id="a check is open"),
        pytest.param(
            workload(*reserved(5)),
            "True",
            "Admitted",
            "Job tiny-train-01234567-1 was admitted by ClusterQueue hyperpod-ns-research-clusterqueue.",
            False,
            id="admitted",
        ),
        pytest.param(
            workload(*reserved(5), evicted("Preempted", PREEMPTED, 60)),
            "False",
            "Preempted",
            PREEMPTED,
            True,
            id="preempted, and its pods are ending",
        ),
        pytest.param(
            workload(pending(PREEMPTED), evicted("Preempted", PREEMPTED, 60)),
            "False",
            "Pending",
            PREEMPTED,
            True,
            id="preempted, and its pods are gone",
        ),
        pytest.param(
            workload(*reserved(5), condition("Finished", "True", "Succeeded", "")),
            "Unknown",
            "Completed",
            "given back",
            False,
            id="done",
        ),
    ],
)
def test_the_state_has_kueues_own_reason_and_words(
    raw: dict[str, Any], status: str, reason: str, words: str, waits: bool
) -> None:
    found = state(raw)
    assert found is not None
    assert (found.status, found.reason, found.waits) == (status, reason, waits)
    assert words in found.message


@pytest.mark.parametrize(
    ("moment", "status", "reason", "words"),
    [
        ("first: first admitted, second waiting for quota", "True", "Admitted", "hyperpod-ns-research-clusterqueue"),
        ("second: first admitted, second waiting for quota", "False", "Pending", "100m more needed"),
        ("first: first finished, second admitted", "Unknown", "Completed", "given back"),
        ("low: low evicted, at once", "False", "Pending", "insufficient unused quota for cpu in flavor ml.local"),
        ("low: high finished, low admitted again", "True", "Admitted", "hyperpod-ns-research-clusterqueue"),
        ("too-big: asks for more than the quota", "False", "Pending", "request > maximum capacity (500m > 100m)"),
        (
            "undeclared: asks for a resource that the queue does not cover",
            "False",
            "Pending",
            "resource aws.amazon.com/neuron unavailable in ClusterQueue",
        ),
        ("no-queue: the LocalQueue does not exist", "False", "Inadmissible", "LocalQueue no-such-queue doesn't exist"),
        ("runs: ClusterQueue on HoldAndDrain", "False", "Inadmissible", "is inactive"),
        ("runs: ClusterQueue open again", "True", "Admitted", "hyperpod-ns-research-clusterqueue"),
        ("runs: the Workload is deactivated by a person", "False", "Deactivated", '"active":true'),
        ("held2: LocalQueue on Hold", "False", "Inadmissible", "hyperpod-ns-research-localqueue is inactive"),
        (
            "on-broken: the ClusterQueue is inactive: its flavor does not exist",
            "False",
            "Inadmissible",
            "ClusterQueue broken is inactive",
        ),
    ],
)
def test_what_the_real_kueue_wrote_is_said_in_its_words(moment: str, status: str, reason: str, words: str) -> None:
    found = state(recorded()[moment])
    assert found is not None
    assert (found.status, found.reason, found.waits) == (status, reason, status == "False")
    assert words in found.message


def test_a_deactivated_workload_says_how_it_comes_back() -> None:
    raw = workload(pending("x"), evicted("DeactivatedDueToRequeuingLimitExceeded", "The workload is deactivated", 60))
    raw["spec"]["active"] = False
    found = state(raw)
    assert found is not None
    assert found.reason == "DeactivatedDueToRequeuingLimitExceeded"
    assert found.message.startswith("The workload is deactivated. ")
    assert """kubectl patch workload job-tiny-train-01234567-1-0a1b2 -n team-a --type=merge""" in found.message


@pytest.mark.parametrize("policy", ["perStage", "wholePipeline"])
def test_without_kueue_what_runs_goes_on_and_what_does_not_waits_with_the_remedy(policy: str) -> None:
    def of(k8s_job: K8sJob | None) -> QueueState:
        job = make_job(queue={**QUEUE, "policy": policy})
        found = derive_queue_state(job, k8s_job, None, kueue_installed=False, now=at(60))
        assert found is not None
        return found

    held = of(K8sJob() if policy == "perStage" else None)
    assert (held.status, held.reason, held.waits) == ("False", "QueueUnavailable", True)
    assert "Install Kueue, or remove spec.queue" in held.message
    running = of(K8sJob(suspended=False, started_at=NOW))
    assert (running.status, running.waits) == ("Unknown", False)


def test_a_job_that_kueue_does_not_take_up_is_told_of_after_a_while() -> None:
    early, late = state(None, seconds=NO_WORKLOAD_SECONDS - 1), state(None, seconds=NO_WORKLOAD_SECONDS)
    assert early is not None
    assert late is not None
    assert (early.reason, late.reason) == ("Queued", "QueueUnavailable")
    assert "WorkloadPriorityClass fine-tuning-priority" in late.message
    assert no_workload_at(K8sJob()) == NOW + timedelta(seconds=NO_WORKLOAD_SECONDS)


def test_between_stages_nothing_waits() -> None:
    found = derive_queue_state(make_job(queue=QUEUE), None, None, kueue_installed=True, now=NOW)
    assert found is not None
    assert (found.status, found.waits) == ("Unknown", False)


def test_a_whole_pipeline_is_judged_by_its_reservation_and_not_by_a_stages_job() -> None:
    job = make_job(queue={**QUEUE, "policy": "wholePipeline"})

    def of(raw: dict[str, Any] | None) -> QueueState:
        parsed = None if raw is None else parse_workload(raw)
        found = derive_queue_state(job, K8sJob(suspended=False), parsed, kueue_installed=True, now=NOW)
        assert found is not None
        return found

    assert of(None).waits
    assert of(workload(*reserved(5))).message.startswith("The whole pipeline was admitted by ClusterQueue")
    assert of(workload(pending(SHORT_OF))).message == SHORT_OF


def test_the_wait_is_counted_to_the_admission_or_to_now() -> None:
    admitted, waiting = parse_workload(workload(*reserved(30))), parse_workload(workload(pending(SHORT_OF)))
    assert queue_wait_seconds(at(10), admitted, at(500)) == 20
    assert queue_wait_seconds(at(10), waiting, at(40)) == 30
    assert queue_wait_seconds(at(10), None, at(40)) == 30
    assert queue_wait_seconds(at(31), admitted, at(40)) == 0
    assert queue_wait_seconds(None, admitted, at(40)) is None
