"""Instance types: what one node of each has. Data in one place, which the chart's `instanceTypes` can extend.

The accelerators take devices, cores and network interfaces from here, preflight takes memory and price. A name is
accepted with and without SageMaker's prefix `ml.`: the label node.kubernetes.io/instance-type has it on HyperPod and
not on other EKS clusters, and pods select nodes by the name as the spec writes it.

Sources. Devices, network interfaces (EFA), vCPU and memory: the table of the HyperPod CLI
(aws/sagemaker-hyperpod-cli, training/constants.py), for trn1.2xlarge and trn1n also the Neuron SDK's page "Amazon EC2
Trn1/Trn1n Architecture". NeuronCores, device memory and TFLOPS of Neuron devices: the Neuron SDK's pages "Trainium",
"Trainium2" and "Inferentia2 Architecture"; Trainium2 counts four logical cores a device, the default (LNC=2) on trn2.
inf2: the EC2 page of Inf2 and the named resources of meta-pytorch/torchx. TFLOPS of GPUs: NVIDIA's data sheets, bf16
tensor cores without sparsity. Memory of GPUs is what a process can get, which is less than the name of the card: CUDA
reports 22.0 GiB for the A10G and L4 of "24 GB", 39.4 and 79.1 for the A100, 79.1 for the H100, 139.8 for the H200.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

AcceleratorType = Literal["cpu", "cuda", "neuron"]

NEURON = "aws.amazon.com/neuron"
NEURON_DEVICE = "aws.amazon.com/neurondevice"
NVIDIA_GPU = "nvidia.com/gpu"

DEVICE_RESOURCES: Mapping[AcceleratorType, tuple[str, ...]] = MappingProxyType(
    {"neuron": (NEURON, NEURON_DEVICE), "cuda": (NVIDIA_GPU,), "cpu": ()}
)
"""Names by which Kubernetes hands out devices, the one to prefer first; device_names.py finds a cluster's."""

PREFIX = "ml."
"""What SageMaker puts before the EC2 name of an instance type."""


class InstanceTypeError(ValueError):
    """A job names an instance type that is not in the table, or one of another accelerator."""


@dataclass(frozen=True)
class InstanceType:
    """One node. Counts are per node, unless the name says per device."""

    name: str
    accelerator: AcceleratorType
    devices: int
    """Neuron devices or GPUs; 0 for CPU nodes."""
    cores_per_device: int
    """Training processes a device: its logical NeuronCores, 1 for a GPU."""
    efa: int
    """Elastic Fabric Adapter interfaces; 0 where nodes talk over TCP."""
    vcpus: int
    memory_gib: float
    device_memory_gib: float = 0
    """Memory of one device that a process can get."""
    bf16_tflops_per_device: float | None = None
    """Dense bf16 peak of one device in 10^12 operations a second; None where it is not known."""
    price_per_hour: float | None = None
    """Price of one node for an hour, in the installation's currency; None where the chart gives none."""

    @property
    def cores(self) -> int:
        """Training processes a node."""
        return self.devices * self.cores_per_device

    @property
    def core_memory_gib(self) -> float:
        """Device memory of one training process; 0 for CPU nodes."""
        return self.device_memory_gib / self.cores_per_device if self.cores_per_device else 0.0


@dataclass(frozen=True)
class _Device:
    accelerator: AcceleratorType
    cores: int
    memory_gib: float
    bf16_tflops: float


_TRAINIUM = _Device("neuron", 2, 32, 190)
_TRAINIUM2 = _Device("neuron", 4, 96, 667)
_INFERENTIA2 = _Device("neuron", 2, 32, 190)
_A100_40 = _Device("cuda", 1, 39.4, 312)
_A100_80 = _Device("cuda", 1, 79.1, 312)
_H100 = _Device("cuda", 1, 79.1, 989)
_H200 = _Device("cuda", 1, 139.8, 989)
_A10G = _Device("cuda", 1, 22.0, 70)
_L4 = _Device("cuda", 1, 22.0, 121)

