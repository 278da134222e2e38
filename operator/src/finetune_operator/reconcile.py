"""reconcile: observe, decide, apply; the one place where they meet. write_report says afterwards how it stands.

Called by the work queue of handlers.py for one FineTuneJob at a time, whatever woke it: the job's own change, a child's
event, a timer, a restart of the operator. What is observed comes from the cache that the watches keep, with our own
writes in it; nothing else is remembered between calls, so it may stop after any line and be called again. Time and
settings are arguments.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial

from finetune_operator.api import constants
from finetune_operator.api.constants import KIND, Reason
from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.core import names
from finetune_operator.core.accelerators import find_instance
from finetune_operator.core.accelerators.instances import InstanceTypeError
from finetune_operator.core.cache import JOB, POD, WORKLOAD, Cache, CachedJob, Key
from finetune_operator.core.desired import STOP_SECONDS, Desired, Record, desired_state
from finetune_operator.core.device_names import DeviceName
from finetune_operator.core.events import derive_events
from finetune_operator.core.failure import Waiting
from finetune_operator.core.figures import Progress
from finetune_operator.core.inputs import secret_references
from finetune_operator.core.log_tail import clean_tail
from finetune_operator.core.observed import Observed
from finetune_operator.core.parallelism import ParallelismError
from finetune_operator.core.plan import derive_cost
from finetune_operator.core.preflight import Findings
from finetune_operator.core.records import outcome_annotations
from finetune_operator.core.settings import Settings
from finetune_operator.core.stages import Pipeline, derive_pipeline, is_finished
from finetune_operator.core.status import derive_status, planned_status, refused_status
from finetune_operator.core.times import seconds_until
from finetune_operator.kube import apply, observe
from finetune_operator.kube.client import Client, ClusterError
from finetune_operator.kube.observe import Facts
from finetune_operator.surroundings import (
    QueuePlan,
    check_features,
    check_job,
    check_surroundings,
    due_jobs,
    find_device,
    hear_silent,
    plan_job,
    plan_queue,
)

logger = logging.getLogger(__name__)

RECHECK_SECONDS = 5.0
"""How often a missing claim or Secret, or a taken name, is looked at again: they are not watched."""

RESYNC_SECONDS = 60.0
"""How often a job under way is looked at without an event: no bug in what wakes may hold a job for longer."""

SETTLE_SECONDS = 1.0
"""After something was stopped, deleted, preempted or made to wait for a queue, the next look."""


@dataclass(frozen=True)
class Cluster:
    """What a reconcile works on: the API server, what the watches know of it, and what was lately looked up."""

    client: Client
    cache: Cache
    facts: Facts
    kueue_version: Callable[[], str | None] = lambda: None
    """apiVersion of Kueue's objects, None where there is no Kueue."""


@dataclass(frozen=True)
class Report:
    """A status to write instead of `before`, derived from the spec of `generation`; first the late records."""

    namespace: str
    name: str
    uid: str
    generation: int
    before: FineTuneJobStatus
    after: FineTuneJobStatus
    records: tuple[Record, ...] = ()


@dataclass(frozen=True)
class Done:
    """What a reconcile leaves behind: when to look again by itself (seconds, None: at the next event), the status to
    write if it differs, and whether the job does not exist."""

    again_after: float | None = None
    report: Report | None = None
    gone: bool = False


async def reconcile(
    cluster: Cluster,
    key: Key,
    settings: Settings,
    now: datetime,
    *,
    progress: Progress | None = None,
) -> Done:
    """Bring one FineTuneJob's children to what its spec asks for now, and its status to what is so.

    ClusterError when the API server refuses or is away: to be tried again. A job that is gone or going is left to the
    garbage collector.
    """
    cached = cluster.cache.find_job(key)
    if cached is None or cached.deleting:
        return Done(gone=cached is None)
    if cached.job is None:
        return _refuse(cached, Reason.INVALID_SPEC, str(cached.error), now)
    job = cached.job
    if is_finished(job):
        return await _expire(cluster, job, now)
    refused = check_features(job, settings)
    if refused is not None and not job.spec.dry_run:
        return _refuse(cached, refused.reason, refused.message, now)
    try:
        return await _advance(cluster, cached, job, settings, now, progress)
    except InstanceTypeError as error:
        return _refuse(cached, Reason.UNKNOWN_INSTANCE_TYPE, str(error), now)
    except ParallelismError as error:
        return _refuse(cached, Reason.INVALID_SPEC, str(error), now)


