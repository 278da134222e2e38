"""What around a job decides whether its next attempt can begin: claim, Secrets, quotas, queue, names of devices.

Called by reconcile.py. The reads are here, through kube/observe.py's Facts; what they mean is decided in the core.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from finetune_operator.api.constants import Reason, StageState
from finetune_operator.api.finetunejob import FineTuneJob, Problem, unavailable_features
from finetune_operator.api.status import PlanStatus
from finetune_operator.core import reservation
from finetune_operator.core.accelerators import find_instance
from finetune_operator.core.accelerators.instances import InstanceType
from finetune_operator.core.desired import Manifest, stage_job
from finetune_operator.core.device_names import DeviceName, Mismatch, find_device_resource
from finetune_operator.core.failure import Waiting
from finetune_operator.core.inputs import (
    Start,
    is_skipped,
    job_parallelism,
    secret_references,
    stage_config,
    stage_names,
    start_attempt,
)
from finetune_operator.core.model_shapes import ModelShape, find_shape
from finetune_operator.core.observed import Claim, Observed
from finetune_operator.core.parallelism import Parallelism
from finetune_operator.core.plan import derive_plan
from finetune_operator.core.pods import Placement
from finetune_operator.core.preflight import (
    check_cluster,
    check_spec,
    parse_claim,
    parse_cluster_queue,
    parse_quota,
    pod_memory_bytes,
    pod_requests,
    spec_doubts,
)
from finetune_operator.core.prerequisites import find_missing
from finetune_operator.core.settings import Settings
from finetune_operator.core.stages import Pipeline
from finetune_operator.kube.observe import Facts
from finetune_trainer import contract


@dataclass(frozen=True)
class QueuePlan:
    """What is to be done about a job's reservation, none for a job without one. `path` is of the Workloads."""

    path: str = ""
    delete: str | None = None
    create: Mapping[str, Any] | None = None
    ready: Mapping[str, Any] | None = None
    placement: Placement | None = None
    problem: Waiting | None = None


async def find_device(
    facts: Facts, job: FineTuneJob, observed: Observed, settings: Settings, kueue_version: str | None
) -> DeviceName | Mismatch | None:
    """The name under which the cluster offers the job's devices; None for CPUs. InstanceTypeError as find_instance."""
    instance = find_instance(job, settings.instance_types)
    if instance is None:
        return None
    cluster_queue = await _find_cluster_queue(facts, job, kueue_version)
    covered, name = None, ""
    if cluster_queue is not None:
        name = cluster_queue["metadata"]["name"]
        groups = (cluster_queue.get("spec") or {}).get("resourceGroups") or ()
        covered = frozenset(resource for group in groups for resource in group.get("coveredResources") or ())
    return find_device_resource(observed.nodes.values(), instance, covered, name)


async def _find_cluster_queue(facts: Facts, job: FineTuneJob, kueue_version: str | None) -> Mapping[str, Any] | None:
    queue = job.spec.queue
    if queue is None or kueue_version is None:
        return None
    local = await facts.find_at(f"/apis/{kueue_version}/namespaces/{job.namespace}/localqueues/{queue.name}")
    name = ((local or {}).get("spec") or {}).get("clusterQueue")
    return await facts.find_at(f"/apis/{kueue_version}/clusterqueues/{name}") if name else None


async def plan_queue(
    facts: Facts,
    job: FineTuneJob,
    observed: Observed,
    pipeline: Pipeline,
    settings: Settings,
    kueue_version: str | None,
    now: datetime,
) -> QueuePlan:
    """What is to be done about the reservation of a job with queue.policy wholePipeline; nothing for any other."""
    queue = job.spec.queue
    if queue is None or queue.policy != "wholePipeline" or kueue_version is None:
        return QueuePlan()
    workload = observed.workloads.get(job.uid)
    priority = None
    if queue.priority_class is not None:
        found = await facts.find_at(f"/apis/{kueue_version}/workloadpriorityclasses/{queue.priority_class}")
        priority = (found or {}).get("value")
        if priority is None:
            message = (
                f"There is no WorkloadPriorityClass {queue.priority_class}: create it, or correct "
                "spec.queue.priorityClass (suspend the job first)."
            )
            return QueuePlan(problem=Waiting(Reason.QUEUE_UNAVAILABLE, message))
    current = pipeline.current
    plan = reservation.plan_reservation(
        job,
        workload,
        stage_requests(job, settings),
        api_version=kueue_version,
        pods_left=observed.is_anything_live(),
        needed=current is not None and current.state is not StageState.FAILED and not job.spec.suspend,
        priority=priority,
    )
    path = f"/apis/{kueue_version}/namespaces/{job.namespace}/workloads"
    made = QueuePlan(path, plan.delete, plan.create)
    if not plan.admitted or workload is None:
        return made
    if current is not None and current.state is StageState.RUNNING:
        made = replace(made, ready=reservation.ready_manifest(workload, job.namespace, kueue_version, now))
    flavors = {}
    for name in reservation.assigned_flavors(workload):
        flavor = await facts.find_at(f"/apis/{kueue_version}/resourceflavors/{name}")
        if flavor is None:
            message = (
                f"ResourceFlavor {name} of the job's reservation cannot be read: create it, or let the operator get it."
            )
            return replace(made, problem=Waiting(Reason.QUEUE_UNAVAILABLE, message))
        flavors[name] = flavor
    extra = reservation.flavor_placement(workload, flavors)
    return replace(made, placement=Placement(node_selector=extra.node_selector, tolerations=extra.tolerations))


