"""The stage graph: how each stage of a job stands, and which is due.

derive_pipeline is the one decision of the operator; desired.py turns it into objects and status.py into a status. A
stage begins when every earlier one has its artifact, so there is one current stage. Pure: `now` is an argument.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from finetune_operator.api.conditions import find_condition
from finetune_operator.api.constants import ConditionType, Reason, StageState
from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.core.failure import Hang, derive_outcome, find_waiting
from finetune_operator.core.figures import Progress, graphs_text
from finetune_operator.core.inputs import GANGS, Start, is_skipped, stage_config, stage_names, start_attempt
from finetune_operator.core.nodes import Avoidance, held_back, node_affinity, nodes_to_avoid
from finetune_operator.core.observed import Attempt, AttemptKey, Observed, StageJob
from finetune_operator.core.pods import Placement
from finetune_operator.core.queueing import QueueState, derive_queue_state, no_workload_at
from finetune_operator.core.records import Outcome, Result
from finetune_operator.core.settings import RetryTiming, Settings
from finetune_operator.core.silence import SILENT_SECONDS, find_silent, next_look
from finetune_trainer import contract
from finetune_trainer.contract import ArtifactRef
from finetune_trainer.evaluation_gate import GATE_REMEDY, missed_thresholds

DONE = frozenset({StageState.SUCCEEDED, StageState.REUSED, StageState.SKIPPED})
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
    """Every stage in order. `deadline_passed` stops what runs.

    `placement` is where the pods of an attempt that begins may run, `progress` what the attempt under way last posted,
    `queue` how Kueue has the job (None without spec.queue), and `outcomes` has every attempt's end as far as it is
    known.
    """

    stages: tuple[StagePlan, ...]
    deadline_passed: bool = False
    deadline_at: datetime | None = None
    placement: Placement = field(default_factory=Placement)
    progress: Progress | None = None
    queue: QueueState | None = None
    reservation_lost: str | None = None
    """What Kueue says of a reservation of the whole pipeline that it took back."""
    outcomes: Mapping[AttemptKey, Outcome] = field(default_factory=dict)

    def placed(self, placement: Placement) -> Pipeline:
        """The pipeline with the selector and tolerations of a reservation's flavors beside its own affinity."""
        return replace(self, placement=replace(placement, affinity=self.placement.affinity))

    def held(self) -> Pipeline:
        """The pipeline of a dry run: what runs goes on to its end, and no attempt begins or asks for quota."""
        return replace(self, stages=tuple(_held_back(stage) for stage in self.stages))

    def outcome_of(self, attempt: Attempt) -> Outcome | None:
        """How the attempt ended, recorded or only just seen; None while it is under way."""
        return self.outcomes.get(attempt.key, attempt.recorded)

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


def _held_back(stage: StagePlan) -> StagePlan:
    if not stage.is_new and not (stage.state is StageState.QUEUED and stage.start is None):
        return stage
    message = "It is not started while spec.dryRun is true."
    return replace(stage, state=StageState.WAITING, reason=Reason.DRY_RUN, message=message, start=None, wake_at=None)


def _image(job: FineTuneJob, stage: str, observed: Observed, settings: Settings) -> tuple[str, str]:
    """(image of the stage, default image it was begun with). A started stage keeps the default of its start."""
    begun = next((a.default_image for a in reversed(observed.of_stage(stage)) if _keeps_image(a)), None)
    default = begun or settings.image_of(stage, job.spec.accelerator.type)
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
    """True when the job came to its end under the spec that it has now, whatever its time to live; the end is final."""
    end = find_condition(job.status.conditions, ConditionType.SUCCEEDED)
    if end is None or end.status == "Unknown":
        return False
    return end.observed_generation == job.generation or job.status.spec_digest == job.spec.end_digest


def running_since(job: FineTuneJob) -> datetime | None:
    """When the job's present run began: None before it, while suspended, and when a run has ended and the spec changed.

    With is_finished all that is read back from the status: the clock of activeDeadlineSeconds, as Kubernetes' Jobs do.
    """
    if job.spec.suspend or job.status.completion_time is not None:
        return None
    return job.status.start_time


