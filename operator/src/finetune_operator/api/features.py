"""What the API already types but this release does not do yet, found before anything is started.

surroundings.py calls it on every valid spec, and Validated is False with reason FeatureNotAvailable for what it
returns, so that a job that asks for such a thing is told so instead of being run without it. A dry run has its plan
all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType

from finetune_operator.api.problems import Problem
from finetune_operator.api.spec import FineTuneJobSpec

_NO_GATES: Mapping[str, bool] = MappingProxyType({})


def unavailable_features(
    spec: FineTuneJobSpec,
    features: Mapping[str, bool] = _NO_GATES,
    *,
    queue_enabled: bool = True,
    lacks_image: Collection[str] = (),
) -> tuple[Problem, ...]:
    """A Problem for each field whose value this release cannot serve; empty when it can serve the whole spec.

    `features` are the installation's gates, by the names of core/settings.py; one that is not there is off.
    `queue_enabled` says whether the installation serves spec.queue; `lacks_image` are the stages for which it has no
    image that can use the devices of the job.
    """
    return tuple(
        Problem(f"spec.{field}", value, f"{value} is not available in this {where}; {remedy}")
        for field, value, where, remedy in _unavailable(spec, features, queue_enabled, lacks_image)
    )


def _unavailable(
    spec: FineTuneJobSpec, features: Mapping[str, bool], queue_enabled: bool, lacks_image: Collection[str]
) -> Iterator[tuple[str, str | int, str, str]]:
    """(field, value, what does not have it, remedy) of each."""
    release = "release"
    neuron = features.get("Neuron", False)
    if not (neuron and spec.accelerator.type == "neuron"):
        sizes = spec.parallelism
        if sizes.tensor_parallel_size > 1:
            yield "parallelism.tensorParallelSize", sizes.tensor_parallel_size, release, "use 1"
        if sizes.pipeline_parallel_size > 1:
            yield "parallelism.pipelineParallelSize", sizes.pipeline_parallel_size, release, "use 1"
    gates = {"cpu": True, "cuda": features.get("Cuda", False), "neuron": neuron}
    if not gates[spec.accelerator.type]:
        yield "accelerator.type", spec.accelerator.type, release, "use cpu"
    without = [stage for stage in lacks_image if spec.stages.of(stage).image is None]
    if neuron and spec.accelerator.type == "neuron" and without:
        named = " and ".join(f"stages.{stage}.image" for stage in without)
        remedy = f"have the chart's images.neuron set, or name an image for it in {named}"
        yield "accelerator.type", spec.accelerator.type, "installation", remedy
    if spec.compile is not None and spec.compile.enabled and not neuron:
        yield "compile.enabled", "true", release, "remove compile"
    if spec.publish is not None and not features.get("Publish", False):
        yield "publish", "publish", release, "remove it; the result stays on the workspace"
    elif spec.publish is not None and spec.publish.sage_maker_endpoint is not None:
        instance = spec.publish.sage_maker_endpoint.instance_type
        yield "publish.sageMakerEndpoint", instance, release, "remove it; an endpoint can serve what lies at s3.uri"
    if spec.queue is not None and not queue_enabled:
        yield "queue", spec.queue.name, "installation", "remove it, or have the chart's queue.enabled set"
