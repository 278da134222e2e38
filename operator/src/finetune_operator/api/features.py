"""What the API already types but this release does not do yet, found before anything is started.

The reconciler calls it on every valid spec and sets Validated=False with reason FeatureNotAvailable for what it
returns, so that a job that asks for such a thing is told so instead of being run without it.
"""

from __future__ import annotations

from collections.abc import Iterator

from finetune_operator.api.problems import Problem
from finetune_operator.api.spec import FineTuneJobSpec

_AVAILABLE_FORMATS = ("dolly", "samsum", "promptCompletion")


def unavailable_features(spec: FineTuneJobSpec) -> tuple[Problem, ...]:
    """A Problem for each field whose value this release cannot serve; empty when it can serve the whole spec."""
    return tuple(
        Problem(f"spec.{field}", value, f"{field}: {value} is not available in this release; {remedy}")
        for field, value, remedy in _unavailable(spec)
    )


def _unavailable(spec: FineTuneJobSpec) -> Iterator[tuple[str, str | int, str]]:
    """(field, value, remedy) of each."""
    if spec.dataset.format not in _AVAILABLE_FORMATS:
        yield (
            "dataset.format",
            spec.dataset.format,
            f"use {', '.join(_AVAILABLE_FORMATS[:-1])} or {_AVAILABLE_FORMATS[-1]}",
        )
    if spec.dataset.packing == "wrapped":
        yield "dataset.packing", spec.dataset.packing, "use bestFit or none"
    if spec.method.type == "full":
        yield "method.type", spec.method.type, "use lora"
    if spec.method.quantization != "none":
        yield "method.quantization", spec.method.quantization, "use none"
    if spec.method.lora is not None and spec.method.lora.variant == "dora":
        yield "method.lora.variant", spec.method.lora.variant, "use standard or rslora"
    if spec.parallelism.tensor_parallel_size > 1:
        yield "parallelism.tensorParallelSize", spec.parallelism.tensor_parallel_size, "use 1"
    if spec.parallelism.pipeline_parallel_size > 1:
        yield "parallelism.pipelineParallelSize", spec.parallelism.pipeline_parallel_size, "use 1"
    if spec.accelerator.type != "cpu":
        yield "accelerator.type", spec.accelerator.type, "use cpu"
    if spec.compile is not None and spec.compile.enabled:
        yield "compile.enabled", "true", "remove compile"
    if spec.publish is not None:
        yield "publish", "publish", "remove it; the result stays on the workspace"
    if spec.queue is not None:
        yield "queue", spec.queue.name, "remove it"
    if spec.dry_run:
        yield "dryRun", "true", "remove it"
