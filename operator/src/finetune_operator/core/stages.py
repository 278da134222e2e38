"""The stage graph: how each stage of a job stands, and which is due.

derive_pipeline is the one decision of the operator; desired.py turns it into objects and status.py into a status. A
stage begins when every earlier one has its artifact, so there is one current stage. Pure: `now` is an argument.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from finetune_operator.api.conditions import find_condition
from finetune_operator.api.constants import ConditionType, Reason, StageState
from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.core.failure import derive_outcome, find_waiting
from finetune_operator.core.inputs import Start, is_skipped, stage_config, stage_names, start_attempt
from finetune_operator.core.observed import Attempt, Observed
from finetune_operator.core.records import Outcome, Result
from finetune_operator.core.settings import RetryTiming, Settings
from finetune_trainer import contract
from finetune_trainer.contract import ArtifactRef

DONE = frozenset({StageState.SUCCEEDED, StageState.REUSED, StageState.SKIPPED})
NO_POD_SECONDS = 10
"""A Job without any pod for so long has had its pods refused; only the Job controller's events say why."""
JITTER = 0.2
"""A wait is up to this share longer, by a hash of job and attempt, so that jobs that failed together spread."""


@dataclass(frozen=True)
class StagePlan:
    """How one stage stands. `start` is the attempt to begin or to keep complete; `wake_at` when to look again."""

    name: str
    state: StageState
    reason: Reason
    message: str = ""
    digest: str | None = None
    attempts: tuple[Attempt, ...] = ()
    outcomes: tuple[Outcome | None, ...] = ()
    start: Start | None = None
    wake_at: datetime | None = None

    @property
    def latest(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def latest_outcome(self) -> Outcome | None:
        return self.outcomes[-1] if self.outcomes else None

    @property
    def success(self) -> Outcome | None:
        """The outcome that has the stage's report, or None while it has none."""
        return next((o for o in reversed(self.outcomes) if o is not None and o.result is Result.SUCCEEDED), None)

    @property
    def restarts(self) -> int:
        """Attempts that ended without their artifact; by number, since the objects of the oldest ones are deleted."""
        if self.latest is None:
            return 0
        suspended = sum(o is not None and o.result is Result.SUSPENDED for o in self.outcomes[:-1])
        failed = self.latest_outcome is not None and self.latest_outcome.result in (Result.RETRY, Result.FAIL)
        return self.latest.number - 1 - suspended + failed

    @property
    def is_new(self) -> bool:
        """True when `start` is an attempt of which no Job exists yet."""
        if self.start is None:
            return False
        number = self.start.number
        return not any(attempt.number == number and attempt.job is not None for attempt in self.attempts)


@dataclass(frozen=True)
class Pipeline:
    """Every stage in order. `deadline_passed` stops what runs."""

    stages: tuple[StagePlan, ...]
    deadline_passed: bool = False
    deadline_at: datetime | None = None

    @property
    def current(self) -> StagePlan | None:
        """The first stage that is not done; None when all are."""
        return next((stage for stage in self.stages if stage.state not in DONE), None)

    @property
    def wake_at(self) -> datetime | None:
        """When something changes by itself: the end of a wait, or the deadline."""
        moments = [stage.wake_at for stage in self.stages if stage.wake_at is not None]
        if self.deadline_at is not None and not self.deadline_passed and self.current is not None:
            moments.append(self.deadline_at)
        return min(moments, default=None)

    @property
    def restarts(self) -> int:
        """Attempts that ended without their artifact, of all stages together."""
        return sum(stage.restarts for stage in self.stages)


def _image(job: FineTuneJob, stage: str, observed: Observed, settings: Settings) -> tuple[str, str]:
    """(image of the stage, default image it was begun with). A started stage keeps the default of its start."""
    begun = next((a.default_image for a in reversed(observed.of_stage(stage)) if _keeps_image(a)), None)
    default = begun or settings.of(stage).image or settings.trainer_image
    return job.spec.stages.of(stage).image or default, default


def _keeps_image(attempt: Attempt) -> bool:
    """True when the attempt's default image is to be gone on with: False when no pod could begin with it."""
    if not attempt.default_image:
        return False
    if attempt.recorded is not None:
        return attempt.recorded.result is not Result.SUSPENDED or attempt.recorded.started_at is not None
    waiting = find_waiting(attempt)
    return attempt.job is not None and (waiting is None or waiting.reason is not Reason.IMAGE_PULL_FAILED)


def is_finished(job: FineTuneJob) -> bool:
    """True when the job came to its end under the generation of the spec that it has now; the end is final."""
    end = find_condition(job.status.conditions, ConditionType.SUCCEEDED)
    return end is not None and end.status != "Unknown" and end.observed_generation == job.generation


def running_since(job: FineTuneJob) -> datetime | None:
    """When the job's present run began: None before it, while suspended, and when a run has ended and the spec changed.

    With is_finished all that is read back from the status: the clock of activeDeadlineSeconds, as Kubernetes' Jobs do.
    """
    if job.spec.suspend or job.status.completion_time is not None:
        return None
    return job.status.start_time


def derive_pipeline(job: FineTuneJob, observed: Observed, settings: Settings, now: datetime) -> Pipeline:
    """How every stage stands and what is due. ParallelismError when the spec's sizes do not divide."""
    deadline_at = None
    started_at = running_since(job)
    if job.spec.active_deadline_seconds is not None and started_at is not None:
        deadline_at = started_at + timedelta(seconds=job.spec.active_deadline_seconds)
    passed = deadline_at is not None and now >= deadline_at
    artifacts: dict[str, ArtifactRef] = {}
    stages: list[StagePlan] = []
    blocked = False
    for name in stage_names(job):
        if is_skipped(job, name):
            stages.append(StagePlan(name, StageState.SKIPPED, Reason.SKIPPED, "The spec does not ask for it."))
            continue
        if blocked:
            before = next(stage.name for stage in stages if stage.state not in DONE)
            message = f"It begins when {before} has its artifact."
            stages.append(StagePlan(name, StageState.WAITING, Reason.WAITING, message))
            continue
        plan = _stage_plan(job, name, artifacts, observed, settings, now, deadline_passed=passed)
        stages.append(plan)
        if plan.state in DONE and plan.success is not None and plan.success.report is not None:
            artifacts.update(plan.success.report.artifacts)
        else:
            blocked = True
    return Pipeline(stages=tuple(stages), deadline_passed=passed and blocked, deadline_at=deadline_at)


def _stage_plan(
    job: FineTuneJob,
    stage: str,
    artifacts: Mapping[str, ArtifactRef],
    observed: Observed,
    settings: Settings,
    now: datetime,
    *,
    deadline_passed: bool,
) -> StagePlan:
    image, default_image = _image(job, stage, observed, settings)
    config, digest = stage_config(job, stage, artifacts, image)
    attempts = observed.of_digest(stage, digest)
    outcomes = tuple(derive_outcome(attempt) for attempt in attempts)
    exhausted = _exhausted(job, outcomes)

    def plan(
        state: StageState,
        reason: Reason,
        message: str = "",
        *,
        start: int | None = None,
        wake_at: datetime | None = None,
    ) -> StagePlan:
        begin = None
        if start is not None:
            begin = start_attempt(job, stage, start, config, digest, default_image, settings)
        return StagePlan(stage, state, reason, message, digest, attempts, outcomes, begin, wake_at)

    success = next((o for o in reversed(outcomes) if o is not None and o.result is Result.SUCCEEDED), None)
    if success is not None:
        missed = _missed_gate(job, stage, success)
        if missed is not None:
            return plan(StageState.FAILED, Reason.GATE_NOT_MET, missed)
        reused = success.report is not None and success.report.reused
        return plan(StageState.REUSED if reused else StageState.SUCCEEDED, success.reason, success.message)

    latest = attempts[-1] if attempts else None
    outcome = outcomes[-1] if outcomes else None
    left = tuple(pod for attempt in observed.of_stage(stage) for pod in attempt.live_pods)
    forgiven = outcome is not None and not outcome.is_held_against(job.generation)
    if outcome is not None and outcome.result is Result.FAIL and not forgiven and not job.spec.suspend:
        return plan(StageState.FAILED, outcome.reason, outcome.message)
    if job.spec.suspend:
        if left:
            message = f"{len(left)} pods have their grace period to write a checkpoint."
            return plan(StageState.SUSPENDED, Reason.SUSPENDING, message)
        return plan(StageState.SUSPENDED, Reason.SUSPENDED, "spec.suspend is true.")
    if deadline_passed:
        return plan(
            StageState.FAILED,
            Reason.DEADLINE_EXCEEDED,
            f"The job was not done {job.spec.active_deadline_seconds} seconds after its start: raise "
            "spec.activeDeadlineSeconds, then suspend and resume the job; it goes on from the last checkpoint.",
        )

    if latest is not None and outcome is None and latest.job is not None and not latest.job.deleting:
        return _under_way(latest, plan, now)
    number = 1 if latest is None else latest.number if outcome is None else latest.number + 1
    if exhausted is not None:
        return plan(StageState.FAILED, Reason.RETRIES_EXHAUSTED, exhausted)
    if left or (latest is not None and latest.job is not None and latest.job.deleting):
        what = outcome or Outcome(Result.RETRY, Reason.POD_DELETED, "The attempt's Job was deleted.")
        message = f"{what.message} Attempt {number} begins when the last pod before it is gone."
        return plan(StageState.RETRYING, what.reason, message)
    if outcome is not None and not forgiven:
        wait = _backoff(job, stage, number, outcomes, settings.retry)
        due = (outcome.finished_at or now) + timedelta(seconds=wait)
        if now < due:
            message = f"{outcome.message} Attempt {number} follows."
            return plan(StageState.RETRYING, outcome.reason, message, wake_at=due)
        return plan(StageState.STARTING, outcome.reason, f"Attempt {number}: {outcome.message}", start=number)
    return plan(StageState.STARTING, Reason.STARTING, f"Attempt {number} is being started.", start=number)


def _under_way(latest: Attempt, plan: Any, now: datetime) -> StagePlan:
    """The plan of a stage whose newest attempt has a Job and no end. Its ConfigMap and Service are kept complete."""
    result: StagePlan
    waiting = find_waiting(latest)
    completions = latest.job.completions if latest.job else 1
    running = sum(pod.running or pod.has_ended for pod in latest.pods)
    if waiting is not None:
        result = plan(StageState.STARTING, waiting.reason, waiting.message, start=latest.number)
    elif running < completions:
        message = f"Attempt {latest.number}: {running} of {completions} pods run."
        wake_at = None
        if latest.job is not None and latest.job.created_at is not None and not latest.pods:
            wake_at = latest.job.created_at + timedelta(seconds=NO_POD_SECONDS)
            if now >= wake_at:
                wake_at = None
                message += (
                    f" None was created in {NO_POD_SECONDS} seconds; `kubectl describe job {latest.name}` has the "
                    "cause: most often a quota, a limit range or a policy of the namespace refuses the pod."
                )
        result = plan(StageState.STARTING, Reason.STARTING, message, start=latest.number, wake_at=wake_at)
    else:
        message = f"Attempt {latest.number} runs on {completions} pod{'s' if completions > 1 else ''}."
        result = plan(StageState.RUNNING, Reason.RUNNING, message, start=latest.number)
    return result


def _missed_gate(job: FineTuneJob, stage: str, success: Outcome) -> str | None:
    """What is wrong with the tuned model by spec.evaluate.gate, or None."""
    gate = job.spec.evaluate.gate
    if stage != contract.EVALUATE or gate is None or success.report is None:
        return None
    base, tuned = (success.report.metrics.get(name) for name in ("baseLoss", "tunedLoss"))
    most = gate.max_loss_ratio_to_base
    if isinstance(base, (int, float)) and isinstance(tuned, (int, float)) and tuned <= most * base:
        return None
    return (
        f"The tuned model's held-out loss is {tuned} and the base model's {base}; "
        f"spec.evaluate.gate.maxLossRatioToBase allows {most} times the base model's. "
        "Train longer or on better data, or change the gate."
    )


def _exhausted(job: FineTuneJob, outcomes: Sequence[Outcome | None]) -> str | None:
    """The message of a stage that has used up its retries, or None."""
    counted = [o for o in outcomes if o is not None and o.counts and o.is_held_against(job.generation)]
    most = job.spec.retry_policy.max_retries
    if len(counted) <= most:
        return None
    last = counted[-1]
    tries = f"{len(counted)} counted attempts failed and retryPolicy.maxRetries is {most}"
    return f"{tries}. Last cause, {last.reason}: {last.message}"


def _backoff(
    job: FineTuneJob, stage: str, number: int, outcomes: Sequence[Outcome | None], timing: RetryTiming
) -> float:
    """Seconds between the end of the last attempt and attempt `number`: doubled a cause of its kind, jitter added."""
    last = outcomes[-1]
    counts = last is not None and last.counts
    same = sum(o is not None and o.is_held_against(job.generation) and o.counts == counts for o in outcomes)
    first, longest = (
        (timing.counted_first, timing.counted_longest) if counts else (timing.uncounted_first, timing.uncounted_longest)
    )
    wait = min(longest, first * 2.0 ** min(same - 1, 30))
    spread = hashlib.sha256(f"{job.uid}/{stage}/{number}".encode()).digest()[0] / 255
    return wait * (1 + JITTER * spread)
