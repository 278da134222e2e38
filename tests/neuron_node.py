"""The local cluster's node as a Trainium node of a HyperPod cluster: its labels and extended resources, and away again.

What Kubernetes knows of a device is a count in the node's status. No device plugin has to stand behind it: a resource
that was patched on is counted, scheduled and kept by the kubelet as any other, and pods that ask for it run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import kube

from finetune_operator.core.accelerators.instances import NEURON
from finetune_operator.core.accelerators.whole_node import EFA
from finetune_operator.core.nodes import HEALTHY, LABEL_HEALTH, LABEL_INSTANCE_TYPE


@dataclass(frozen=True)
class NeuronNode:
    """A node with devices patched on."""

    name: str

    def health(self, value: str) -> None:
        """HyperPod's label of its node's health."""
        _patch(self.name, {"metadata": {"labels": {LABEL_HEALTH: value}}})

    def devices(self) -> dict[str, str]:
        """What it offers of the two resources."""
        allocatable = kube.get("node", self.name)["status"]["allocatable"]
        return {name: allocatable[name] for name in (NEURON, EFA) if name in allocatable}


@contextmanager
def dressed(instance_type: str, *, devices: int, efa: int) -> Iterator[NeuronNode]:
    """The cluster's one Ready node with so many devices and network interfaces in all; afterwards as it was."""
    [found] = [
        node for node in kube.items("nodes") if "kwok.x-k8s.io/node" not in node["metadata"].get("annotations", {})
    ]
    name, labels = found["metadata"]["name"], found["metadata"]["labels"]
    wanted = {LABEL_INSTANCE_TYPE: instance_type, LABEL_HEALTH: HEALTHY}
    before = {label: labels.get(label) for label in wanted}
    counts: dict[str, str | None] = {NEURON: str(devices), EFA: str(efa)}
    node = NeuronNode(name)
    try:
        _patch(name, {"metadata": {"labels": wanted}})
        _patch_status(name, counts)
        kube.eventually(lambda: node.devices() == counts, deadline=30, reason=f"node {name} to offer {counts}")
        yield node
    finally:
        _patch_status(name, dict.fromkeys(counts))
        _patch(name, {"metadata": {"labels": before}})


def _patch(name: str, patch: Mapping[str, Any]) -> None:
    kube.kubectl("patch", "node", name, "--type=merge", "-p", json.dumps(patch))


def _patch_status(name: str, counts: Mapping[str, str | None]) -> None:
    """Both in one go: the kubelet derives what is allocatable from the capacity, but only with its next heartbeat."""
    patch = {"status": {"capacity": dict(counts), "allocatable": dict(counts)}}
    kube.kubectl("patch", "node", name, "--subresource=status", "--type=merge", "-p", json.dumps(patch))