def derive_pipeline(
    job: FineTuneJob,
    observed: Observed,
    settings: Settings,
    now: datetime,
    *,
    progress: Progress | None = None,
    device_resource: str | None = None,
) -> Pipeline:
    """How every stage stands and what is due. ParallelismError when the spec's sizes do not divide.

    `progress` is what a stage of the job last posted, whichever that is; `device_resource` the name by which the
    cluster offers the accelerator's devices.
    """
    deadline_at = None
    started_at = running_since(job)
    if job.spec.active_deadline_seconds is not None and started_at is not None:
        deadline_at = started_at + timedelta(seconds=job.spec.active_deadline_seconds)
    passed = deadline_at is not None and now >= deadline_at
    outcomes = _outcomes(job, observed, settings, now, progress)
    look = _Look(
        job,
        observed,
        settings,
        now,
        outcomes,
        deadline_passed=passed,
        progress=progress,
        device_resource=device_resource,
    )
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
        plan = _stage_plan(look, name, artifacts)
        stages.append(plan)
        if plan.state in DONE and plan.success is not None and plan.success.report is not None:
            artifacts.update(plan.success.report.artifacts)
        else:
            blocked = True
    current = next((stage for stage in stages if stage.state not in DONE), None)
    queue = _queue_state(look, current)
    reserves = job.spec.queue is not None and job.spec.queue.policy == "wholePipeline"
    lost = None
    if (
        reserves
        and queue is not None
        and current is not None
        and current.start is not None
        and not _holds(look, queue, current)
    ):
        # A reservation of the whole pipeline comes before any Job.
        lost = queue.message if current.latest is not None else None
        current = replace(current, state=StageState.QUEUED, reason=Reason.QUEUED, message=queue.message, start=None)
        stages = [current if stage.name == current.name else stage for stage in stages]
    begins = current is not None and current.is_new
    avoidance = nodes_to_avoid(
        _node_faults(outcomes),
        now,
        window_seconds=settings.nodes.avoid_seconds,
        faults_to_avoid=settings.nodes.faults_to_avoid,
    )
    return Pipeline(
        stages=tuple(stages),
        deadline_passed=passed and blocked,
        deadline_at=deadline_at,
        placement=Placement(affinity=_affinity(look, current, avoidance) if begins else None),
        progress=progress if progress is not None and _is_of(progress, current) else None,
        queue=queue,
        reservation_lost=lost,
        outcomes=outcomes,
    )


@dataclass(frozen=True)
class _Look:
    """What every stage's plan is derived from."""

    job: FineTuneJob
    observed: Observed
    settings: Settings
    now: datetime
    outcomes: Mapping[AttemptKey, Outcome]
    deadline_passed: bool
    progress: Progress | None
    device_resource: str | None


def _outcomes(
    job: FineTuneJob, observed: Observed, settings: Settings, now: datetime, progress: Progress | None
) -> dict[AttemptKey, Outcome]:
    """The end of every attempt that has one."""
    found = {}
    for attempt in observed.attempts:
        outcome = attempt.recorded
        if outcome is None:
            outcome = derive_outcome(
                _as_queued(attempt, observed),
                nodes=observed.nodes,
                deleted_nodes=observed.deleted_nodes,
                hung=find_hang(job, attempt, settings, now, progress),
                now=now,
            )
            if outcome is not None:
                outcome = replace(outcome, pod_seconds=attempt.pod_seconds(outcome.finished_at or now))
        if outcome is not None:
            found[attempt.key] = _with_steps(outcome, attempt, progress)
    return found


def _with_steps(outcome: Outcome, attempt: Attempt, progress: Progress | None) -> Outcome:
    """The outcome with how far the attempt came: one that is being stopped may still write a checkpoint and post it.

    Of train only: what compile posts as steps are graphs, and those that are compiled stay in the cache.
    """
    is_lost = attempt.stage == contract.TRAIN and outcome.result in (Result.RETRY, Result.FAIL)
    if not is_lost or progress is None or not _is_posted_by(progress, attempt):
        return outcome
    step = progress.step if outcome.step is None else max(outcome.step, progress.step)
    checkpoint = outcome.checkpoint_step if progress.checkpoint_step is None else progress.checkpoint_step
    return replace(outcome, step=step, checkpoint_step=checkpoint)


def _as_queued(attempt: Attempt, observed: Observed) -> Attempt:
    """The attempt as it is about to be: Kueue's eviction is seen before the Job is suspended, or after its pods end."""
    job = attempt.job
    workload = observed.workloads.get(job.uid) if job is not None else None
    if job is None or workload is None or workload.evicted is None:
        return attempt
    return replace(attempt, job=replace(job, suspended=True))


