"""derive_status: what the status says of a job, from its spec, its children and the pipeline.

Called by reconcile.py. The conditions are the truth; phase, stage, progress, eta, reason and message are derived from
the same facts for people and read by nobody. The previous status gives transition times only. Pure: `now` is an
argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_operator.api import constants
from finetune_operator.api.conditions import cut_message, with_condition
from finetune_operator.api.constants import (
    STAGE_CONDITIONS,
    STAGE_PHASES,
    ConditionType,
    Phase,
    Reason,
    StageState,
)
from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.api.status import (
    MAX_ATTEMPTS,
    MAX_NODES,
    AttemptStatus,
    Condition,
    ConditionStatus,
    Cost,
    FineTuneJobStatus,
    PlanStatus,
    StageStatus,
)
from finetune_operator.core.failure import Waiting
from finetune_operator.core.figures import (
    Progress,
    as_artifact,
    derive_artifacts,
    derive_evaluation,
    derive_trainable_parameters,
    derive_training,
    whole_second,
)
from finetune_operator.core.observed import Attempt, Observed
from finetune_operator.core.preemptions import noted_preemptions
from finetune_operator.core.preflight import Findings
from finetune_operator.core.queueing import queue_wait_seconds
from finetune_operator.core.records import Result
from finetune_operator.core.stages import DONE, Pipeline, StagePlan, running_since
from finetune_trainer import contract

_WEIGHTS = {
    contract.PREPARE: 5,
    contract.COMPILE: 10,
    contract.TRAIN: 75,
    contract.CONSOLIDATE: 5,
    contract.MERGE: 5,
    contract.EVALUATE: 10,
    contract.PUBLISH: 5,
}
"""Share of the work that a stage is taken for in `progress`."""


_NO_FINDINGS = Findings()


@dataclass(frozen=True)
class Conclusion:
    """The job's end, or the state it is in: the Succeeded condition in parts."""

    status: ConditionStatus
    reason: Reason
    message: str


def derive_status(
    job: FineTuneJob,
    observed: Observed,
    pipeline: Pipeline,
    now: datetime,
    *,
    problem: Waiting | None = None,
    findings: Findings = _NO_FINDINGS,
    plan: PlanStatus | None = None,
    cost: Cost | None = None,
) -> FineTuneJobStatus:
    """The status of a job that is not refused.

    `problem` is what keeps the due stage from being started, `findings` what the checks of the spec say, `plan` that of
    a dry run, whose pipeline is held, and `cost` what the attempts took.
    """
    conclusion = _conclude(observed, pipeline, problem, plan)
    before = job.status
    finished = conclusion.status != "Unknown"
    conditions: tuple[Condition, ...] = before.conditions
    rows = _conditions(job, observed, pipeline, conclusion, problem, findings)
    for kind, (status, reason, message) in rows.items():
        conditions = with_condition(
            conditions, kind, status, reason, message, observed_generation=job.generation, now=whole_second(now)
        )
    current, progress = pipeline.current, pipeline.progress
    return FineTuneJobStatus(
        observed_generation=job.generation,
        spec_digest=job.spec.end_digest,
        conditions=conditions,
        phase=_phase(job, pipeline, conclusion, problem),
        stage=_stage_text(pipeline),
        progress=_progress_text(pipeline, progress, conclusion),
        eta=_eta_text(progress) if not finished else None,
        reason=conclusion.reason,
        message=conclusion.message,
        start_time=_start_time(job, observed, pipeline, now, finished=finished, held=problem is not None),
        completion_time=(before.completion_time or whole_second(now)) if finished else None,
        stages=tuple(_stage_status(stage, problem, current, observed, now) for stage in pipeline.stages),
        training=derive_training(pipeline, progress, before.training),
        evaluation=derive_evaluation(pipeline),
        attempts=tuple(derive_attempts(pipeline, before, now))[-MAX_ATTEMPTS:],
        restarts=pipeline.restarts,
        artifacts=derive_artifacts(pipeline),
        trainable_parameters=derive_trainable_parameters(pipeline),
        cost=cost,
        plan=plan,
    )


