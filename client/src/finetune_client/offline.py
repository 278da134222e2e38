"""plan, render and preview without a cluster: the operator's own functions on a manifest.

What an installation decides (images, resources, prices, feature gates) comes from a file of its configuration where one
is given: `helm template` shows it, as the chart's ConfigMap. Without one the operator's built-in values stand in, and
what is shown says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from finetune_client.errors import ManifestError, SpecError
from finetune_client.manifests import Source, check_manifest, read_manifest
from finetune_operator.api import constants
from finetune_operator.api.finetunejob import FineTuneJob, Problem, parse_job
from finetune_operator.api.status import PlanStatus
from finetune_operator.config import ConfigError, read_config
from finetune_operator.core.accelerators.instances import InstanceTypeError
from finetune_operator.core.desired import service
from finetune_operator.core.observed import Observed
from finetune_operator.core.parallelism import ParallelismError
from finetune_operator.core.plan import derive_plan
from finetune_operator.core.settings import FEATURES, Settings
from finetune_operator.core.stages import derive_pipeline

Manifest = dict[str, Any]

UNKNOWN_IMAGE = "the-installations-trainer-image"
NO_SETTINGS = (
    "Without a cluster: images, resources, prices and feature gates are this package's built-in ones, and claim, "
    "quotas and queue were not looked at. `finetune plan FILE` asks the cluster."
)


@dataclass(frozen=True)
class Rendered:
    """What the operator would make for one stage. The names are final for the first stage only: those of the others
    depend on artifacts that do not exist yet."""

    stage: str
    manifests: tuple[Manifest, ...]
    """The Service of a stage of several pods, and its Job."""
    stage_json: Mapping[str, Any]
    """What the stage's program reads; in the Job it is an annotation of the pod template."""


def read_settings(config: Path | None, *, image: str | None = None) -> Settings:
    """The installation's settings from its configuration file (YAML), or the built-in ones with every feature on.

    `image` is the trainer's, in place of what the file says. ManifestError for a file that is not one.
    """
    if config is None:
        shown = image or UNKNOWN_IMAGE
        return Settings(trainer_image=shown, neuron_image=shown, features=dict.fromkeys(FEATURES, True))
    try:
        if not config.is_file():
            raise ManifestError(f"--config: there is no file {config}")
        settings = read_config({"FINETUNE_CONFIG_FILE": str(config), **_image_variable(image)}).settings()
    except ConfigError as error:
        raise ManifestError(f"--config: {error}") from error
    return replace(settings, progress=None)


def _image_variable(image: str | None) -> dict[str, str]:
    return {} if image is None else {"FINETUNE_TRAINER_IMAGE": image}


def plan_offline(source: Source, settings: Settings, now: datetime, *, name: str | None = None) -> PlanStatus:
    """The plan that a dry run would report, as far as it depends on the manifest alone. SpecError for a wrong one."""
    from finetune_operator.surroundings import check_features, check_job, planned_jobs, planned_starts

    job = _parse(source, name)
    try:
        pipeline = derive_pipeline(job, Observed(), settings, now)
        jobs = planned_jobs(job, settings, planned_starts(job, settings, None, pipeline))
        found = check_job(job, pipeline, settings)
    except (InstanceTypeError, ParallelismError) as error:
        raise SpecError([Problem("spec", None, str(error))]) from error
    return derive_plan(
        job,
        settings,
        jobs,
        found.parallelism,
        found.shape,
        found.instance,
        refused=check_features(job, settings) or found.findings.refused,
        doubts=found.findings.doubts,
        pod_memory_bytes=found.pod_memory_bytes,
    )


def render(
    source: Source, settings: Settings, now: datetime, *, namespace: str | None = None, name: str | None = None
) -> Iterator[Rendered]:
    """What the operator would make, stage by stage, by its own functions. SpecError for a wrong manifest."""
    from finetune_operator.surroundings import planned_jobs, planned_starts

    job = _parse(source, name, namespace)
    try:
        pipeline = derive_pipeline(job, Observed(), settings, now)
        starts = planned_starts(job, settings, None, pipeline)
        jobs = planned_jobs(job, settings, starts)
    except (InstanceTypeError, ParallelismError) as error:
        raise SpecError([Problem("spec", None, str(error))]) from error
    for stage, start in starts.items():
        made = (service(job, start), jobs[stage]) if start.completions > 1 else (jobs[stage],)
        text = jobs[stage]["spec"]["template"]["metadata"]["annotations"][constants.ANNOTATION_STAGE_JSON]
        yield Rendered(stage, tuple(dict(each) for each in made), json.loads(text))


def as_yaml(rendered: Rendered) -> str:
    """The stage's objects as YAML documents."""
    return yaml.safe_dump_all(rendered.manifests, sort_keys=False, width=120, explicit_start=True)


def preview(source: Path, arguments: list[str]) -> int:
    """Labelled samples of the job's data, by the trainer's own preview on this machine; its exit code.

    ManifestError where this installation of the trainer has no extra that can read data and tokenizers.
    """
    import importlib.util

    lacking = [name for name in ("numpy", "tokenizers", "transformers") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ManifestError(
            f"preview reads data and tokenizer as prepare does, and lacks here {', '.join(lacking)}: "
            f"install finetune-trainer[torch], or run `finetune-trainer preview {source.name}` in the trainer's image"
        )
    from finetune_trainer.preview import main

    return main([str(source), *arguments])


def _parse(source: Source, name: str | None, namespace: str | None = None) -> FineTuneJob:
    manifest = read_manifest(source, name=name)
    check_manifest(manifest)
    metadata = {"name": manifest["metadata"]["name"], "namespace": namespace or manifest["metadata"].get("namespace")}
    return parse_job({**manifest, "metadata": {**metadata, "uid": "not-yet"}, "status": None})
