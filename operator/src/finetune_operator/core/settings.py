"""Settings: what the operator's installation decides for every job. Built by config.py, frozen.

The core and the reconciler read it and nothing else of the installation. Whatever has to do with the process itself
(ports, leases, log level) stays in config.OperatorConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from finetune_operator.core.accelerators.instances import BUILT_IN, InstanceType
from finetune_operator.core.accelerators.whole_node import DEVICE_STAGES
from finetune_operator.core.model_shapes import BUILT_IN_SHAPES, ModelShape
from finetune_trainer import contract

FEATURE_NEURON = "Neuron"
"""Gate of accelerator type neuron and of the compile stage."""

FEATURE_CUDA = "Cuda"
"""Gate of accelerator type cuda."""

FEATURE_PUBLISH = "Publish"
"""Gate of spec.publish and of the publish stage."""

FEATURES: Mapping[str, bool] = MappingProxyType({FEATURE_NEURON: False, FEATURE_CUDA: False, FEATURE_PUBLISH: False})
"""Every feature gate with its default. Off: this release's trainer cannot run what lies behind it yet."""


@dataclass(frozen=True)
class StageDefaults:
    """Pod settings of one stage where the job's spec.stages has none. Resources are Kubernetes quantities by name."""

    requests: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None
    """Image of the stage in place of those of Settings."""
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
class NodeSettings:
    """What a fault of a Kubernetes node does to the attempts and pods on it."""

    watch: bool = True
    """Whether nodes are watched at all. Without it a node's fault shows only by what happens to its pods."""
    avoid_seconds: float = 3600
    """Seconds for which a node stays avoided after its last fault, and the time in which its faults add up."""
    faults_to_avoid: int = 2
    """Faults of attempts on one node within avoid_seconds after which new attempts keep off it, 1 or more."""
    drain_seconds: float = 20
    """Grace, in seconds, of the pods of a gang whose node has a fault: time for a checkpoint where they still run."""


@dataclass(frozen=True)
class ProgressEndpoint:
    """Where stages post their progress, and the CA certificate (PEM) that they trust for it."""

    url: str
    ca_certificate: str


@dataclass(frozen=True)
class Settings:
    """The installation's choices. `trainer_image` should be tagged by content: it is part of every stage's digest."""

    trainer_image: str
    neuron_image: str | None = None
    """Image of the stages with devices of jobs on Neuron devices, in place of trainer_image; None: there is none."""
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    priority_class: str | None = None
    stages: Mapping[str, StageDefaults] = field(default_factory=dict)
    retry: RetryTiming = RetryTiming()
    progress: ProgressEndpoint | None = None
    features: Mapping[str, bool] = field(default_factory=lambda: FEATURES)
    """Feature gates by name; every name of FEATURES is in it."""
    instance_types: Mapping[str, InstanceType] = field(default_factory=lambda: BUILT_IN)
    """Instance types by name (ml.trn1.32xlarge ...): the built-in table with the installation's own entries over it."""
    model_shapes: Mapping[str, ModelShape] = field(default_factory=lambda: BUILT_IN_SHAPES)
    """Model shapes by name on the Hugging Face hub (org/name, in lower case): as for instance_types."""
    nodes: NodeSettings = NodeSettings()
    hang_seconds: float = 1800
    """Seconds without a step, in a training pod that posts progress, after which the attempt hangs. 0: never."""
    log_tail_lines: int = 20
    """Last lines of a failing container's log that go into the stage's status. 0: no log is read."""
    queue_enabled: bool = True
    """Whether spec.queue is served. Without it a job that names a queue is refused."""
    currency: str = "USD"
    """ISO 4217 code of the prices in instance_types and so of status.cost."""

    def has(self, feature: str) -> bool:
        """Whether a feature gate is on. KeyError for a name that FEATURES does not have."""
        return self.features.get(feature, FEATURES[feature])

    def image_of(self, stage: str, accelerator: str) -> str:
        """Image of a stage of a job with this accelerator.type where the job itself names none.

        An image for one stage comes before that for Neuron devices, and that before the one for all stages.
        """
        on_neuron = accelerator == "neuron" and stage in DEVICE_STAGES
        return self.of(stage).image or (self.neuron_image if on_neuron else None) or self.trainer_image

    def lacks_neuron_image(self, stage: str) -> bool:
        """Whether a Neuron job's stage would run in the image for all stages, which cannot use its devices."""
        return stage in DEVICE_STAGES and self.neuron_image is None and self.of(stage).image is None

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
