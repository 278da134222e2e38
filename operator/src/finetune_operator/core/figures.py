"""The figures of a status: training, evaluation and artifacts, from the stages' reports and what trainings post.

Called by status.py. A report's metrics are whatever the stage wrote, so each is checked for its type and left out when
it has another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from finetune_operator.api.status import (
    Artifact,
    Artifacts,
    Checkpoint,
    EvaluationStatus,
    PromptAnswers,
    TrainingStatus,
)
from finetune_operator.core.measures import derive_goodput
from finetune_operator.core.times import UTC
from finetune_trainer import contract
from finetune_trainer.contract import ArtifactRef

if TYPE_CHECKING:
    from finetune_operator.core.stages import Pipeline

MAX_ANSWER_LENGTH = 1024


@dataclass(frozen=True)
class Progress:
    """What a running training last posted. `seconds_left` is estimated from its pace, None before that is known."""

    stage: str
    attempt: int
    step: int
    total_steps: int
    loss: float | None = None
    tokens_per_second: float | None = None
    checkpoint_step: int | None = None
    checkpoint_time: datetime | None = None
    seconds_left: float | None = None
    digest: str = ""
    """Label of the stage's digest on the pod that posts, "" where that is not known."""
    advanced_at: datetime | None = None
    """When what it posts last changed: a step, a checkpoint, a phase."""
    phase: str = ""
    """What it does between steps (loading, saving ...), "" while it trains."""
    mfu: float | None = None
    """Share of the devices' peak that the model's arithmetic took, None where model or device is not known."""


def graphs_text(progress: Progress) -> str:
    """How far a compilation is, as a sentence: its steps are graphs, and there is no total before all are traced."""
    if not progress.total_steps:
        return "Its graphs are being traced."
    return f"{progress.step} of {progress.total_steps} graphs are compiled."


def whole_second(moment: datetime) -> datetime:
    """The moment as Kubernetes stores it: a status compared with what was read back must be equal."""
    return moment.astimezone(UTC).replace(microsecond=0)


def as_artifact(ref: ArtifactRef | None) -> Artifact | None:
    return None if ref is None else Artifact(path=ref.path, digest=ref.digest)


def derive_artifacts(pipeline: Pipeline) -> Artifacts | None:
    found = {}
    for field, stage in (
        ("adapter", contract.CONSOLIDATE),
        ("model", contract.MERGE),
        ("evaluation", contract.EVALUATE),
    ):
        report = _report(pipeline, stage)
        if report is not None and stage in report.artifacts:
            found[field] = as_artifact(report.artifacts[stage])
    return Artifacts(**found) if found else None


def _report(pipeline: Pipeline, stage: str) -> contract.Report | None:
    plan = next((plan for plan in pipeline.stages if plan.name == stage), None)
    return plan.success.report if plan is not None and plan.success is not None else None


def _metrics(pipeline: Pipeline, stage: str) -> dict[str, Any]:
    report = _report(pipeline, stage)
    return dict(report.metrics) if report is not None else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole_number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def derive_training(
    pipeline: Pipeline, progress: Progress | None, before: TrainingStatus | None
) -> TrainingStatus | None:
    """The report's figures when train is done, else what was last posted; that is kept until something newer comes."""
    train = next((plan for plan in pipeline.stages if plan.name == contract.TRAIN), None)
    metrics = _metrics(pipeline, contract.TRAIN)
    if metrics and train is not None and train.success is not None:
        step = _whole_number(metrics.get("step"))
        return TrainingStatus(
            step=step,
            total_steps=_whole_number(metrics.get("totalSteps")),
            loss=_rounded(metrics.get("loss")),
            tokens_per_second=_rounded(metrics.get("tokensPerSecond")),
            mfu=_rounded(metrics.get("mfu")),
            last_checkpoint=None if step is None else _checkpoint(step, train.success.finished_at, before),
            goodput=derive_goodput(train),
        )
    if progress is not None and progress.stage == contract.TRAIN:
        step = progress.checkpoint_step
        return TrainingStatus(
            step=progress.step,
            total_steps=progress.total_steps,
            loss=_rounded(progress.loss),
            tokens_per_second=_rounded(progress.tokens_per_second),
            mfu=_rounded(progress.mfu),
            last_checkpoint=None if step is None else _checkpoint(step, progress.checkpoint_time, before),
        )
    return before if train is not None and train.attempts else None


def _checkpoint(step: int, written_at: datetime | None, before: TrainingStatus | None) -> Checkpoint:
    """The checkpoint of that step; one that was known before keeps its time."""
    if before is not None and before.last_checkpoint is not None and before.last_checkpoint.step == step:
        return before.last_checkpoint
    return Checkpoint(step=step, time=None if written_at is None else whole_second(written_at))


def _rounded(value: Any) -> float | None:
    """Five significant digits: enough to read, short enough for a column."""
    number = _number(value)
    return None if number is None else float(f"{number:.5g}")


def derive_evaluation(pipeline: Pipeline) -> EvaluationStatus | None:
    metrics = _metrics(pipeline, contract.EVALUATE)
    if not metrics:
        return None
    return EvaluationStatus(
        base_loss=_rounded(metrics.get("baseLoss")),
        tuned_loss=_rounded(metrics.get("tunedLoss")),
        base_perplexity=_rounded(metrics.get("basePerplexity")),
        tuned_perplexity=_rounded(metrics.get("tunedPerplexity")),
        prompts_compared=_whole_number(metrics.get("promptsCompared")),
        base_exact_match=_rounded(metrics.get("baseExactMatch")),
        tuned_exact_match=_rounded(metrics.get("tunedExactMatch")),
        base_rouge_l=_rounded(metrics.get("baseRougeL")),
        tuned_rouge_l=_rounded(metrics.get("tunedRougeL")),
        prompts=tuple(_answers(metrics.get("prompts"))),
    )


def _answers(value: Any) -> Iterator[PromptAnswers]:
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("prompt"), str):
            texts = {key: _cut(entry.get(key)) for key in ("expected", "base", "tuned")}
            yield PromptAnswers(prompt=entry["prompt"][:MAX_ANSWER_LENGTH], **texts)


def _cut(value: Any) -> str | None:
    return value[:MAX_ANSWER_LENGTH] if isinstance(value, str) else None


def derive_trainable_parameters(pipeline: Pipeline) -> int | None:
    """Parameters that training changes, by train's report."""
    return _whole_number(_metrics(pipeline, contract.TRAIN).get("trainableParameters"))