_ROWS: tuple[tuple[str, _Device, int, int, int, int], ...] = (
    # name, device, devices, EFA, vCPU, memory in GiB
    ("ml.trn1.2xlarge", _TRAINIUM, 1, 0, 8, 32),
    ("ml.trn1.32xlarge", _TRAINIUM, 16, 8, 128, 512),
    ("ml.trn1n.32xlarge", _TRAINIUM, 16, 16, 128, 512),
    ("ml.trn2.3xlarge", _TRAINIUM2, 1, 1, 12, 128),
    ("ml.trn2.48xlarge", _TRAINIUM2, 16, 16, 192, 2048),
    ("ml.inf2.xlarge", _INFERENTIA2, 1, 0, 4, 16),
    ("ml.inf2.8xlarge", _INFERENTIA2, 1, 0, 32, 128),
    ("ml.inf2.24xlarge", _INFERENTIA2, 6, 0, 96, 384),
    ("ml.inf2.48xlarge", _INFERENTIA2, 12, 0, 192, 768),
    ("ml.p4d.24xlarge", _A100_40, 8, 4, 96, 1152),
    ("ml.p4de.24xlarge", _A100_80, 8, 4, 96, 1152),
    ("ml.p5.4xlarge", _H100, 1, 1, 16, 256),
    ("ml.p5.48xlarge", _H100, 8, 32, 192, 2048),
    ("ml.p5e.48xlarge", _H200, 8, 32, 192, 2048),
    ("ml.p5en.48xlarge", _H200, 8, 16, 192, 2048),
    ("ml.g5.xlarge", _A10G, 1, 0, 4, 16),
    ("ml.g5.2xlarge", _A10G, 1, 0, 8, 32),
    ("ml.g5.4xlarge", _A10G, 1, 0, 16, 64),
    ("ml.g5.8xlarge", _A10G, 1, 1, 32, 128),
    ("ml.g5.12xlarge", _A10G, 4, 1, 48, 192),
    ("ml.g5.16xlarge", _A10G, 1, 1, 64, 256),
    ("ml.g5.24xlarge", _A10G, 4, 1, 96, 384),
    ("ml.g5.48xlarge", _A10G, 8, 1, 192, 768),
    ("ml.g6.xlarge", _L4, 1, 0, 4, 16),
    ("ml.g6.2xlarge", _L4, 1, 0, 8, 32),
    ("ml.g6.4xlarge", _L4, 1, 0, 16, 64),
    ("ml.g6.8xlarge", _L4, 1, 1, 32, 128),
    ("ml.g6.12xlarge", _L4, 4, 1, 48, 192),
    ("ml.g6.16xlarge", _L4, 1, 1, 64, 256),
    ("ml.g6.24xlarge", _L4, 4, 1, 96, 384),
    ("ml.g6.48xlarge", _L4, 8, 1, 192, 768),
)

BUILT_IN: Mapping[str, InstanceType] = MappingProxyType(
    {
        name: InstanceType(
            name, device.accelerator, devices, device.cores, efa, vcpus, memory, device.memory_gib, device.bf16_tflops
        )
        for name, device, devices, efa, vcpus, memory in _ROWS
    }
)
"""The table without the chart's entries, by name."""


def _other_spelling(name: str) -> str:
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else PREFIX + name


def find_instance_type(types: Mapping[str, InstanceType], name: str) -> InstanceType:
    """The type of that name, with or without `ml.`; its `name` is as asked for, which is the node's label to select by.

    InstanceTypeError with what there is instead and the remedy for a name that the table does not have.
    """
    found = types.get(name) or types.get(_other_spelling(name))
    if found is None:
        family = name.removeprefix(PREFIX).split(".")[0]
        near = [known for known in sorted(types) if known.removeprefix(PREFIX).split(".")[0] == family]
        hint = f"of this family there are {', '.join(near)}" if near else f"there are {', '.join(sorted(types))}"
        raise InstanceTypeError(
            f"spec.accelerator.instanceType {name} is not known: {hint}. Correct it, or have the administrator "
            "describe it under instanceTypes in the values of the chart"
        )
    return found if found.name == name else replace(found, name=name)


@dataclass(frozen=True)
class _Rule:
    attribute: str
    least: float = 0
    whole: bool = False
    required: bool = False


_RULES: Mapping[str, _Rule] = MappingProxyType(
    {
        "accelerator": _Rule("accelerator", required=True),
        "devices": _Rule("devices", whole=True, required=True),
        "coresPerDevice": _Rule("cores_per_device", 1, whole=True),
        "efa": _Rule("efa", whole=True),
        "vcpus": _Rule("vcpus", 1, whole=True, required=True),
        "memoryGib": _Rule("memory_gib", 0.5, required=True),
        "deviceMemoryGib": _Rule("device_memory_gib"),
        "bf16TflopsPerDevice": _Rule("bf16_tflops_per_device"),
        "pricePerHour": _Rule("price_per_hour"),
    }
)
_ACCELERATORS = ("cpu", "cuda", "neuron")