def _is_posted_by(progress: Progress, attempt: Attempt) -> bool:
    same = (progress.stage, progress.attempt) == (attempt.stage, attempt.number)
    return same and progress.digest in ("", attempt.digest)


def hang_limit(job: FineTuneJob, stage: str, settings: Settings) -> float:
    """Seconds without a step after which an attempt of the stage hangs; 0 for never.

    A step of compile is a graph, and one graph can take longer than any training's step: no default fits it.
    """
    return job.spec.stages.of(stage).hang_seconds or (0 if stage == contract.COMPILE else settings.hang_seconds)


def find_hang(
    job: FineTuneJob, attempt: Attempt, settings: Settings, now: datetime, progress: Progress | None
) -> Hang | None:
    """What shows that the attempt hangs, or None. An attempt that never posted is not judged by its silence."""
    limit = hang_limit(job, attempt.stage, settings)
    if not limit or progress is None or progress.advanced_at is None or not _is_posted_by(progress, attempt):
        return None
    silent = (now - progress.advanced_at) / timedelta(seconds=1)
    if silent < limit:
        return None
    return Hang(step=progress.step, seconds=silent, limit_seconds=limit)


def _node_faults(outcomes: Mapping[AttemptKey, Outcome]) -> Iterator[tuple[str, datetime]]:
    """(node, when) of every attempt that a node's fault ended."""
    for outcome in outcomes.values():
        if outcome.reason in (Reason.NODE_FAULT, Reason.NODE_LOST) and outcome.node and outcome.finished_at is not None:
            yield outcome.node, outcome.finished_at


def _affinity(look: _Look, current: StagePlan | None, avoidance: Avoidance) -> Mapping[str, Any] | None:
    """Where the pods of the current stage's next attempt may run.

    The accelerator's nodes have to be marked healthy where any node is. Other stages may also use nodes without that
    mark, such as plain EKS nodes beside HyperPod's: the taint of a faulty node keeps them off it anyway.
    """
    nodes = tuple(look.observed.nodes.values())
    accelerator = look.job.spec.accelerator
    if current is not None and current.name in GANGS:
        return node_affinity(
            nodes,
            avoid=avoidance.avoid,
            suspects=avoidance.suspects,
            needed=accelerator.nodes,
            instance_type=accelerator.instance_type,
        )
    if any(node.health is None for node in nodes):
        nodes = tuple(replace(node, health=None, deep_check=None) for node in nodes)
    return node_affinity(nodes, avoid=avoidance.avoid, suspects=avoidance.suspects)


def _queue_state(look: _Look, current: StagePlan | None) -> QueueState | None:
    queue = look.job.spec.queue
    latest = current.latest.job if current is not None and current.latest is not None else None
    owner = latest.uid if latest is not None else ""
    if queue is not None and queue.policy == "wholePipeline":
        owner = look.job.uid
        if current is not None and current.is_new:
            latest = None
    return derive_queue_state(
        look.job,
        latest,
        look.observed.workloads.get(owner),
        kueue_installed=look.observed.kueue_installed,
        now=look.now,
    )


def _holds(look: _Look, queue: QueueState, current: StagePlan) -> bool:
    """Whether the due attempt may start or go on with the quota of the whole pipeline.

    What runs is not stopped for want of Kueue: without it nobody else is given that quota either.
    """
    return queue.status == "True" or (not look.observed.kueue_installed and not current.is_new)


def _is_of(progress: Progress, current: StagePlan | None) -> bool:
    """True when what was posted is of the attempt that runs now."""
    return current is not None and current.latest is not None and _is_posted_by(progress, current.latest)


def _stage_plan(look: _Look, stage: str, artifacts: Mapping[str, ArtifactRef]) -> StagePlan:
    job, observed, settings, now = look.job, look.observed, look.settings, look.now
    image, default_image = _image(job, stage, observed, settings)
    config, digest = stage_config(job, stage, artifacts, image, settings)
    attempts = observed.of_digest(stage, digest)
    outcomes = tuple(look.outcomes.get(attempt.key) for attempt in attempts)
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
            begin = start_attempt(job, stage, start, config, digest, default_image, settings, look.device_resource)
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
    if look.deadline_passed:
        return plan(
            StageState.FAILED,
            Reason.DEADLINE_EXCEEDED,
            f"The job was not done {job.spec.active_deadline_seconds} seconds after its start: raise "
            "spec.activeDeadlineSeconds, then suspend and resume the job; it goes on from the last checkpoint.",
        )

    if latest is not None and outcome is None and latest.job is not None and not latest.job.deleting:
        return _under_way(look, latest, plan)
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