def planned_status(job: FineTuneJob, plan: PlanStatus, findings: Findings, now: datetime) -> FineTuneJobStatus:
    """The status of a job whose spec.dryRun was set from its start: nothing was started, and it is not at its end."""
    conditions = job.status.conditions
    rows: dict[ConditionType, tuple[ConditionStatus, str, str]] = {
        ConditionType.SUCCEEDED: ("Unknown", Reason.DRY_RUN, plan.message),
        ConditionType.VALIDATED: _validated(findings),
    }
    for kind, (status, why, words) in rows.items():
        conditions = with_condition(
            conditions, kind, status, why, words, observed_generation=job.generation, now=whole_second(now)
        )
    return FineTuneJobStatus(
        observed_generation=job.generation,
        conditions=conditions,
        phase=str(Phase.PENDING),
        reason=str(Reason.DRY_RUN),
        message=cut_message(plan.message),
        plan=plan,
    )


def refused_status(
    job_status: FineTuneJobStatus, generation: int, reason: Reason, message: str, now: datetime
) -> FineTuneJobStatus:
    """The status of a job whose spec is wrong or asks for what is not available: at its end until the spec changes."""
    conditions = job_status.conditions
    rows: dict[ConditionType, tuple[ConditionStatus, str, str]] = {
        ConditionType.SUCCEEDED: ("False", reason, message),
        ConditionType.VALIDATED: ("False", reason, message),
    }
    for kind, (status, why, words) in rows.items():
        conditions = with_condition(
            conditions, kind, status, why, words, observed_generation=generation, now=whole_second(now)
        )
    return job_status.model_copy(
        update={
            "observed_generation": generation,
            "spec_digest": None,
            "conditions": conditions,
            "phase": str(Phase.FAILED),
            "reason": str(reason),
            "message": cut_message(message),
            "completion_time": job_status.completion_time or whole_second(now),
            "eta": None,
        }
    )


def _conclude(observed: Observed, pipeline: Pipeline, problem: Waiting | None, plan: PlanStatus | None) -> Conclusion:
    current = pipeline.current
    if current is None:
        return _success(pipeline)
    if current.state is StageState.FAILED:
        message = f"Stage {current.name}: {current.message}"
        # The end is said only when it is so: nothing of the job runs any more.
        return Conclusion("Unknown" if observed.is_anything_live() else "False", current.reason, message)
    if current.state is StageState.SUSPENDED:
        return Conclusion("Unknown", current.reason, current.message)
    if current.reason is Reason.DRY_RUN and plan is not None:
        return Conclusion("Unknown", Reason.DRY_RUN, plan.message)
    if problem is not None:
        return Conclusion("Unknown", problem.reason, f"Stage {current.name}: {problem.message}")
    return Conclusion("Unknown", current.reason, f"Stage {current.name}: {current.message}")


def _validated(findings: Findings) -> tuple[ConditionStatus, str, str]:
    """Only a dry run can have been found wrong here: any other job is refused, and has no status of this kind."""
    if findings.refused is not None:
        return "False", findings.refused.reason, findings.refused.message
    return "True", Reason.VALID, " ".join(("Every check of the spec passed.", *findings.doubts))


def _success(pipeline: Pipeline) -> Conclusion:
    shown = _shown(pipeline)
    reused = [stage.name for stage in shown if stage.state is StageState.REUSED]
    if len(reused) == len(shown):
        return Conclusion("True", Reason.REUSED, "Every stage found its artifact complete, so nothing was run.")
    found = f" {', '.join(reused)}: found complete, not run." if reused else ""
    return Conclusion("True", Reason.COMPLETED, f"Every stage has its artifact.{found}")


