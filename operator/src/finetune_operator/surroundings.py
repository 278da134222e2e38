"""What around a job decides whether its next attempt can begin: claim, Secrets, quotas, queue, names of devices; and
what events say of one that does not start.

Called by reconcile.py. The reads are here, through kube/observe.py's Facts; what they mean is decided in the core.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from finetune_operator.api.constants import Reason, StageState
from finetune_operator.api.finetunejob import FineTuneJob, unavailable_features
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
from finetune_operator.core.pods import Placement, container_env, container_resources
from finetune_operator.core.preflight import (
    Findings,
    check_cluster,
    check_environments,
    check_pair,
    check_spec,
    memory_limit,
    pair_doubts,
    parse_claim,
    parse_cluster_queue,
    parse_quota,
    pod_requests,
    spec_doubts,
)
from finetune_operator.core.prerequisites import find_missing
from finetune_operator.core.settings import Settings
from finetune_operator.core.silence import to_ask
from finetune_operator.core.stages import DONE, Pipeline
from finetune_operator.kube.observe import Facts, Forbidden
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
    try:
        local = await facts.find_at(f"/apis/{kueue_version}/namespaces/{job.namespace}/localqueues/{queue.name}")
        name = ((local or {}).get("spec") or {}).get("clusterQueue")
        return await facts.find_at(f"/apis/{kueue_version}/clusterqueues/{name}") if name else None
    except Forbidden:
        return None  # nothing is checked against it then, and Kueue's own words say what is wrong


_GRANT = "have queue.clusterQueues set in the values of the operator's chart"
"""What lets the operator read Kueue's objects without a namespace."""


_PLURALS = {"WorkloadPriorityClass": "workloadpriorityclasses", "ResourceFlavor": "resourceflavors"}


