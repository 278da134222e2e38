"""queue.policy wholePipeline: one Workload of Kueue, made by the operator, that holds the quota of every stage.

Called by desired.py and reconcile.py. The Workload has one pod set that covers each stage: as many pods as the training
has, each with the largest request of any stage. Kueue admits, accounts and evicts it like any other, and nothing else
touches it: Kueue's job controllers look only at Workloads of owners that they know, and its finalizer is put on those
alone, so this one is gone when it is deleted, and its quota is free (Delete in pkg/controller/core/
workload_controller.go). The stages' Jobs carry no queue label and take the nodes of the flavors that Kueue assigned. An
evicted reservation keeps its quota until it is deleted, which happens when the last pod has ended; a new one then waits
in its place. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from finetune_operator.api import constants
from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.api.spec import Queue
from finetune_operator.core import names
from finetune_operator.core.quantities import parse_quantity
from finetune_operator.core.queueing import GROUP, PodSetUpdate, Raw, Workload
from finetune_operator.core.times import format_time
from finetune_trainer import contract

KIND = "Workload"
POD_SET = "main"
LABEL_NUMBER = f"{constants.PREFIX}reservation"
"""Number of the job's reservation, 1 for the first: each eviction is followed by the next."""
LABEL_DIGEST = f"{constants.PREFIX}reservation-digest"
"""First 16 hexadecimal digits of the digest of what it reserves."""
LABEL_OWNER_UID = f"{GROUP}/job-uid"
"""Kueue names the preemptor by this label in the message for whoever is preempted."""


@dataclass(frozen=True)
class StageRequest:
    """What one stage needs of a queue: its pods, and for each of them resources and the nodes it may be on."""

    pods: int
    requests: Mapping[str, str]
    """Kubernetes quantities by resource, of one pod."""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    affinity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReservationPlan:
    """What to do about the reservation now, deletion first. `admitted` says whether stages may start and go on."""

    admitted: bool = False
    delete: str | None = None
    create: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Placement:
    """What an admission adds to a stage's pods, as Kueue itself does for the Jobs that it admits."""

    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


def stage_request(template: Mapping[str, Any], pods: int) -> StageRequest:
    """The request of a stage whose Job has that pod template (core/pods.py) and number of pods.

    A limit without a request is the request, as the API server has it. A stage's pod has one container.
    """
    spec = template["spec"]
    (container,) = spec["containers"]
    resources = container.get("resources") or {}
    return StageRequest(
        pods=pods,
        requests={**(resources.get("limits") or {}), **(resources.get("requests") or {})},
        node_selector=dict(spec.get("nodeSelector") or {}),
        tolerations=tuple(dict(toleration) for toleration in spec.get("tolerations") or ()),
        affinity=dict(spec.get("affinity") or {}),
    )


def largest_requests(stages: Iterable[StageRequest]) -> dict[str, str]:
    """The largest request for each resource of any stage's pod."""
    largest: dict[str, str] = {}
    for stage in stages:
        for resource, quantity in stage.requests.items():
            if resource not in largest or parse_quantity(quantity) > parse_quantity(largest[resource]):
                largest[resource] = quantity
    return dict(sorted(largest.items()))


