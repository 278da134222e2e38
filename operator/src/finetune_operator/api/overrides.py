"""The typed spec.stages of a FineTuneJob: what single stages' pods get beside the operator's defaults.

Part of spec.py's models, in a file of its own because it speaks of pods where those speak of fine-tuning.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_operator.api.model import ImageReference, LabelKey, LabelValue, Model, Quantity


class Resources(Model):
    """Requests and limits of a stage's container."""

    requests: Annotated[dict[LabelKey, Quantity], Field(max_length=16)] = Field(
        default_factory=dict, description="Resources that the scheduler sets aside, by name."
    )
    limits: Annotated[dict[LabelKey, Quantity], Field(max_length=16)] = Field(
        default_factory=dict, description="Resources that the container never exceeds, by name."
    )


class Toleration(Model):
    """A taint that a stage's pods accept."""

    key: LabelKey | None = Field(
        default=None, description="Key of the taint; absent with operator Exists for every taint."
    )
    operator: Literal["Exists", "Equal"] = Field(default="Equal", description="How the taint's value is compared.")
    value: LabelValue | None = Field(default=None, description="Value of the taint, with operator Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Effect of the taint; absent for every effect."
    )
    toleration_seconds: int | None = Field(
        default=None,
        ge=0,
        le=2**31 - 1,
        description="Time that a running pod stays on a node with a NoExecute taint, in seconds.",
    )


class EnvVar(Model):
    """An environment variable. Secrets do not belong here: the job's fields take them by reference."""

    name: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = Field(
        description="Name of the variable."
    )
    value: Annotated[str, Field(max_length=4096)] = Field(
        default="", description="Value of the variable, in plain text."
    )


class StageOverrides(Model):
    """What one stage's pods get beside the operator's defaults."""

    resources: Resources | None = Field(
        default=None, description="Requests and limits of the stage's container, in place of the default ones."
    )
    node_selector: Annotated[dict[LabelKey, LabelValue], Field(max_length=16)] = Field(
        default_factory=dict, description="Labels that a node must have, beside those that the accelerator asks for."
    )
    tolerations: Annotated[
        tuple[Toleration, ...], Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = Field(default=(), description="Taints that the stage's pods accept, beside the default ones.")
    image: ImageReference | None = Field(
        default=None, description="Image of the stage, in place of the operator's default for it."
    )
    env: Annotated[
        tuple[EnvVar, ...],
        Field(
            max_length=64, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
        ),
    ] = Field(default=(), description="Environment variables of the stage's container, beside the operator's own.")
    active_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        le=31_536_000,
        description="Time of one attempt of the stage, from its pods' admission, after which it is ended and counts "
        "as a failed one, in seconds; absent: none.",
    )
    hang_seconds: int | None = Field(
        default=None,
        ge=30,
        le=86_400,
        description="Time without a step after which an attempt counts as hanging and is ended, in seconds; absent: "
        "the operator's default for train, and none for compile, whose steps are graphs that may take an hour each. No "
        "other stage reports steps.",
    )


class Stages(Model):
    """Overrides by stage."""

    prepare: StageOverrides | None = Field(default=None, description="Overrides of the prepare stage.")
    compile: StageOverrides | None = Field(
        default=None,
        description="Overrides of the compile stage. What it does not set is as for train, but for both times: a "
        "graph that is compiled in another environment or image than train's is compiled for nothing.",
    )
    train: StageOverrides | None = Field(
        default=None, description="Overrides of the train stage; each of its pods gets them."
    )
    consolidate: StageOverrides | None = Field(default=None, description="Overrides of the consolidate stage.")
    merge: StageOverrides | None = Field(default=None, description="Overrides of the merge stage.")
    evaluate: StageOverrides | None = Field(default=None, description="Overrides of the evaluate stage.")
    publish: StageOverrides | None = Field(default=None, description="Overrides of the publish stage.")

    def of(self, stage: str) -> StageOverrides:
        """The overrides of `stage`, empty ones where the spec has none. KeyError for a stage that does not exist.

        Those of compile are on top of train's.
        """
        if stage not in type(self).model_fields:
            raise KeyError(stage)
        overrides: StageOverrides = getattr(self, stage) or StageOverrides()
        return _on_top(overrides, self.of("train")) if stage == "compile" else overrides


def _on_top(own: StageOverrides, others: StageOverrides) -> StageOverrides:
    """`own` with those of `others` where it has none. Times are of one stage: no other has them."""
    env = {each.name: each for each in (*others.env, *own.env)}
    added = tuple(each for each in others.tolerations if each not in own.tolerations)
    return own.model_copy(
        update={
            "resources": own.resources or others.resources,
            "node_selector": {**others.node_selector, **own.node_selector},
            "tolerations": (*own.tolerations, *added),
            "image": own.image or others.image,
            "env": tuple(env.values()),
        }
    )
