"""What the operator knows of a job when a stage of it begins: stage.json's `history`, for the job's report.

desired.py puts it into the stages that leave a report (contract.REPORTING). It is volatile by the contract: it changes
no digest, and the Job of an attempt keeps what was known when it was made. Pure.

    spec                 object  model, dataset, method, training, parallelism, accelerator, and evaluate's enabled and
                                 gate; no prompts, and no environment of a pod, for that may hold anything
    specDigest           str     of the whole spec, ttlSecondsAfterFinished left out
    artifacts            object  input name -> {"path", "digest"}
    stages               array   {"name", "state", "attempts", "seconds" from the first attempt's start to the end}
    attempts             array   attempts that ended without their artifact, and preemptions: {"stage", "attempt",
                                 "endTime", "reason", "message", "node", "counted", "lostSteps", "recoverySeconds"}
    metrics              object  stage -> what its report said, for train
    images               object  stage -> image of its pods, tagged by content
    trainableParameters  int
    goodput              number  0 to 1
    podSeconds           int     of all attempts that have ended
    acceleratorSeconds   int     those on accelerator nodes
    cost                 object  {"amount", "currency", "pricePerHour"}; absent where no price is configured

What is not known is left out.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.api.status import MAX_ATTEMPTS
from finetune_operator.core.accelerators import find_instance
from finetune_operator.core.accelerators.whole_node import DEVICE_STAGES
from finetune_operator.core.figures import derive_trainable_parameters
from finetune_operator.core.measures import derive_goodput
from finetune_operator.core.plan import derive_cost
from finetune_operator.core.settings import Settings
from finetune_operator.core.stages import DONE, Pipeline, StagePlan
from finetune_operator.core.status import derive_attempts
from finetune_trainer import contract

_SECTIONS = ("model", "dataset", "method", "training", "parallelism", "accelerator")
_LONGEST_MESSAGE = 400
"""Characters of an attempt's message; the history is a part of an annotation, and all of those share 256 KiB."""


def derive_history(job: FineTuneJob, pipeline: Pipeline, settings: Settings, now: datetime) -> dict[str, Any]:
    """The history as it is now, JSON's types only. InstanceTypeError where the instance type is not known."""
    spec = job.spec.plain
    known: dict[str, Any] = {
        "spec": {
            **{name: spec[name] for name in _SECTIONS if name in spec},
            "evaluate": {name: spec["evaluate"][name] for name in ("enabled", "gate") if name in spec["evaluate"]},
        },
        "specDigest": job.spec.end_digest,
        "artifacts": {},
        "stages": [_stage(plan) for plan in pipeline.stages],
        "attempts": [],
        "metrics": {},
        "images": {},
        "trainableParameters": derive_trainable_parameters(pipeline),
    }
    for plan in pipeline.stages:
        report = plan.success.report if plan.success is not None else None
        if report is not None:
            known["artifacts"].update({name: ref.as_json() for name, ref in report.artifacts.items()})
            if plan.name == contract.TRAIN:
                known["metrics"][plan.name] = dict(report.metrics)
        if plan.latest is not None and (image := _image(job, plan)):
            known["images"][plan.name] = image
        if plan.name == contract.TRAIN:
            known["goodput"] = derive_goodput(plan)
    for entry in list(derive_attempts(pipeline, job.status, now))[-MAX_ATTEMPTS:]:
        told = entry.as_json()
        told = {name: told[name] for name in told if name not in ("log", "jobName", "exitCode")}
        known["attempts"].append({**told, "message": str(told.get("message", ""))[:_LONGEST_MESSAGE]})
    known.update(_costs(job, pipeline, settings))
    return {name: value for name, value in known.items() if value is not None}


def _stage(plan: StagePlan) -> dict[str, Any]:
    told: dict[str, Any] = {"name": plan.name, "state": str(plan.state)}
    if plan.latest is not None:
        told["attempts"] = plan.latest.number
    first = next((o.started_at for o in plan.outcomes if o is not None and o.started_at is not None), None)
    ended = plan.success.finished_at if plan.success is not None else None
    if plan.state in DONE and first is not None and ended is not None:
        told["seconds"] = max(0, int((ended - first) / timedelta(seconds=1)))
    return told


def _image(job: FineTuneJob, plan: StagePlan) -> str | None:
    """The image of the stage's newest attempt; None where an earlier release made it and nothing says."""
    latest = plan.latest
    return job.spec.stages.of(plan.name).image or (latest.default_image if latest is not None else None) or None


def _costs(job: FineTuneJob, pipeline: Pipeline, settings: Settings) -> dict[str, Any]:
    instance = find_instance(job, settings.instance_types)
    cost = derive_cost(pipeline.outcomes, instance, settings.currency)
    if cost is None:
        return {}
    told: dict[str, Any] = {"podSeconds": cost.pod_seconds}
    if instance is not None:
        told["acceleratorSeconds"] = sum(
            outcome.pod_seconds or 0 for (stage, _, _), outcome in pipeline.outcomes.items() if stage in DEVICE_STAGES
        )
        if cost.amount is not None:
            told["cost"] = {
                "amount": cost.amount,
                "currency": cost.currency,
                "pricePerHour": instance.price_per_hour,
            }
    return told
