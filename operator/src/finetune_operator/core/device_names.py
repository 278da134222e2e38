"""Under which name a cluster hands out the accelerators of an instance type. Called by preflight and stages.py.

The Neuron device plugin has named one chip twice: `aws.amazon.com/neurondevice` up to Neuron 2.19, which the HyperPod
chart pins and task governance's ClusterQueues cover, and `aws.amazon.com/neuron` since. Nodes and ClusterQueue decide
which one a pod has to request; where they name different ones no pod can both be admitted and be scheduled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from finetune_operator.api.constants import Reason
from finetune_operator.core.accelerators.instances import DEVICE_RESOURCES, InstanceType
from finetune_operator.core.nodes import NodeState


@dataclass(frozen=True)
class DeviceName:
    """The resource to request. `source` says who named it: nodes, queue, or default where neither says anything."""

    name: str
    source: str


@dataclass(frozen=True)
class Mismatch:
    """Nodes and ClusterQueue name different resources: nothing can start until somebody changes one of them."""

    on_nodes: tuple[str, ...]
    in_queue: tuple[str, ...]
    message: str
    reason: Reason = Reason.NEURON_RESOURCE_NAME_MISMATCH


def find_device_resource(
    nodes: Iterable[NodeState],
    instance: InstanceType,
    covered: frozenset[str] | None = None,
    cluster_queue: str = "",
) -> DeviceName | Mismatch | None:
    """The name under which pods request the devices of `instance`; None for CPU nodes, which have none.

    `covered` is what the ClusterQueue covers, None without a queue or where it is not known. A queue that covers none
    of the names does not contradict the nodes: whether Kueue then ignores the resource or refuses it is Kueue's to say.
    Of several names that nodes expose, the one on most nodes wins.
    """
    names = DEVICE_RESOURCES[instance.accelerator]
    if not names:
        return None
    exposed = _exposed([node for node in nodes if node.instance_type == instance.name], names)
    quota = tuple(name for name in names if covered is not None and name in covered)
    both = tuple(name for name in exposed if name in quota)
    if both:
        return DeviceName(both[0], "nodes")
    if exposed and quota:
        queue = f"ClusterQueue {cluster_queue}" if cluster_queue else "the ClusterQueue"
        return Mismatch(
            exposed,
            quota,
            f"Nodes of type {instance.name} offer {' and '.join(exposed)}, but {queue} covers {' and '.join(quota)}: "
            f"update the Neuron device plugin so that nodes offer {quota[0]}, or give {queue} a quota of {exposed[0]}.",
        )
    if exposed:
        return DeviceName(exposed[0], "nodes")
    return DeviceName(quota[0], "queue") if quota else DeviceName(names[0], "default")


def _exposed(nodes: Iterable[NodeState], names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `names` that nodes expose, the most common first.

    A count of 0 is what a plugin leaves behind that was replaced, or that is just restarting: it is looked at only
    where no node has a device.
    """
    working: Counter[str] = Counter()
    registered: Counter[str] = Counter()
    for node in nodes:
        for name in names:
            if name in node.devices:
                (working if node.devices[name] else registered)[name] += 1
    counts = working or registered
    return tuple(sorted(counts, key=lambda name: (-counts[name], names.index(name))))