async def _find_queue_object(
    facts: Facts, kueue_version: str, kind: str, name: str, missing: str
) -> Mapping[str, Any] | Waiting:
    """One of Kueue's objects without a namespace, or why it cannot be read; `missing`: what to do where it is not."""
    try:
        found = await facts.find_at(f"/apis/{kueue_version}/{_PLURALS[kind]}/{name}")
    except Forbidden:
        message = f"The operator may not read {kind} {name}, so the pipeline's quota cannot be asked for: {_GRANT}, "
        return Waiting(Reason.QUEUE_UNAVAILABLE, message + "or use spec.queue.policy perStage (suspend the job first).")
    if found is None:
        return Waiting(Reason.QUEUE_UNAVAILABLE, f"There is no {kind} {name}: {missing}.")
    return found


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
        remedy = "create it, or correct spec.queue.priorityClass (suspend the job first)"
        found = await _find_queue_object(facts, kueue_version, "WorkloadPriorityClass", queue.priority_class, remedy)
        if isinstance(found, Waiting):
            return QueuePlan(problem=found)
        priority = int(found.get("value") or 0)
    current = pipeline.current
    plan = reservation.plan_reservation(
        job,
        workload,
        stage_requests(job, settings),
        api_version=kueue_version,
        pods_left=observed.is_anything_live(),
        needed=current is not None and current.state is not StageState.FAILED and not _holds_still(job),
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
        remedy = "the job's reservation was admitted with it; create it, or take it out of the ClusterQueue"
        flavor = await _find_queue_object(facts, kueue_version, "ResourceFlavor", name, remedy)
        if isinstance(flavor, Waiting):
            return replace(made, problem=flavor)
        flavors[name] = flavor
    extra = reservation.flavor_placement(workload, flavors)
    return replace(made, placement=Placement(node_selector=extra.node_selector, tolerations=extra.tolerations))


def _holds_still(job: FineTuneJob) -> bool:
    return job.spec.suspend or job.spec.dry_run


def stage_requests(job: FineTuneJob, settings: Settings) -> dict[str, reservation.StageRequest]:
    """What each stage that the job runs asks of a queue."""
    return {
        stage: reservation.stage_request(manifest["spec"]["template"], manifest["spec"]["completions"])
        for stage, manifest in planned_jobs(job, settings, planned_starts(job, settings, None)).items()
    }


def planned_starts(
    job: FineTuneJob, settings: Settings, device_resource: str | None, pipeline: Pipeline | None = None
) -> dict[str, Start]:
    """The next attempt of each stage that the job has yet to run, in order; of a whole job without a pipeline.

    An attempt that is due is whole. Of one after it the artifacts that it will read are not known, nor its name.
    """
    plans = {} if pipeline is None else {plan.name: plan for plan in pipeline.stages}
    starts = {}
    for stage in stage_names(job):
        plan = plans.get(stage)
        if is_skipped(job, stage) or (plan is not None and plan.state in DONE):
            continue
        if plan is not None and plan.start is not None:
            starts[stage] = plan.start
            continue
        default = settings.image_of(stage, job.spec.accelerator.type)
        config, digest = stage_config(job, stage, {}, job.spec.stages.of(stage).image or default, settings)
        starts[stage] = start_attempt(job, stage, 1, config, digest, default, settings, device_resource)
    return starts


def planned_jobs(job: FineTuneJob, settings: Settings, starts: Mapping[str, Start]) -> dict[str, Manifest]:
    """The Job of each of these attempts, as it would be made."""
    return {stage: stage_job(job, start, settings, Placement()) for stage, start in starts.items()}


def due_jobs(job: FineTuneJob, settings: Settings, start: Start, pipeline: Pipeline) -> dict[str, Manifest]:
    """The Jobs of the attempt that is due and of the stages after it."""
    return planned_jobs(job, settings, planned_starts(job, settings, start.device_resource, pipeline))


def _reported(pipeline: Pipeline) -> Mapping[str, Any]:
    """The figures of prepare's report; none before that."""
    prepare = next((stage for stage in pipeline.stages if stage.name == contract.PREPARE), None)
    report = prepare.success.report if prepare is not None and prepare.success is not None else None
    return {} if report is None else report.metrics


def check_job(job: FineTuneJob, pipeline: Pipeline, settings: Settings) -> Preflight:
    """The arithmetic of the spec against the devices; of the model's sizes too where they are known.

    A training that is done needs no device: whatever a newer table says of it, there is nothing to find any more.
    """
    instance = find_instance(job, settings.instance_types)
    parallelism = job_parallelism(job, settings)
    model = _reported(pipeline).get("model")
    shape = find_shape(job, model if isinstance(model, Mapping) else None, settings.model_shapes)
    memory = memory_limit(container_resources(job, contract.TRAIN, settings, None)[1])
    if any(stage.name == contract.TRAIN and stage.state in DONE for stage in pipeline.stages):
        return Preflight(parallelism, shape, instance, memory, Findings())
    problems = check_spec(job, parallelism, shape, instance, pod_memory_bytes=memory)
    doubts = spec_doubts(job, parallelism, shape, instance, pod_memory_bytes=memory)
    refused = None
    if job.spec.accelerator.type == "neuron":
        stages = [stage for stage in (contract.COMPILE, contract.TRAIN) if not is_skipped(job, stage)]
        images = [job.spec.stages.of(stage).image or settings.image_of(stage, "neuron") for stage in stages]
        refused, doubts = check_pair(instance, images), (*doubts, *pair_doubts(instance, images))
        problems = (*problems, *check_environments({stage: container_env(job, stage, settings) for stage in stages}))
    if problems:
        refused = refused or Waiting(Reason.INVALID_SPEC, "; ".join(map(str, problems)))
    return Preflight(parallelism, shape, instance, memory, Findings(refused, doubts))


def check_features(job: FineTuneJob, settings: Settings) -> Waiting | None:
    """What the spec asks for and this installation does not have, as a refusal; None when it has all of it."""
    lacks_image = [
        stage for stage in stage_names(job) if settings.lacks_neuron_image(stage) and not is_skipped(job, stage)
    ]
    problems = unavailable_features(
        job.spec, settings.features, queue_enabled=settings.queue_enabled, lacks_image=lacks_image
    )
    return Waiting(Reason.FEATURE_NOT_AVAILABLE, "; ".join(map(str, problems))) if problems else None


@dataclass(frozen=True)
class Preflight:
    """What check_job found, and from what."""

    parallelism: Parallelism
    shape: ModelShape | None
    instance: InstanceType | None
    pod_memory_bytes: int | None
    findings: Findings


async def plan_job(
    facts: Facts,
    job: FineTuneJob,
    observed: Observed,
    pipeline: Pipeline,
    settings: Settings,
    device: DeviceName | Mismatch | None,
    kueue_version: str | None,
) -> tuple[PlanStatus, Findings]:
    """What spec.dryRun reports of the stages that the job has yet to run, and what the checks of its spec say."""
    starts = planned_starts(job, settings, device.name if isinstance(device, DeviceName) else None, pipeline)
    current = pipeline.current
    under_way = current.name if current is not None and current.start is not None and not current.is_new else None
    if under_way is not None:
        del starts[under_way]
    jobs = planned_jobs(job, settings, starts)
    found = check_job(job, pipeline, settings)
    refused = check_features(job, settings) or found.findings.refused
    waiting = None
    if starts:
        first = next(iter(starts.values()))
        _, waiting = await check_surroundings(facts, job, observed, first, lambda: jobs, device, kueue_version)
    steps = _reported(pipeline).get("maxSteps")
    plan = derive_plan(
        job,
        settings,
        jobs,
        found.parallelism,
        found.shape,
        found.instance,
        total_steps=steps if isinstance(steps, int) else None,
        refused=refused,
        doubts=found.findings.doubts,
        waiting=waiting,
        under_way=under_way,
        first_is_named=under_way is None and (not observed.attempts or (current is not None and current.is_new)),
        pod_memory_bytes=found.pod_memory_bytes,
    )
    return plan, Findings(refused, found.findings.doubts)


async def hear_silent(facts: Facts, job: FineTuneJob, observed: Observed, now: datetime) -> Observed:
    """Observed with the newest warning about each child that does not start and does not say why.

    Most often there is none, and nothing is asked.
    """
    silent = () if job.spec.suspend else to_ask(observed.attempts, now)
    if not silent:
        return observed
    notes = await asyncio.gather(*(facts.find_warning(job.namespace, each.uid) for each in silent))
    told = zip(silent, notes, strict=True)
    return replace(observed, events={each.name: note for each, note in told if note is not None})


async def _check_cluster(
    facts: Facts, job: FineTuneJob, due: str, jobs: Callable[[], Mapping[str, Manifest]], kueue_version: str | None
) -> Waiting | None:
    """What quotas and the claim say of the stage that is due and of those after it."""
    claim, quotas, queue = await asyncio.gather(
        facts.find_claim(job.namespace, job.spec.workspace.claim_name),
        facts.find_quotas(job.namespace),
        _find_cluster_queue(facts, job, kueue_version),
    )
    requests = [pod_requests(stage, manifest) for stage, manifest in jobs().items()] if quotas or queue else []
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
    jobs: Callable[[], Mapping[str, Manifest]],
    device: DeviceName | Mismatch | None,
    kueue_version: str | None,
) -> tuple[Observed, Waiting | None]:
    """(observed with what was looked up, what keeps the attempt from being begun or None).

    `jobs` makes those of the attempt and of the stages after it; asked only where there is a quota or queue to hold
    them against.
    """
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
        problem = await _check_cluster(facts, job, start.config.stage, jobs, kueue_version)
    return observed, problem
