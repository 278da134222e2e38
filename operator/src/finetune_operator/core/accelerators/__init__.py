"""What each spec.accelerator.type means for pods, behind one small interface: `of(job, …)` picks the module.

A type is one module here, and instances.py has what a node of each instance type offers. Types that the API accepts and
this release cannot run are refused before this is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.core.accelerators.cpu import CpuAccelerator
from finetune_operator.core.accelerators.cuda import CudaAccelerator
from finetune_operator.core.accelerators.instances import (
    BUILT_IN,
    DEVICE_RESOURCES,
    InstanceType,
    InstanceTypeError,
    find_instance_type,
)
from finetune_operator.core.accelerators.neuron import NeuronAccelerator


class Accelerator(Protocol):
    """Processes a training pod starts, and what a stage's pods get beside their plain settings.

    Every method but shared_memory gives an empty answer for a stage that needs no device.
    """

    @property
    def procs_per_node(self) -> int: ...

    def env(self, stage: str) -> Mapping[str, str]:
        """Environment variables of the stage's container."""

    def resources(self, stage: str) -> Mapping[str, str]:
        """Extended resources (devices, network interfaces) that the stage's container requests, by name."""

    def requests(self, stage: str) -> Mapping[str, str]:
        """cpu and memory of the stage's container where neither chart nor job says anything."""

    def node_selector(self, stage: str) -> Mapping[str, str]:
        """Labels that the stage's nodes must have."""

    def tolerations(self, stage: str) -> tuple[Mapping[str, Any], ...]:
        """Taints of the accelerator's nodes."""

    def shared_memory(self, stage: str) -> str | None:
        """Size of /dev/shm, as a Kubernetes quantity; None for the container runtime's 64 MiB."""


def find_instance(job: FineTuneJob, types: Mapping[str, InstanceType] = BUILT_IN) -> InstanceType | None:
    """The instance type of a job's training nodes, by the name in its spec; None for cpu, which needs no such entry.

    InstanceTypeError when the table does not have it, or has it with another accelerator than the job's.
    """
    wanted = job.spec.accelerator
    if wanted.type == "cpu":
        return None
    if wanted.instance_type is None:
        raise InstanceTypeError(f"spec.accelerator.instanceType is missing: type {wanted.type} needs it")
    found = find_instance_type(types, wanted.instance_type)
    if found.accelerator != wanted.type:
        raise InstanceTypeError(
            f"spec.accelerator.instanceType {found.name} has accelerator {found.accelerator}, but "
            f"spec.accelerator.type is {wanted.type}: change one of them"
        )
    return found


def of(
    job: FineTuneJob, types: Mapping[str, InstanceType] = BUILT_IN, device_resource: str | None = None
) -> Accelerator:
    """The accelerator of a job. `types` is the installation's table, `device_resource` what find_device_resource found.

    InstanceTypeError as find_instance.
    """
    wanted = job.spec.accelerator
    instance = find_instance(job, types)
    if instance is None:
        return CpuAccelerator(procs_per_node=wanted.processes_per_node, instance_type=wanted.instance_type)
    resource = device_resource or DEVICE_RESOURCES[instance.accelerator][0]
    made = NeuronAccelerator if wanted.type == "neuron" else CudaAccelerator
    return made(instance, wanted.nodes, resource)