def _conditions(
    job: FineTuneJob,
    observed: Observed,
    pipeline: Pipeline,
    conclusion: Conclusion,
    problem: Waiting | None,
    findings: Findings,
) -> dict[ConditionType, tuple[ConditionStatus, str, str]]:
    rows: dict[ConditionType, tuple[ConditionStatus, str, str]] = {
        ConditionType.SUCCEEDED: (conclusion.status, conclusion.reason, conclusion.message),
        ConditionType.VALIDATED: _validated(findings),
        ConditionType.STORAGE_READY: _storage(observed, pipeline, problem),
        ConditionType.HEALTHY: _healthy(pipeline),
        ConditionType.SUSPENDED: _suspended(job, observed),
    }
    if pipeline.queue is not None:
        rows[ConditionType.QUOTA_RESERVED] = (pipeline.queue.status, pipeline.queue.reason, pipeline.queue.message)
    for stage in pipeline.stages:
        row = _stage_condition(stage)
        if problem is not None and stage is pipeline.current and stage.is_new:
            row = ("Unknown", problem.reason, problem.message)
        rows[STAGE_CONDITIONS[stage.name]] = row
    return rows


_STORAGE_REASONS = frozenset(
    {
        Reason.CLAIM_MISSING,
        Reason.CLAIM_NOT_BOUND,
        Reason.CLAIM_NOT_SHARED,
        Reason.SECRET_MISSING,
        Reason.MOUNT_FAILED,
    }
)


def _storage(observed: Observed, pipeline: Pipeline, problem: Waiting | None) -> tuple[ConditionStatus, str, str]:
    if problem is not None and problem.reason in _STORAGE_REASONS:
        return "False", problem.reason, problem.message
    current = pipeline.current
    if current is not None and current.reason in _STORAGE_REASONS:
        return "False", current.reason, current.message
    if observed.attempts or observed.claim is not None:
        return "True", Reason.COMPLETED, "The workspace's claim and the Secrets that stages mount are there."
    return "Unknown", Reason.PENDING, "Not looked for yet."


_UNHEALTHY = frozenset({Reason.NODE_FAULT, Reason.NODE_LOST, Reason.HANGING})


def _healthy(pipeline: Pipeline) -> tuple[ConditionStatus, str, str]:
    """False from a node's fault or a hang on until the next attempt runs."""
    current = pipeline.current
    outcome = None
    if current is not None and current.state is not StageState.RUNNING:
        outcome = next((each for each in reversed(current.outcomes) if each is not None), None)
    if outcome is not None and outcome.result is Result.RETRY and outcome.reason in _UNHEALTHY:
        return "False", outcome.reason, outcome.message
    return "True", Reason.VALID, "No node of the job is faulty, and nothing hangs."


def _suspended(job: FineTuneJob, observed: Observed) -> tuple[ConditionStatus, str, str]:
    if not job.spec.suspend:
        return "False", Reason.NOT_SUSPENDED, "spec.suspend is false."
    if observed.is_anything_live():
        return "False", Reason.SUSPENDING, "Pods of the job are still ending."
    return "True", Reason.SUSPENDED, "spec.suspend is true and no pod of the job is left."


def _stage_condition(stage: StagePlan) -> tuple[ConditionStatus, str, str]:
    if stage.state in (StageState.SUCCEEDED, StageState.REUSED):
        return "True", stage.reason, stage.message or f"Stage {stage.name} has its artifact."
    status: ConditionStatus = "False" if stage.state in (StageState.FAILED, StageState.SKIPPED) else "Unknown"
    return status, stage.reason, stage.message


