"""What neuron and cuda share: a training pod has a node and all its devices to itself.

All devices or none: on Trainium a part of them (more than one, fewer than all) has to be neighbours, which needs a
scheduler extension. Only the stages that use devices ask for them; every other stage of the job runs on CPUs anywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finetune_operator.core.accelerators.instances import InstanceType, requestable_cpu, requestable_memory_gib
from finetune_operator.core.nodes import LABEL_INSTANCE_TYPE
from finetune_trainer import contract

DEVICE_STAGES = frozenset({contract.COMPILE, contract.TRAIN})
"""Stages that run on the accelerator's nodes."""

EFA = "vpc.amazonaws.com/efa"
"""Network interfaces, as the AWS EFA device plugin names them."""


@dataclass(frozen=True)
class WholeNode(ABC):
    """A job's share of nodes of one instance type. `device_resource` is the name that pods request devices by."""

    instance: InstanceType
    num_nodes: int
    device_resource: str

    taint: ClassVar[str]
    """Key of the taint that keeps other pods off the accelerator's nodes."""

    @property
    def procs_per_node(self) -> int:
        return self.instance.cores

    @property
    def has_efa(self) -> bool:
        """Whether the nodes of this job talk over EFA: one node alone needs no network."""
        return self.num_nodes > 1 and self.instance.efa > 0

    def env(self, stage: str) -> Mapping[str, str]:
        return self.all_env() if stage in DEVICE_STAGES else {}

    @abstractmethod
    def all_env(self) -> Mapping[str, str]:
        """Variables of every stage with devices. The same for compile and train: they are part of what is compiled."""

    def resources(self, stage: str) -> Mapping[str, str]:
        if stage not in DEVICE_STAGES:
            return {}
        efa = {EFA: str(self.instance.efa)} if self.has_efa else {}
        return {self.device_resource: str(self.instance.devices), **efa}

    def requests(self, stage: str) -> Mapping[str, str]:
        if stage not in DEVICE_STAGES:
            return {}
        return {"cpu": str(requestable_cpu(self.instance)), "memory": f"{requestable_memory_gib(self.instance)}Gi"}

    def node_selector(self, stage: str) -> Mapping[str, str]:
        return {LABEL_INSTANCE_TYPE: self.instance.name} if stage in DEVICE_STAGES else {}

    def tolerations(self, stage: str) -> tuple[Mapping[str, Any], ...]:
        if stage not in DEVICE_STAGES:
            return ()
        return ({"key": self.taint, "operator": "Exists", "effect": "NoSchedule"},)

    def shared_memory(self, stage: str) -> str | None:
        """An eighth of the memory the pod requests; it counts against the pod's limit only as far as it is filled."""
        if stage not in DEVICE_STAGES:
            return None
        return f"{max(1, requestable_memory_gib(self.instance) // 8)}Gi"
