"""reconcile: observe, decide, apply, report; the one place where they meet.

Called by the work queue of handlers.py for one FineTuneJob at a time, whatever woke it: the job's own change, a child's
event, a timer, a restart of the operator. It keeps no memory between calls, so it may stop after any line and be called
again. Time and settings are arguments.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from finetune_operator.api.constants import KIND, Reason
from finetune_operator.api.finetunejob import FineTuneJob, SpecError, parse_job, parse_status, unavailable_features
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.core import names
from finetune_operator.core.desired import Desired, desired_state
from finetune_operator.core.events import derive_events
from finetune_operator.core.failure import Waiting
from finetune_operator.core.figures import Progress
from finetune_operator.core.inputs import secret_references
from finetune_operator.core.observed import Claim, Observed, parse_observed
from finetune_operator.core.parallelism import ParallelismError
from finetune_operator.core.prerequisites import find_missing
from finetune_operator.core.settings import Settings
from finetune_operator.core.stages import Pipeline, derive_pipeline, is_finished
from finetune_operator.core.status import derive_status, refused_status
from finetune_operator.core.times import seconds_until
from finetune_operator.kube import apply, observe
from finetune_operator.kube.client import Client, ClusterError

logger = logging.getLogger(__name__)

RECHECK_SECONDS = 5.0
"""How often a missing claim or Secret, or a taken name, is looked at again: they are not watched."""

RESYNC_SECONDS = 60.0
"""How often a job under way is looked at without an event: a watch begun anew does not tell of what went away."""


@dataclass(frozen=True)
class Done:
    """What a reconcile leaves behind: when to look again by itself (seconds, None: at the next event), the
    resourceVersion of its status write, whose own event needs no reconcile, and whether the job does not exist."""

    again_after: float | None = None
    written_version: str | None = None
    gone: bool = False


async def reconcile(
    client: Client,
    namespace: str,
    name: str,
    settings: Settings,
    now: datetime,
    *,
    progress: Progress | None = None,
    instance: str = "",
) -> Done:
    """Bring one FineTuneJob's children to what its spec asks for now, and its status to what is so.

    ClusterError when the API server refuses or is away: to be tried again. A job that is gone or going is left to the
    garbage collector.
    """
    body = await observe.read_job(client, namespace, name)
    if body is None or body["metadata"].get("deletionTimestamp"):
        return Done(gone=body is None)
    try:
        job = parse_job(body)
        problems = unavailable_features(job.spec)
    except SpecError as error:
        return await _refuse(client, body, Reason.INVALID_SPEC, str(error), now, instance)
    if is_finished(job):
        return await _expire(client, job, now)
    if problems:
        words = "; ".join(str(problem) for problem in problems)
        return await _refuse(client, body, Reason.FEATURE_NOT_AVAILABLE, words, now, instance, job=job)

    observed = await _observe(client, job)
    try:
        pipeline = derive_pipeline(job, observed, settings, now)
    except ParallelismError as error:
        return await _refuse(client, body, Reason.INVALID_SPEC, str(error), now, instance, job=job)
    problem = None
    start = next((stage.start for stage in pipeline.stages if stage.is_new), None)
    if start is not None:
        observed = await _observe_prerequisites(client, job, observed)
        problem = find_missing(job, observed, start)
    desired = desired_state(job, observed, pipeline, settings, now)
    problem = await _bring_about(client, job, desired, problem)
    status = derive_status(job, observed, pipeline, now, problem=problem, progress=progress)
    version = await _report(client, body, job.status, status, now, instance)
    return Done(_again_after(job, status, pipeline, problem, now), version)


async def _observe(client: Client, job: FineTuneJob) -> Observed:
    """One read of the job's children, by their label with its uid."""
    raw = await observe.observe_children(client, job.namespace, names.job_selector(job.uid))
    return parse_observed(jobs=raw.jobs, config_maps=raw.config_maps, services=raw.services, pods=raw.pods)