def _phase(job: FineTuneJob, pipeline: Pipeline, conclusion: Conclusion, problem: Waiting | None) -> str:
    if conclusion.status != "Unknown":
        return str(Phase.SUCCEEDED if conclusion.status == "True" else Phase.FAILED)
    current = pipeline.current
    if current is None or job.spec.suspend:
        return str(Phase.SUSPENDED)
    if current.state is StageState.QUEUED:
        return str(Phase.QUEUED)
    if current.reason is Reason.DRY_RUN:
        return str(Phase.PENDING)
    if current is pipeline.stages[0] and not current.attempts and (current.start is None or problem is not None):
        return str(Phase.PENDING)
    return str(STAGE_PHASES[current.name])


def _shown(pipeline: Pipeline) -> list[StagePlan]:
    return [stage for stage in pipeline.stages if stage.state is not StageState.SKIPPED]


def _stage_text(pipeline: Pipeline) -> str:
    shown = _shown(pipeline)
    current = pipeline.current or shown[-1]
    return f"{shown.index(current) + 1}/{len(shown)} {current.name}"


def _progress_text(pipeline: Pipeline, progress: Progress | None, conclusion: Conclusion) -> str:
    if conclusion.status == "True":
        return "100%"
    shown = _shown(pipeline)
    done = sum(_WEIGHTS[stage.name] for stage in shown if stage.state in DONE)
    if progress is not None and progress.total_steps > 0:
        done += int(_WEIGHTS[progress.stage] * min(1.0, progress.step / progress.total_steps))
    return f"{min(99, 100 * done // sum(_WEIGHTS[stage.name] for stage in shown))}%"