def reservation_manifest(
    job: FineTuneJob,
    stages: Mapping[str, StageRequest],
    api_version: str,
    *,
    number: int = 1,
    priority: int | None = None,
) -> dict[str, Any]:
    """The Workload to create; ValueError for a job without spec.queue, or with a priority class and no `priority`.

    `stages` has every stage that the job runs, train among them, since its pods decide the nodes. `priority` is the
    value of the job's WorkloadPriorityClass, which Kueue wants beside the name.
    """
    queue = _queue(job)
    spec = _spec(job, stages)
    digest = _digest(spec)
    if queue.priority_class is not None:
        if priority is None:
            raise ValueError(f"the value of WorkloadPriorityClass {queue.priority_class} is not known")
        spec |= {"priority": priority, **_priority_class(queue.priority_class, api_version)}
    mark = hashlib.sha256(f"{job.uid}/{digest}".encode()).hexdigest()
    return {
        "apiVersion": api_version,
        "kind": KIND,
        "metadata": {
            "name": names.child_name(job.name, "queue", mark, number),
            "namespace": job.namespace,
            "labels": {
                **names.job_labels(job.name, job.uid),
                LABEL_NUMBER: str(number),
                LABEL_DIGEST: digest,
                LABEL_OWNER_UID: job.uid,
            },
            "ownerReferences": [
                {
                    "apiVersion": constants.API_VERSION,
                    "kind": constants.KIND,
                    "name": job.name,
                    "uid": job.uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": spec,
    }


def _queue(job: FineTuneJob) -> Queue:
    if job.spec.queue is None:
        raise ValueError("a job without spec.queue reserves nothing")
    return job.spec.queue


def _spec(job: FineTuneJob, stages: Mapping[str, StageRequest]) -> dict[str, Any]:
    template = {"spec": _pod_spec(stages[contract.TRAIN], largest_requests(stages.values()))}
    count = max(stage.pods for stage in stages.values())
    return {"queueName": _queue(job).name, "podSets": [{"name": POD_SET, "count": count, "template": template}]}


def _digest(spec: Mapping[str, Any]) -> str:
    return contract.digest_of(spec).removeprefix("sha256:")[:16]


def _pod_spec(train: StageRequest, requests: Mapping[str, str]) -> dict[str, Any]:
    """Kueue reads requests, selector, affinity and tolerations of a pod set's template; no pod is made from it."""
    spec: dict[str, Any] = {
        "containers": [{"name": constants.CONTAINER_NAME, "resources": {"requests": dict(requests)}}],
        "restartPolicy": "Never",
    }
    if train.node_selector:
        spec["nodeSelector"] = dict(train.node_selector)
    if train.tolerations:
        spec["tolerations"] = [dict(toleration) for toleration in train.tolerations]
    if train.affinity:
        spec["affinity"] = dict(train.affinity)
    return spec


def _priority_class(name: str, api_version: str) -> dict[str, Any]:
    if api_version == f"{GROUP}/v1beta1":
        return {"priorityClassName": name, "priorityClassSource": f"{GROUP}/workloadpriorityclass"}
    return {"priorityClassRef": {"group": GROUP, "kind": "WorkloadPriorityClass", "name": name}}


def plan_reservation(
    job: FineTuneJob,
    workload: Workload | None,
    stages: Mapping[str, StageRequest],
    *,
    api_version: str,
    pods_left: bool,
    needed: bool,
    priority: int | None = None,
) -> ReservationPlan:
    """What to do about the job's reservation.

    `workload` is the newest Workload whose owner is the FineTuneJob. `pods_left` is true while a pod of the job may
    run: quota is given back only after that. `needed` is false for a job that is suspended or at its end. Nothing is
    created while the job's priority class has no known value.
    """
    can_create = _queue(job).priority_class is None or priority is not None

    def create(number: int) -> dict[str, Any] | None:
        return reservation_manifest(job, stages, api_version, number=number, priority=priority) if can_create else None

    if workload is None:
        return ReservationPlan(create=create(1) if needed else None)
    if workload.deleting:
        return ReservationPlan()
    if not needed:
        return ReservationPlan(delete=None if pods_left else workload.name)
    if not workload.active:
        return ReservationPlan()  # somebody, or a limit of Kueue's, took it out of the queue: not ours to put back
    # Quota that is held stays as it was asked for: an upgrade may ask for more, and restarts nothing.
    fits = workload.quota_reserved or _digest(_spec(job, stages)) == workload.labels.get(LABEL_DIGEST)
    if workload.evicted is None and not workload.finished and fits:
        return ReservationPlan(admitted=workload.admitted)
    if pods_left:
        return ReservationPlan()
    return ReservationPlan(delete=workload.name, create=create(_number(workload) + 1))


def _number(workload: Workload) -> int:
    text = workload.labels.get(LABEL_NUMBER, "")
    return int(text) if text.isdigit() else 1


def assigned_flavors(workload: Workload) -> tuple[str, ...]:
    """Names of the ResourceFlavors that the admission assigned, each once."""
    return tuple(dict.fromkeys(workload.flavors.values()))


def flavor_placement(workload: Workload, flavors: Mapping[str, Raw]) -> Placement:
    """What the admission adds to each stage's pods. `flavors` maps each assigned ResourceFlavor's name to the object.

    As Kueue's podset.FromAssignment and Merge: the first value of a key stays. KeyError for a flavor that is missing:
    pods must not be placed as if it asked for nothing.
    """
    specs = [flavors[name].get("spec") or {} for name in assigned_flavors(workload)]
    parts = [
        PodSetUpdate(node_selector=spec.get("nodeLabels") or {}, tolerations=tuple(spec.get("tolerations") or ()))
        for spec in specs
    ]
    parts += workload.updates
    tolerations: list[Mapping[str, Any]] = []
    for part in parts:
        tolerations += [dict(each) for each in part.tolerations if dict(each) not in tolerations]
    return Placement(
        node_selector=_merged(part.node_selector for part in parts),
        tolerations=tuple(tolerations),
        labels=_merged(part.labels for part in parts),
        annotations=_merged(part.annotations for part in parts),
    )


def _merged(maps: Iterable[Mapping[str, str]]) -> dict[str, str]:
    merged: dict[str, str] = {}
    for values in maps:
        merged = {**values, **merged}
    return dict(sorted(merged.items()))


def ready_manifest(workload: Workload, namespace: str, api_version: str, now: datetime) -> dict[str, Any] | None:
    """The server-side apply of the reservation's status that says its pods run; None when it says so already.

    Where Kueue is configured with waitForPodsReady it evicts what has no PodsReady condition after a while (5 minutes
    by default) and may hold all other admissions until then. Kueue's job controllers set the condition for their own
    kinds; a reservation has only us. To be applied once every pod of a stage runs.
    """
    if workload.pods_ready or not workload.admitted:
        return None
    condition = {
        "type": "PodsReady",
        "status": "True",
        "reason": "Started",
        "message": "All pods of the current stage run.",
        "lastTransitionTime": format_time(now),
    }
    return {
        "apiVersion": api_version,
        "kind": KIND,
        "metadata": {"name": workload.name, "namespace": namespace, "uid": workload.uid},
        "status": {"conditions": [condition]},
    }
