"""The one Workload of queue.policy wholePipeline: what it asks for, when it is made anew, where it puts the pods."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from builders import make_job
from workloads import at, reserved

from finetune_operator.core.queueing import Eviction, PodSetUpdate, Workload, parse_workload
from finetune_operator.core.reservation import (
    LABEL_NUMBER,
    Placement,
    ReservationPlan,
    StageRequest,
    assigned_flavors,
    flavor_placement,
    largest_requests,
    plan_reservation,
    ready_manifest,
    reservation_manifest,
    stage_request,
)

OLD, NEW = "kueue.x-k8s.io/v1beta1", "kueue.x-k8s.io/v1beta2"
JOB = make_job(queue={"name": "q", "priorityClass": "fine-tuning-priority", "policy": "wholePipeline"})
PLAIN = make_job(queue={"name": "q", "policy": "wholePipeline"})
TRAIN = StageRequest(
    4,
    {"cpu": "96", "memory": "400Gi", "aws.amazon.com/neuron": "16"},
    node_selector={"node.kubernetes.io/instance-type": "ml.trn1.32xlarge"},
    tolerations=({"key": "aws.amazon.com/neuron", "operator": "Exists"},),
)
MERGE = StageRequest(1, {"cpu": "500m", "memory": "480Gi", "ephemeral-storage": "50Gi"}, node_selector={"cheap": "yes"})
STAGES = {"prepare": StageRequest(1, {"cpu": "500m", "memory": "2Gi"}), "train": TRAIN, "merge": MERGE}


def plan(workload: Workload | None, *, pods_left: bool = False, needed: bool = True, job: Any = PLAIN) -> Any:
    return plan_reservation(job, workload, STAGES, api_version=OLD, pods_left=pods_left, needed=needed, priority=None)


def held(**changes: Any) -> Workload:
    """The reservation as it is read back once Kueue has admitted it."""
    raw = reservation_manifest(PLAIN, STAGES, OLD, number=3)
    raw["metadata"]["uid"] = "w-3"
    raw["status"] = {"conditions": list(reserved(5)), "admission": {"clusterQueue": "cq", "podSetAssignments": []}}
    return replace(parse_workload(raw), **changes)


def test_it_asks_for_the_most_that_any_stage_needs_on_as_many_pods_as_train_has() -> None:
    manifest = reservation_manifest(JOB, STAGES, OLD, priority=50)
    assert manifest["spec"] == {
        "queueName": "q",
        "priority": 50,
        "priorityClassName": "fine-tuning-priority",
        "priorityClassSource": "kueue.x-k8s.io/workloadpriorityclass",
        "podSets": [
            {
                "name": "main",
                "count": 4,
                "template": {
                    "spec": {
                        "restartPolicy": "Never",
                        "nodeSelector": {"node.kubernetes.io/instance-type": "ml.trn1.32xlarge"},
                        "tolerations": [{"key": "aws.amazon.com/neuron", "operator": "Exists"}],
                        "containers": [
                            {
                                "name": "stage",
                                "resources": {
                                    "requests": {
                                        "aws.amazon.com/neuron": "16",
                                        "cpu": "96",
                                        "ephemeral-storage": "50Gi",
                                        "memory": "480Gi",
                                    }
                                },
                            }
                        ],
                    }
                },
            }
        ],
    }


def test_it_belongs_to_the_job_and_has_no_finalizer() -> None:
    metadata = reservation_manifest(JOB, STAGES, OLD, priority=50)["metadata"]
    (owner,) = metadata["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"]) == ("FineTuneJob", JOB.uid, True)
    assert "finalizers" not in metadata
    assert metadata["labels"]["kueue.x-k8s.io/job-uid"] == JOB.uid
    assert metadata["namespace"] == "team-a"


def test_the_newer_version_names_the_priority_class_by_a_reference() -> None:
    spec = reservation_manifest(JOB, STAGES, NEW, priority=50)["spec"]
    assert spec["priorityClassRef"] == {
        "group": "kueue.x-k8s.io",
        "kind": "WorkloadPriorityClass",
        "name": "fine-tuning-priority",
    }
    assert "priorityClassName" not in spec


def test_a_priority_class_without_a_value_is_not_queued_with_priority_0() -> None:
    with pytest.raises(ValueError, match="fine-tuning-priority"):
        reservation_manifest(JOB, STAGES, OLD)
    assert plan(None, job=JOB) == ReservationPlan()


def test_each_reservation_of_a_job_has_its_own_name() -> None:
    one, two = (reservation_manifest(PLAIN, STAGES, OLD, number=number) for number in (1, 2))
    other = reservation_manifest(make_job(queue={"name": "q"}, uid="other"), STAGES, OLD)
    found = {each["metadata"]["name"] for each in (one, two, other)}
    assert len(found) == 3
    assert all(len(name) <= 63 for name in found)
    assert reservation_manifest(PLAIN, STAGES, OLD, number=2) == two


def test_the_largest_request_is_by_value_and_not_by_text() -> None:
    stages = (StageRequest(1, {"cpu": "900m", "memory": "1000Mi"}), StageRequest(1, {"cpu": "1", "memory": "1Gi"}))
    assert largest_requests(stages) == largest_requests(reversed(stages)) == {"cpu": "1", "memory": "1Gi"}


def test_a_stages_request_is_what_its_pod_asks_for_and_a_limit_stands_in_for_a_request() -> None:
    resources = {"requests": {"cpu": "1"}, "limits": {"cpu": "2", "nvidia.com/gpu": "8"}}
    spec = {"containers": [{"name": "stage", "resources": resources}], "nodeSelector": {"a": "b"}}
    assert stage_request({"spec": spec}, 2) == StageRequest(2, {"cpu": "1", "nvidia.com/gpu": "8"}, {"a": "b"})


def test_it_is_made_once_and_stages_start_when_it_is_admitted() -> None:
    first = plan(None)
    assert first.create == reservation_manifest(PLAIN, STAGES, OLD)
    assert not first.admitted
    assert plan(held(admitted=False, quota_reserved=False)) == ReservationPlan()
    assert plan(held()) == ReservationPlan(admitted=True)


def test_an_evicted_one_gives_its_quota_back_when_the_last_pod_has_ended_and_queues_again() -> None:
    evicted = held(evicted=Eviction("Preempted", "x", at(60)))
    assert plan(evicted, pods_left=True) == ReservationPlan()
    following = plan(evicted)
    assert following.delete == evicted.name
    assert following.create["metadata"]["labels"][LABEL_NUMBER] == "4"
    assert following.create["metadata"]["name"] != evicted.name
    assert not following.admitted


def test_one_that_was_taken_out_of_the_queue_is_not_put_back() -> None:
    deactivated = held(active=False, evicted=Eviction("Deactivated", "The workload is deactivated", at(60)))
    assert plan(deactivated) == ReservationPlan()


def test_a_suspended_or_finished_job_gives_it_back_after_its_pods() -> None:
    assert plan(held(), needed=False, pods_left=True) == ReservationPlan()
    assert plan(held(), needed=False) == ReservationPlan(delete=held().name)
    assert plan(None, needed=False) == ReservationPlan()


def test_one_that_is_being_deleted_is_waited_for() -> None:
    assert plan(held(deleting=True)) == ReservationPlan()


def test_an_upgrade_that_asks_for_more_takes_no_quota_away_from_what_runs() -> None:
    def after_upgrade(workload: Workload) -> ReservationPlan:
        stages = {**STAGES, "train": replace(TRAIN, requests={"cpu": "97"})}
        return plan_reservation(PLAIN, workload, stages, api_version=OLD, pods_left=False, needed=True)

    assert after_upgrade(held()) == ReservationPlan(admitted=True)
    waiting = after_upgrade(held(admitted=False, quota_reserved=False))
    assert waiting.delete == held().name
    assert waiting.create is not None


def flavor(labels: dict[str, str], *tolerations: dict[str, str]) -> dict[str, Any]:
    return {"spec": {"nodeLabels": labels, "tolerations": list(tolerations)}}


def test_stages_take_the_nodes_of_the_flavors_and_of_the_admission_checks() -> None:
    spot = {"key": "spot", "operator": "Exists"}
    workload = held(
        flavors={"aws.amazon.com/neuron": "trn1", "cpu": "trn1", "memory": "other"},
        updates=(PodSetUpdate(node_selector={"zone": "a"}, tolerations=(spot,), annotations={"booked": "yes"}),),
    )
    flavors = {"trn1": flavor({"type": "trn1", "pool": "x"}, spot), "other": flavor({"pool": "y"})}
    assert assigned_flavors(workload) == ("trn1", "other")
    assert flavor_placement(workload, flavors) == Placement(
        node_selector={"pool": "x", "type": "trn1", "zone": "a"},
        tolerations=(spot,),
        annotations={"booked": "yes"},
    )


def test_pods_are_not_placed_by_a_flavor_that_is_missing() -> None:
    with pytest.raises(KeyError):
        flavor_placement(held(flavors={"cpu": "gone"}), {})


def test_it_tells_kueue_once_that_its_pods_run() -> None:
    manifest = ready_manifest(held(), "team-a", OLD, at(9))
    assert manifest is not None
    assert manifest["metadata"] == {"name": held().name, "namespace": "team-a", "uid": "w-3"}
    (condition,) = manifest["status"]["conditions"]
    assert (condition["type"], condition["status"], condition["lastTransitionTime"]) == (
        "PodsReady",
        "True",
        "2026-01-02T03:04:14Z",
    )
    assert ready_manifest(held(pods_ready=True), "team-a", OLD, at(9)) is None
    assert ready_manifest(held(admitted=False), "team-a", OLD, at(9)) is None