def _eta_text(progress: Progress | None) -> str | None:
    if progress is None or progress.seconds_left is None:
        return None
    minutes, seconds = divmod(int(progress.seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def _start_time(
    job: FineTuneJob, observed: Observed, pipeline: Pipeline, now: datetime, *, finished: bool, held: bool
) -> datetime | None:
    if finished:
        return job.status.start_time
    if job.spec.suspend or (pipeline.current is not None and pipeline.current.reason is Reason.DRY_RUN):
        return None
    since = running_since(job)
    if since is not None:
        return since
    begun = bool(observed.attempts) or (not held and any(stage.start is not None for stage in pipeline.stages))
    return whole_second(now) if begun else None


def _stage_status(
    stage: StagePlan, problem: Waiting | None, current: StagePlan | None, observed: Observed, now: datetime
) -> StageStatus:
    latest, outcome = stage.latest, stage.latest_outcome
    number = stage.start.number if stage.start is not None else (latest.number if latest else 0)
    held = problem if problem is not None and stage is current and stage.is_new else None
    shown = latest if latest is not None and latest.number == number else None
    begun = shown.job.created_at if shown is not None and shown.job is not None else None
    if begun is None and outcome is not None and shown is not None:
        begun = outcome.started_at
    ended = outcome.finished_at if outcome is not None and stage.state in (*DONE, StageState.FAILED) else None
    artifact = None
    if stage.success is not None and stage.success.report is not None:
        artifact = as_artifact(stage.success.report.artifacts.get(stage.name))
    name = stage.start.name if stage.start is not None else (latest.name if latest is not None else None)
    return StageStatus(
        name=stage.name,
        state=str(StageState.WAITING if held is not None else stage.state),
        attempt=number if held is None else number - 1,
        job_name=name if held is None else None,
        start_time=begun,
        completion_time=ended,
        duration_seconds=_seconds(begun, ended),
        input_digest=f"sha256:{stage.digest}" if stage.digest else None,
        artifact=artifact,
        reason=str(held.reason if held is not None else stage.reason),
        message=(held.message if held is not None else stage.message) or None,
        exit_code=outcome.exit_code if outcome is not None else None,
        nodes=tuple(sorted({pod.node for pod in latest.pods if pod.node}))[:MAX_NODES] if latest is not None else (),
        log=outcome.log if outcome is not None else (),
        queue_seconds=_queue_seconds(shown, observed, now),
    )


def _queue_seconds(attempt: Attempt | None, observed: Observed, now: datetime) -> int | None:
    """Seconds for which the attempt waited for Kueue, since its last preemption where there was one."""
    job = attempt.job if attempt is not None else None
    workload = observed.workloads.get(job.uid) if job is not None else None
    if job is None or workload is None or not workload.admitted:
        return None
    preemptions = noted_preemptions(job.annotations).last
    waited = queue_wait_seconds(preemptions[-1].at if preemptions else job.created_at, workload, now)
    return None if waited is None else int(waited)


def _seconds(begun: datetime | None, ended: datetime | None) -> int | None:
    if begun is None or ended is None:
        return None
    return max(0, int((ended - begun) / timedelta(seconds=1)))


MAX_ATTEMPT_LOG_LINES = 5
"""Of an attempt that is past; the stage's status has more of its newest one."""


def derive_attempts(pipeline: Pipeline, before: FineTuneJobStatus, now: datetime) -> Iterable[AttemptStatus]:
    """Every end that was none: failed attempts, and preemptions of one that went on later."""
    known = {(each.stage, each.attempt, each.reason, each.end_time): each for each in before.attempts}
    for stage in pipeline.stages:
        for position, (attempt, outcome) in enumerate(zip(stage.attempts, stage.outcomes, strict=True)):
            preemptions = noted_preemptions(attempt.job.annotations).last if attempt.job is not None else ()
            for each in preemptions:
                entry = AttemptStatus(
                    stage=stage.name,
                    attempt=attempt.number,
                    job_name=attempt.name or None,
                    end_time=each.at,
                    reason=str(Reason.PREEMPTED),
                    message=f"{each.reason}: {each.message}"[:4096],
                    counted=False,
                    lost_steps=_lost(each.step, pipeline, attempt),
                )
                yield _with_recovery(entry, (attempt,), known)
            if outcome is None or outcome.result not in (Result.RETRY, Result.FAIL):
                continue
            entry = AttemptStatus(
                stage=stage.name,
                attempt=attempt.number,
                job_name=attempt.name or None,
                # An end that was only just judged is recorded in this round, with this time.
                end_time=outcome.finished_at or whole_second(now),
                reason=str(outcome.reason),
                message=outcome.message[:4096],
                exit_code=outcome.exit_code,
                node=outcome.node,
                counted=outcome.counts,
                # Pods that have their grace may still write a checkpoint.
                lost_steps=None if attempt.live_pods else outcome.lost_steps,
                log=outcome.log[-MAX_ATTEMPT_LOG_LINES:],
            )
            yield _with_recovery(entry, stage.attempts[position + 1 : position + 2], known)


def _lost(step: int | None, pipeline: Pipeline, attempt: Attempt) -> int | None:
    """Steps since the checkpoint that was the newest then; what training posts later does not change it."""
    annotated = attempt.job.annotations.get(constants.ANNOTATION_CHECKPOINT_STEP, "") if attempt.job is not None else ""
    if step is None or not annotated.isdigit():
        return None
    return max(0, step - int(annotated))


def _with_recovery(
    entry: AttemptStatus,
    following: Iterable[Attempt],
    known: Mapping[tuple[str, int, str, datetime | None], AttemptStatus],
) -> AttemptStatus:
    """The entry with the seconds until all pods ran again; figures once known stay as they were."""
    before = known.get((entry.stage, entry.attempt, entry.reason, entry.end_time))
    if before is not None and before.recovery_seconds is not None:
        return entry.model_copy(update={"recovery_seconds": before.recovery_seconds, "lost_steps": before.lost_steps})
    for attempt in following:
        begun = [pod.started_at for pod in attempt.pods if pod.started_at is not None]
        since = entry.end_time
        if since is None or attempt.job is None or len(begun) < attempt.job.completions or max(begun) < since:
            continue
        seconds = int((max(begun) - since) / timedelta(seconds=1))
        return entry.model_copy(update={"recovery_seconds": max(0, seconds)})
    return entry