async def _advance(
    cluster: Cluster,
    cached: CachedJob,
    job: FineTuneJob,
    settings: Settings,
    now: datetime,
    progress: Progress | None,
) -> Done:
    observed = await hear_silent(cluster.facts, job, await _observe(cluster, job), now)
    device = await find_device(cluster.facts, job, observed, settings, cluster.kueue_version())
    pipeline = derive_pipeline(
        job,
        observed,
        settings,
        now,
        progress=progress,
        device_resource=device.name if isinstance(device, DeviceName) else None,
    )
    findings, plan = check_job(job, pipeline, settings).findings, None
    if job.spec.dry_run:
        plan, findings = await plan_job(
            cluster.facts, job, observed, pipeline, settings, device, cluster.kueue_version()
        )
        if not observed.attempts:
            return replace(_report(cached, planned_status(job, plan, findings, now)), again_after=RESYNC_SECONDS)
        pipeline = pipeline.held()
    reservation = await plan_queue(cluster.facts, job, observed, pipeline, settings, cluster.kueue_version(), now)
    if reservation.placement is not None:
        pipeline = pipeline.placed(reservation.placement)
    problem = reservation.problem
    start = next((stage.start for stage in pipeline.stages if stage.is_new), None)
    if start is not None and problem is None:
        if findings.refused is not None and not observed.is_anything_live():
            return _refuse(cached, findings.refused.reason, findings.refused.message, now)
        jobs = partial(due_jobs, job, settings, start, pipeline)
        observed, problem = await check_surroundings(
            cluster.facts, job, observed, start, jobs, device, cluster.kueue_version()
        )
    desired = desired_state(job, observed, pipeline, settings, now)
    problem = await _bring_about(cluster, job, desired, settings, problem)
    await _bring_about_reservation(cluster, job, reservation)
    if plan is None:
        findings = Findings(doubts=findings.doubts)  # whatever would be refused now was begun before, and may go on
    cost = derive_cost(pipeline.outcomes, find_instance(job, settings.instance_types), settings.currency)
    status = derive_status(job, observed, pipeline, now, problem=problem, findings=findings, plan=plan, cost=cost)
    done = _report(cached, status)
    late = desired.late_records if problem is None else (*desired.late_records, *desired.carried)
    if done.report is not None:
        done = replace(done, report=replace(done.report, records=late))
    else:
        await _write_records(cluster, job, late, settings)
    return replace(done, again_after=_again_after(job, status, pipeline, desired, problem, now))


async def _observe(cluster: Cluster, job: FineTuneJob) -> Observed:
    """The job's children from the cache; where the watches contradict each other, from the API server."""
    observed = cluster.cache.observe(job.uid)
    if not observed.is_behind():
        return observed
    selector = names.job_selector(job.uid)
    # Jobs before pods: a Job seen complete beside pods as they were earlier would look as if it had lost them.
    for kind in (JOB, POD):
        raws, version = await observe.list_children(cluster.client, kind, job.namespace, selector)
        cluster.cache.replace_children(job.uid, kind, raws, version)
    return cluster.cache.observe(job.uid)


async def _bring_about(
    cluster: Cluster, job: FineTuneJob, desired: Desired, settings: Settings, problem: Waiting | None
) -> Waiting | None:
    """Carry out the writes in their order; what keeps the due attempt from being started, or None."""
    await _write_records(cluster, job, desired.records, settings)
    for deletion in desired.deletions:
        logger.info("%s/%s: deleting %s %s", job.namespace, job.name, deletion.kind, deletion.name)
        await cluster.client.delete(deletion.kind, job.namespace, deletion.name, grace_seconds=deletion.grace_seconds)
    if problem is not None:
        return problem
    for manifest in desired.manifests:
        logger.info("%s/%s: creating %s %s", job.namespace, job.name, manifest["kind"], manifest["metadata"]["name"])
        try:
            made = await apply.create_child(cluster.client, manifest, job_name=job.name, job_uid=job.uid)
        except apply.ChildRefused as refused:
            return Waiting(refused.reason, str(refused))
        cluster.cache.put(manifest["kind"], made)
    return None


async def _write_records(cluster: Cluster, job: FineTuneJob, records: Iterable[Record], settings: Settings) -> None:
    for record in records:
        await _write_record(cluster, job, record, settings)


async def _write_record(cluster: Cluster, job: FineTuneJob, record: Record, settings: Settings) -> None:
    annotations = record.annotations
    if record.outcome is not None and record.log_of is not None and settings.log_tail_lines:
        text = await observe.read_log_tail(cluster.client, job.namespace, record.log_of, settings.log_tail_lines)
        if text:
            secrets = await observe.read_secret_values(cluster.client, job.namespace, secret_references(job).values())
            log = clean_tail(text, lines=settings.log_tail_lines, secrets=secrets)
            annotations = outcome_annotations(replace(record.outcome, log=log))
    if record.stop:
        logger.info("%s/%s: stopping %s %s", job.namespace, job.name, record.kind, record.name)
    after = await apply.write_record(
        cluster.client,
        record.kind,
        job.namespace,
        record.name,
        annotations,
        deadline=STOP_SECONDS if record.stop else None,
    )
    if after is not None:
        cluster.cache.put(record.kind, after)