async def _observe_prerequisites(client: Client, job: FineTuneJob, observed: Observed) -> Observed:
    claim_name = job.spec.workspace.claim_name
    phase, secrets = await asyncio.gather(
        observe.observe_claim(client, job.namespace, claim_name),
        observe.observe_secret_keys(client, job.namespace, (name for name, _ in secret_references(job).values())),
    )
    return replace(observed, claim=Claim(claim_name, phase), secrets=secrets)


async def _bring_about(client: Client, job: FineTuneJob, desired: Desired, problem: Waiting | None) -> Waiting | None:
    """Carry out the writes in their order; what keeps the due attempt from being started, or None."""
    for record in desired.records:
        await apply.write_record(client, record.kind, job.namespace, record.name, record.annotations)
    for deletion in desired.deletions:
        logger.info("%s/%s: deleting %s %s", job.namespace, job.name, deletion.kind, deletion.name)
        await client.delete(deletion.kind, job.namespace, deletion.name)
    if problem is not None:
        return problem
    for manifest in desired.manifests:
        logger.info("%s/%s: applying %s %s", job.namespace, job.name, manifest["kind"], manifest["metadata"]["name"])
        try:
            await apply.apply_child(client, manifest, job_name=job.name, job_uid=job.uid)
        except apply.ChildRefused as refused:
            return Waiting(refused.reason, str(refused))
    return None


def _again_after(
    job: FineTuneJob, status: FineTuneJobStatus, pipeline: Pipeline, problem: Waiting | None, now: datetime
) -> float | None:
    moments = []
    if status.completion_time is not None:
        expiry = _expiry(job, status.completion_time)
        if expiry is not None:
            moments.append(seconds_until(expiry, now))
    else:
        moments.append(RESYNC_SECONDS)
        if pipeline.wake_at is not None:
            moments.append(seconds_until(pipeline.wake_at, now))
    if problem is not None:
        moments.append(RECHECK_SECONDS)
    return min(moments, default=None)


def _expiry(job: FineTuneJob, completed_at: datetime) -> datetime | None:
    ttl = job.spec.ttl_seconds_after_finished
    return None if ttl is None else completed_at + timedelta(seconds=ttl)


async def _expire(client: Client, job: FineTuneJob, now: datetime) -> Done:
    """A job at its end: nothing to do but to delete it when its time is over."""
    completed_at = job.status.completion_time
    expiry = _expiry(job, completed_at) if completed_at is not None else None
    if expiry is None:
        return Done()
    if now < expiry:
        return Done(seconds_until(expiry, now))
    logger.info("%s/%s: ttlSecondsAfterFinished is over, deleting", job.namespace, job.name)
    await client.delete(KIND, job.namespace, job.name, uid=job.uid)
    return Done()


async def _refuse(
    client: Client,
    body: Mapping[str, Any],
    reason: Reason,
    message: str,
    now: datetime,
    instance: str,
    *,
    job: FineTuneJob | None = None,
) -> Done:
    """Say what is wrong with the spec, once; nothing is tried again until the spec changes. `job` where it parses."""
    before = parse_status(body.get("status"))
    after = refused_status(before, body["metadata"].get("generation") or 0, reason, message, now)
    version = await _report(client, body, before, after, now, instance)
    expiry = _expiry(job, after.completion_time) if job is not None and after.completion_time is not None else None
    return Done(None if expiry is None else seconds_until(expiry, now), version)


async def _report(
    client: Client,
    body: Mapping[str, Any],
    before: FineTuneJobStatus,
    after: FineTuneJobStatus,
    now: datetime,
    instance: str,
) -> str | None:
    """One status write, if the status differs, and after it the events of what changed."""
    if before.as_json() == after.as_json():
        return None
    metadata = body["metadata"]
    version = await apply.write_status(client, metadata["namespace"], metadata["name"], metadata["uid"], after)
    events = derive_events(before, after)
    results = await asyncio.gather(
        *(
            apply.post_event(
                client, body, event.reason, event.message, warning=event.warning, now=now, instance=instance
            )
            for event in events
        ),
        return_exceptions=True,
    )
    for result in results:
        if isinstance(result, ClusterError):
            logger.warning("%s/%s: event not posted: %s", metadata["namespace"], metadata["name"], result)
        elif isinstance(result, BaseException):
            raise result
    return version
