"""desired_state: what has to be recorded, deleted and applied so that the cluster is as the pipeline wants it.

Called by reconcile.py, which does it in this order: records, deletions, manifests. Pure and deterministic; whatever is
there already is not asked for again, so a settled job costs no write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from finetune_operator.api import constants
from finetune_operator.api.constants import Reason, StageState
from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.api.status import MAX_ATTEMPTS
from finetune_operator.core import names
from finetune_operator.core.failure import derive_outcome
from finetune_operator.core.inputs import Start
from finetune_operator.core.observed import Attempt, Observed
from finetune_operator.core.pods import CA_KEY, CONFIG_KEY, pod_template
from finetune_operator.core.records import ANNOTATION_DEFAULT_IMAGE, Outcome, Result, outcome_annotations
from finetune_operator.core.settings import Settings
from finetune_operator.core.stages import Pipeline, StagePlan
from finetune_trainer import contract

JOB = "Job"
CONFIG_MAP = "ConfigMap"
SERVICE = "Service"

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """Annotations to put on one child: how its attempt ended."""

    kind: str
    name: str
    annotations: Mapping[str, str]


@dataclass(frozen=True)
class Deletion:
    """One child to delete; a Job's pods get their grace period."""

    kind: str
    name: str


@dataclass(frozen=True)
class Desired:
    """What to do, in order. `manifests` of one attempt stand together, its Job last."""

    records: tuple[Record, ...] = ()
    deletions: tuple[Deletion, ...] = ()
    manifests: tuple[Manifest, ...] = ()


def desired_state(
    job: FineTuneJob, observed: Observed, pipeline: Pipeline, settings: Settings, now: datetime
) -> Desired:
    """The writes that bring the job's children from what is observed to what the pipeline says."""
    return Desired(
        records=tuple(_records(job, observed, pipeline, now)),
        deletions=tuple(_deletions(job, observed, pipeline)),
        manifests=tuple(manifest for stage in pipeline.stages for manifest in _manifests(job, stage, settings)),
    )


def _records(job: FineTuneJob, observed: Observed, pipeline: Pipeline, now: datetime) -> Iterator[Record]:
    for attempt in observed.attempts:
        if attempt.job is None or attempt.recorded is not None or _is_unwanted(attempt, pipeline):
            continue
        outcome = derive_outcome(attempt)
        if outcome is not None:
            ended = replace(outcome, finished_at=outcome.finished_at or now, generation=job.generation)
            yield Record(JOB, attempt.job.name, outcome_annotations(ended))
        elif job.spec.suspend and attempt.config_map and not attempt.job.deleting:
            # The Job goes with the suspension; its ConfigMap stays and remembers that this attempt was one.
            begun = attempt.job.created_at if any(pod.running or pod.has_ended for pod in attempt.pods) else None
            words = "Stopped by spec.suspend."
            stopped = Outcome(Result.SUSPENDED, Reason.SUSPENDED, words, started_at=begun, finished_at=now)
            yield Record(CONFIG_MAP, attempt.name, outcome_annotations(stopped))


def _deletions(job: FineTuneJob, observed: Observed, pipeline: Pipeline) -> Iterator[Deletion]:
    for attempt in observed.attempts:
        if _is_unwanted(attempt, pipeline) or _is_long_past(attempt, pipeline):
            yield from _whole(attempt)
            continue
        outcome = derive_outcome(attempt)
        if attempt.job is not None and not attempt.job.deleting:
            stopped = outcome is not None and outcome.result is Result.SUSPENDED
            if stopped or (outcome is None and (job.spec.suspend or pipeline.deadline_passed)):
                yield Deletion(JOB, attempt.job.name)


def _plan_of(attempt: Attempt, pipeline: Pipeline) -> StagePlan | None:
    return next((stage for stage in pipeline.stages if stage.name == attempt.stage), None)


def _is_unwanted(attempt: Attempt, pipeline: Pipeline) -> bool:
    """True for an attempt of a stage that the job has no more, or of inputs that it has no more.

    A stage whose inputs are not known yet has no digest: what it did before may turn out to be right.
    """
    plan = _plan_of(attempt, pipeline)
    if plan is None or plan.state is StageState.SKIPPED:
        return True
    return plan.digest is not None and attempt.digest != plan.digest[:16]