def _under_way(look: _Look, latest: Attempt, plan: Callable[..., StagePlan]) -> StagePlan:
    """The plan of a stage whose newest attempt has a Job and no end. Its Service is kept complete."""
    job = latest.job
    if job is None:
        raise ValueError(f"attempt {latest.key} has no Job")
    if job.suspended:
        return _held(look, latest, job, plan)
    waiting = find_waiting(latest, events=look.observed.events)
    look_at = next_look(find_silent(latest), look.now)
    running = sum(pod.running or pod.has_ended for pod in latest.pods)
    if waiting is not None:
        message = waiting.message
        if waiting.reason is Reason.UNSCHEDULABLE:
            message = f"{message} {held_back(look.observed.nodes.values())}".strip()
        return plan(StageState.STARTING, waiting.reason, message, start=latest.number, wake_at=look_at)
    if running >= job.completions:
        message = f"Attempt {latest.number} runs on {job.completions} pod{'s' if job.completions > 1 else ''}."
        progress = look.progress if look.progress is not None and _is_posted_by(look.progress, latest) else None
        if progress is not None and latest.stage == contract.COMPILE:
            message = f"{message} {graphs_text(progress)}"
        hangs_at = None
        limit = hang_limit(look.job, latest.stage, look.settings)
        if limit and progress is not None and progress.advanced_at is not None:
            hangs_at = progress.advanced_at + timedelta(seconds=limit)
        return plan(StageState.RUNNING, Reason.RUNNING, message, start=latest.number, wake_at=hangs_at)
    message = f"Attempt {latest.number}: {running} of {job.completions} pods run."
    since = max((moment for moment in (job.created_at, job.started_at) if moment is not None), default=None)
    if since is not None and not latest.pods and look.now >= since + timedelta(seconds=SILENT_SECONDS):
        message += (
            f" None was created in {SILENT_SECONDS} seconds, and no event says why: look at the Job controller "
            f"(kube-controller-manager) and at `kubectl describe job {latest.name}`."
        )
    return plan(StageState.STARTING, Reason.STARTING, message, start=latest.number, wake_at=look_at)


def _held(look: _Look, latest: Attempt, job: StageJob, plan: Callable[..., StagePlan]) -> StagePlan:
    """The plan of a stage whose Job is suspended: Kueue holds it back, or somebody's hand."""
    if latest.live_pods:
        message = f"{len(latest.live_pods)} pods have their grace period to write a checkpoint."
        return plan(StageState.QUEUED, Reason.PREEMPTED, message, start=latest.number)
    if look.job.spec.queue is None:
        message = (
            f"Job {job.name} is suspended, and not by this operator: `kubectl describe job {job.name}` may say why."
        )
        return plan(StageState.QUEUED, Reason.QUEUED, message, start=latest.number)
    workload = look.observed.workloads.get(job.uid)
    queue = derive_queue_state(look.job, job, workload, kueue_installed=look.observed.kueue_installed, now=look.now)
    words = queue.message if queue is not None else f"Job {job.name} is suspended."
    unavailable = queue is not None and queue.reason == Reason.QUEUE_UNAVAILABLE
    reason = Reason.QUEUE_UNAVAILABLE if unavailable else Reason.QUEUED
    wake_at = no_workload_at(job) if workload is None else None
    wake_at = wake_at if wake_at is not None and wake_at > look.now else None
    return plan(StageState.QUEUED, reason, words, start=latest.number, wake_at=wake_at)


def _missed_gate(job: FineTuneJob, stage: str, success: Outcome) -> str | None:
    """What is wrong with the tuned model by spec.evaluate.gate, or None."""
    gate = job.spec.evaluate.gate
    if stage != contract.EVALUATE or gate is None or success.report is None:
        return None
    missed = missed_thresholds(gate.as_json(), success.report.metrics)
    return " ".join((*missed, GATE_REMEDY)) if missed else None


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