def instance_types(extra: Mapping[str, Any]) -> Mapping[str, InstanceType]:
    """The built-in table with the chart's `instanceTypes` over it.

    An entry for a known name, with or without `ml.`, replaces the fields that it has; one for a new name needs
    accelerator, devices, vcpus and memoryGib, and deviceMemoryGib where it has devices. ValueError lists every wrong
    field with its value and what to write instead.
    """
    types = dict(BUILT_IN)
    problems: list[str] = []
    for name, entry in extra.items():
        where = f"instanceTypes.{name}"
        if not isinstance(entry, Mapping):
            problems.append(f"{where} is {entry!r}: write a map of {', '.join(_RULES)}")
            continue
        known = types.get(name) or types.get(_other_spelling(name))
        wrong = [*_wrong_fields(where, entry, is_new=known is None)]
        if not wrong:
            values = {_RULES[key].attribute: value for key, value in entry.items()}
            new = replace(known, **values) if known is not None else _make(name, values)
            wrong = [*_contradictions(where, new)]
            types[new.name] = new
        problems.extend(wrong)
    if problems:
        raise ValueError("; ".join(problems))
    return MappingProxyType(types)


def _make(name: str, values: Mapping[str, Any]) -> InstanceType:
    absent = {"cores_per_device": 1, "efa": 0}
    return InstanceType(name=name, **{**absent, **values})


def _wrong_fields(where: str, entry: Mapping[Any, Any], *, is_new: bool) -> Iterator[str]:
    for key, value in entry.items():
        rule = _RULES.get(key)
        if rule is None:
            yield f"{where}.{key} is no field: use {', '.join(_RULES)}"
        elif key == "accelerator":
            if value not in _ACCELERATORS:
                yield f"{where}.{key} is {value!r}: write one of {', '.join(_ACCELERATORS)}"
        elif not _is_number(value, whole=rule.whole) or not rule.least <= value < float("inf"):
            number = "a whole number" if rule.whole else "a number"
            yield f"{where}.{key} is {value!r}: write {number} of at least {rule.least:g}"
    if is_new:
        for key, rule in _RULES.items():
            if rule.required and key not in entry:
                yield f"{where}.{key} is missing: a new instance type needs it"


def _is_number(value: object, *, whole: bool) -> bool:
    return not isinstance(value, bool) and isinstance(value, int if whole else (int, float))


def _contradictions(where: str, new: InstanceType) -> Iterator[str]:
    if new.accelerator == "cpu" and new.devices:
        yield f"{where}.devices is {new.devices}: write 0 with accelerator cpu"
    if new.accelerator != "cpu" and not new.devices:
        yield f"{where}.devices is 0: write how many devices a node with accelerator {new.accelerator} has"
    if new.devices and not new.device_memory_gib:
        yield f"{where}.deviceMemoryGib is 0: write the memory of one device in GiB"


_CPU_RESERVED = ((1, 0.30), (1, 0.15), (2, 0.10), (float("inf"), 0.06))
_MEMORY_RESERVED = ((4, 0.30), (4, 0.25), (8, 0.20), (112, 0.17), (float("inf"), 0.07))


def requestable_cpu(instance: InstanceType) -> int:
    """Whole CPUs that a pod which has the node to itself can request: 119 of the 128 of trn1.32xlarge.

    Of the node's vCPUs 0.1 and 30 % of the first, 15 % of the second, 10 % of the next two and 6 % of all others stay
    with the kubelet, the system and its agents: the HyperPod CLI's rule (aws/sagemaker-hyperpod-cli,
    training/quota_allocation_util.py).
    """
    return max(1, int(instance.vcpus - 0.1 - _reserved(instance.vcpus, _CPU_RESERVED)))


def requestable_memory_gib(instance: InstanceType) -> int:
    """Whole GiB of memory that a pod which has the node to itself can request: 461 of the 512 of trn1.32xlarge.

    0.5 GiB and 30 % of the first 4 GiB, 25 % of the next 4, 20 % of the next 8, 17 % of the next 112 and 7 % of all
    others stay with the system; source as for requestable_cpu.
    """
    return max(1, int(instance.memory_gib - 0.5 - _reserved(instance.memory_gib, _MEMORY_RESERVED)))


def _reserved(amount: float, brackets: tuple[tuple[float, float], ...]) -> float:
    reserved = 0.0
    for size, share in brackets:
        part = min(size, amount)
        reserved += part * share
        amount -= part
    return reserved
