"""Settings: what the operator's installation decides for every job. Built by config.py, frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from finetune_trainer import contract

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class StageDefaults:
    """Pod settings of one stage where the job's spec.stages has none. Resources are Kubernetes quantities by name."""

    requests: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None
    """Image of the stage in place of Settings.trainer_image."""
    termination_grace_seconds: int = 30
    """Seconds between SIGTERM and SIGKILL: long enough for train to write a checkpoint."""


@dataclass(frozen=True)
class RetryTiming:
    """Waits before a next attempt, in seconds: doubled from `first` up to `longest`, for each kind of cause.

    The infrastructure's faults have their own, short ones: the fault is usually over when the pod is gone.
    """

    counted_first: float = 10
    counted_longest: float = 300
    uncounted_first: float = 1
    uncounted_longest: float = 60


@dataclass(frozen=True)
class ProgressEndpoint:
    """Where stages post their progress, and the CA certificate (PEM) that they trust for it."""

    url: str
    ca_certificate: str


@dataclass(frozen=True)
class Settings:
    """The installation's choices. `trainer_image` should be tagged by content: it is part of every stage's digest."""

    trainer_image: str
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    priority_class: str | None = None
    stages: Mapping[str, StageDefaults] = field(default_factory=dict)
    retry: RetryTiming = RetryTiming()
    progress: ProgressEndpoint | None = None

    def of(self, stage: str) -> StageDefaults:
        """The defaults of a stage; built-in ones where the installation has none."""
        return self.stages.get(stage) or BUILT_IN_DEFAULTS[stage]


def _defaults(cpu: str, memory: str, grace: int = 30) -> StageDefaults:
    return StageDefaults(
        requests={"cpu": cpu, "memory": memory}, limits={"memory": memory}, termination_grace_seconds=grace
    )


BUILT_IN_DEFAULTS: Mapping[str, StageDefaults] = MappingProxyType(
    {
        contract.PREPARE: _defaults("500m", "2Gi"),
        contract.COMPILE: _defaults("1", "8Gi", 120),
        contract.TRAIN: _defaults("500m", "3Gi", 300),
        contract.CONSOLIDATE: _defaults("500m", "2Gi"),
        contract.MERGE: _defaults("500m", "2Gi"),
        contract.EVALUATE: _defaults("500m", "3Gi"),
        contract.PUBLISH: _defaults("500m", "1Gi"),
    }
)
"""Used where the chart sets nothing: enough for a small model on a CPU."""