async def _bring_about_reservation(cluster: Cluster, job: FineTuneJob, plan: QueuePlan) -> None:
    """Delete and create the job's reservation of quota, in this order."""
    if plan.delete is not None:
        logger.info("%s/%s: deleting Workload %s", job.namespace, job.name, plan.delete)
        await observe.delete_at(cluster.client, f"{plan.path}/{plan.delete}")
    if plan.create is not None:
        logger.info("%s/%s: creating Workload %s", job.namespace, job.name, plan.create["metadata"]["name"])
        try:
            cluster.cache.put(WORKLOAD, await cluster.client.post(plan.path, plan.create))
        except ClusterError as error:
            if error.status != 409:
                raise
    if plan.ready is not None:
        name = plan.ready["metadata"]["name"]
        await cluster.client.apply_at(f"{plan.path}/{name}/status", plan.ready, field_manager=constants.FIELD_MANAGER)


def _again_after(
    job: FineTuneJob,
    status: FineTuneJobStatus,
    pipeline: Pipeline,
    desired: Desired,
    problem: Waiting | None,
    now: datetime,
) -> float | None:
    moments = []
    if status.completion_time is not None:
        expiry = _expiry(job, status.completion_time)
        if expiry is not None:
            moments.append(seconds_until(expiry, now))
    else:
        moments.append(RESYNC_SECONDS)
        moments.extend(seconds_until(at, now) for at in (pipeline.wake_at, desired.wake_at) if at is not None)
    noted = any(record.stop or constants.ANNOTATION_PREEMPTIONS in record.annotations for record in desired.records)
    if desired.deletions or noted:
        moments.append(SETTLE_SECONDS)
    if any(manifest["spec"].get("suspend") for manifest in desired.manifests):
        # No event need follow such a Job: its controller leaves it alone, and Kueue may be away.
        moments.append(SETTLE_SECONDS)
    if problem is not None:
        moments.append(RECHECK_SECONDS)
    return min(moments, default=None)


def _expiry(job: FineTuneJob, completed_at: datetime) -> datetime | None:
    ttl = job.spec.ttl_seconds_after_finished
    return None if ttl is None else completed_at + timedelta(seconds=ttl)


async def _expire(cluster: Cluster, job: FineTuneJob, now: datetime) -> Done:
    """A job at its end: nothing to do but to delete it when its time is over."""
    completed_at = job.status.completion_time
    expiry = _expiry(job, completed_at) if completed_at is not None else None
    if expiry is None:
        return Done()
    if now < expiry:
        return Done(seconds_until(expiry, now))
    logger.info("%s/%s: ttlSecondsAfterFinished is over, deleting", job.namespace, job.name)
    await cluster.client.delete(KIND, job.namespace, job.name, uid=job.uid)
    return Done()


def _refuse(cached: CachedJob, reason: Reason, message: str, now: datetime) -> Done:
    """Say what is wrong with the spec, once; nothing is tried again until the spec changes."""
    after = refused_status(cached.status, cached.generation, reason, message, now)
    expiry = None
    if cached.job is not None and after.completion_time is not None:
        expiry = _expiry(cached.job, after.completion_time)
    return replace(_report(cached, after), again_after=None if expiry is None else seconds_until(expiry, now))


def _report(cached: CachedJob, after: FineTuneJobStatus) -> Done:
    """The status as what is left to be done, if it differs."""
    if cached.status == after:
        return Done()
    return Done(report=Report(cached.namespace, cached.name, cached.uid, cached.generation, cached.status, after))


async def write_report(cluster: Cluster, report: Report, settings: Settings, now: datetime, instance: str) -> bool:
    """The late records, the one status write, and after it the events of what changed.

    False, and nothing written, when the job has another status or spec by now than the report was derived from: then
    it has to be derived again. ClusterError as reconcile.
    """
    known = cluster.cache.find_job((report.namespace, report.name))
    if known is None or (known.uid, known.generation) != (report.uid, report.generation):
        return False
    if known.status != report.before:
        return False
    if known.job is not None:
        await asyncio.gather(*(_write_record(cluster, known.job, each, settings) for each in report.records))
    written = await apply.write_status(cluster.client, report.namespace, report.name, report.uid, report.after)
    cluster.cache.wrote_status(written, report.after)
    regarding = {"namespace": report.namespace, "name": report.name, "uid": report.uid}
    results = await asyncio.gather(
        *(
            apply.post_event(
                cluster.client,
                regarding,
                event.reason,
                event.message,
                warning=event.warning,
                now=now,
                instance=instance,
            )
            for event in derive_events(report.before, report.after)
        ),
        return_exceptions=True,
    )
    for result in results:
        if isinstance(result, ClusterError):
            logger.warning("%s/%s: event not posted: %s", report.namespace, report.name, result)
        elif isinstance(result, BaseException):
            raise result
    return True