def _is_long_past(attempt: Attempt, pipeline: Pipeline) -> bool:
    """True for an attempt that the status shows no more and that no retry is counted by.

    Faults of the infrastructure may go on for days; the objects of their attempts must not heap up.
    """
    plan = _plan_of(attempt, pipeline)
    if plan is None or plan.latest is None or plan.latest.number - attempt.number < MAX_ATTEMPTS:
        return False
    outcome = attempt.recorded
    return outcome is None or (outcome.result is Result.RETRY and not outcome.counts)


def _whole(attempt: Attempt) -> Iterator[Deletion]:
    if attempt.job is not None and not attempt.job.deleting:
        yield Deletion(JOB, attempt.job.name)
    if attempt.service:
        yield Deletion(SERVICE, attempt.name)
    # A ConfigMap goes last: pods that are being stopped still have it mounted, and by it the attempt is known.
    if attempt.config_map and attempt.job is None and not attempt.live_pods:
        yield Deletion(CONFIG_MAP, attempt.name)


def _manifests(job: FineTuneJob, stage: StagePlan, settings: Settings) -> Iterator[Manifest]:
    start = stage.start
    if start is None:
        return
    there = next((attempt for attempt in stage.attempts if attempt.number == start.number), None)
    if there is None or not there.config_map:
        yield config_map(job, start, settings)
    if start.completions > 1 and (there is None or not there.service):
        yield service(job, start)
    if there is None or there.job is None:
        yield stage_job(job, start, settings)


def _metadata(job: FineTuneJob, start: Start, annotations: Mapping[str, str] | None = None) -> dict[str, Any]:
    return {
        "name": start.name,
        "namespace": job.namespace,
        "labels": _labels(job, start),
        **({"annotations": dict(annotations)} if annotations else {}),
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
    }


def _labels(job: FineTuneJob, start: Start) -> dict[str, str]:
    return names.attempt_labels(job.name, job.uid, start.config.stage, start.digest, start.number)


def config_map(job: FineTuneJob, start: Start, settings: Settings) -> Manifest:
    """The immutable ConfigMap with the attempt's stage.json, and the progress endpoint's CA where there is one."""
    data = {CONFIG_KEY: contract.canonical_json(start.config.as_json()).decode()}
    if settings.progress is not None:
        data[CA_KEY] = settings.progress.ca_certificate
    # A suspended attempt's Job goes and its ConfigMap stays, so that one says the default image too.
    metadata = _metadata(job, start, {ANNOTATION_DEFAULT_IMAGE: start.default_image})
    return {"apiVersion": "v1", "kind": CONFIG_MAP, "metadata": metadata, "immutable": True, "data": data}


def service(job: FineTuneJob, start: Start) -> Manifest:
    """The headless Service by which the pods of a distributed stage find rank 0."""
    return {
        "apiVersion": "v1",
        "kind": SERVICE,
        "metadata": _metadata(job, start),
        "spec": {
            "clusterIP": "None",
            # Ranks look each other up before any of them can be ready.
            "publishNotReadyAddresses": True,
            "selector": _labels(job, start),
            "ports": [{"name": "rendezvous", "port": contract.RENDEZVOUS_PORT, "protocol": "TCP"}],
        },
    }


def stage_job(job: FineTuneJob, start: Start, settings: Settings) -> Manifest:
    """The batch/v1 Job of the attempt. It never retries by itself: attempts are the operator's."""
    metadata = _metadata(job, start, {ANNOTATION_DEFAULT_IMAGE: start.default_image})
    indexed = start.config.stage == contract.TRAIN
    return {
        "apiVersion": "batch/v1",
        "kind": JOB,
        "metadata": metadata,
        "spec": {
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "completionMode": "Indexed" if indexed else "NonIndexed",
            "completions": start.completions,
            "parallelism": start.completions,
            "template": pod_template(job, start, settings, _labels(job, start)),
        },
    }