def stage_requests(job: FineTuneJob, settings: Settings) -> dict[str, reservation.StageRequest]:
    """What each stage that the job runs asks of a queue."""
    return {
        stage: reservation.stage_request(manifest["spec"]["template"], manifest["spec"]["completions"])
        for stage, manifest in planned_jobs(job, settings, None).items()
    }


def planned_jobs(job: FineTuneJob, settings: Settings, device_resource: str | None) -> dict[str, Manifest]:
    """The Job of each stage that the job runs, as far as it is known before the stages before it have ended."""
    jobs = {}
    for stage in stage_names(job):
        if is_skipped(job, stage):
            continue
        config, digest = stage_config(job, stage, {}, settings.trainer_image, settings)
        start = start_attempt(job, stage, 1, config, digest, settings.trainer_image, settings, device_resource)
        jobs[stage] = stage_job(job, start, settings, Placement())
    return jobs


def reported_model(pipeline: Pipeline) -> Mapping[str, Any] | None:
    """The base model's sizes as prepare has reported them; None before that."""
    prepare = next((stage for stage in pipeline.stages if stage.name == contract.PREPARE), None)
    report = prepare.success.report if prepare is not None and prepare.success is not None else None
    model = report.metrics.get("model") if report is not None else None
    return model if isinstance(model, Mapping) else None


def check_job(job: FineTuneJob, pipeline: Pipeline, settings: Settings, jobs: Mapping[str, Manifest]) -> Preflight:
    """The arithmetic of the spec against the devices; of the model's sizes too where they are known."""
    instance = find_instance(job, settings.instance_types)
    parallelism = job_parallelism(job, settings)
    shape = find_shape(job, reported_model(pipeline), settings.model_shapes)
    memory = pod_memory_bytes(jobs[contract.TRAIN])
    problems = check_spec(job, parallelism, shape, instance, pod_memory_bytes=memory)
    return Preflight(parallelism, shape, instance, memory, problems)


@dataclass(frozen=True)
class Preflight:
    """What check_job found, and from what."""

    parallelism: Parallelism
    shape: ModelShape | None
    instance: InstanceType | None
    pod_memory_bytes: int | None
    problems: tuple[Problem, ...]


async def plan_job(
    facts: Facts,
    job: FineTuneJob,
    pipeline: Pipeline,
    settings: Settings,
    device: DeviceName | Mismatch | None,
    kueue_version: str | None,
) -> PlanStatus:
    """What spec.dryRun reports."""
    jobs = planned_jobs(job, settings, device.name if isinstance(device, DeviceName) else None)
    found = check_job(job, pipeline, settings, jobs)
    gated = unavailable_features(
        job.spec.model_copy(update={"dry_run": False}), settings.features, queue_enabled=settings.queue_enabled
    )
    doubts = spec_doubts(job, found.parallelism, found.shape, found.instance, pod_memory_bytes=found.pod_memory_bytes)
    waiting = await _check_cluster(facts, job, next(iter(jobs)), jobs, kueue_version)
    notes = [*doubts, *([waiting.message] if waiting is not None else [])]
    if isinstance(device, Mismatch):
        notes.append(device.message)
    return derive_plan(
        job,
        settings,
        jobs,
        found.parallelism,
        found.shape,
        found.instance,
        problems=(*gated, *found.problems),
        notes=notes,
        pod_memory_bytes=found.pod_memory_bytes,
    )


async def _check_cluster(
    facts: Facts, job: FineTuneJob, due: str, jobs: Mapping[str, Manifest], kueue_version: str | None
) -> Waiting | None:
    """What quotas and the claim say of the stage that is due and of those after it."""
    claim, quotas, queue = await asyncio.gather(
        facts.find_claim(job.namespace, job.spec.workspace.claim_name),
        facts.find_quotas(job.namespace),
        _find_cluster_queue(facts, job, kueue_version),
    )
    requests = [pod_requests(stage, manifest) for stage, manifest in jobs.items()] if quotas or queue else []
    return check_cluster(
        job,
        due,
        requests,
        parse_claim(job.spec.workspace.claim_name, claim),
        [parse_quota(quota) for quota in quotas],
        parse_cluster_queue(queue) if queue is not None else None,
    )


async def check_surroundings(
    facts: Facts,
    job: FineTuneJob,
    observed: Observed,
    start: Start,
    jobs: Mapping[str, Manifest],
    device: DeviceName | Mismatch | None,
    kueue_version: str | None,
) -> tuple[Observed, Waiting | None]:
    """(observed with what was looked up, what keeps the attempt from being begun or None)."""
    name = job.spec.workspace.claim_name
    references = [secret_references(job)[secret] for secret in start.config.secrets]
    claim, secrets = await asyncio.gather(
        facts.find_claim(job.namespace, name),
        facts.find_secret_keys(job.namespace, (secret for secret, _ in references)),
    )
    phase = None if claim is None else str((claim.get("status") or {}).get("phase") or "Pending")
    modes = tuple(((claim or {}).get("spec") or {}).get("accessModes") or ())
    observed = replace(observed, claim=Claim(name, phase, modes), secrets=secrets)
    problem = find_missing(job, observed, start)
    if problem is None and isinstance(device, Mismatch):
        problem = Waiting(device.reason, device.message)
    if problem is None:
        stages = list(jobs)
        left = {stage: jobs[stage] for stage in stages[stages.index(start.config.stage) :]}
        problem = await _check_cluster(facts, job, start.config.stage, left, kueue_version)
    return observed, problem
