"""Nodes that a test makes and whose kubelets it plays: the scheduler binds pods to them, and the node lifecycle
controller watches over their Leases.

kubelet.py has the rest of a kubelet's part, what becomes of the pods. Nothing but the test's own pods is put there.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fake_nodes
import kube

from finetune_operator.core.nodes import ANNOTATION_FAULT_DETAILS, LABEL_HEALTH, TAINT_HEALTH

KEY = "finetune-operator.io/test-nodes"
"""Label and taint of the nodes; the value is the namespace whose pods may go there."""
LEASES = "kube-node-lease"
RENEW_SECONDS = 10
"""As a kubelet does; after 50 seconds without the controller calls a node dead."""
ROOM = {"cpu": "900m", "memory": "8Gi", "pods": "10"}
"""For one pod of a stage, whose default is half a CPU: the pods of a gang go to different nodes."""


class WorkerNodes:
    """The nodes of one test, by name. Every one is Ready until silence()."""

    def __init__(self, namespace: str, count: int, *, labels: Mapping[str, str], room: Mapping[str, str]) -> None:
        self.names = tuple(f"{namespace}-{index}" for index in range(count))
        self._namespace = namespace
        self._alive = set(self.names)
        self._ended = threading.Event()
        self._renewal = threading.Thread(target=self._renew, daemon=True)
        kube.apply(_list([_node(name, namespace, labels, {**ROOM, **room}) for name in self.names]))
        self._renewal.start()

    def overrides(self, *stages: str) -> dict[str, Any]:
        """spec.stages of a job whose pods go to these nodes and nowhere else."""
        toleration = {"key": KEY, "operator": "Equal", "value": self._namespace, "effect": "NoSchedule"}
        return {stage: {"nodeSelector": {KEY: self._namespace}, "tolerations": [toleration]} for stage in stages}

    def label(self, name: str, health: str | None) -> None:
        """HyperPod's label of its node's health; None takes it away."""
        _patch(name, {"metadata": {"labels": {LABEL_HEALTH: health}}})

    def taint(self, name: str, *, unhealthy: bool) -> None:
        """HyperPod's taint, which its health monitoring sets beside the label."""
        taints = [_own_taint(self._namespace)]
        if unhealthy:
            taints.append({"key": TAINT_HEALTH, "value": "Unschedulable", "effect": "NoSchedule"})
        _patch(name, {"spec": {"taints": taints}})

    def fault(self, name: str, *details: Mapping[str, str]) -> None:
        """What HyperPod's health monitoring writes of the faults that it has seen."""
        _patch(name, {"metadata": {"annotations": {ANNOTATION_FAULT_DETAILS: json.dumps(details)}}})

    def silence(self, name: str) -> None:
        """Its kubelet is never heard of again."""
        self._alive.discard(name)

    def delete(self, name: str) -> None:
        self.silence(name)
        kube.kubectl("delete", "node", name)

    def close(self) -> None:
        self._ended.set()
        self._renewal.join(timeout=30)
        kube.kubectl("delete", "node", *self.names, "--ignore-not-found", "--wait=false")
        kube.kubectl("delete", "lease", *self.names, "-n", LEASES, "--ignore-not-found")

    def _renew(self) -> None:
        while self._alive:
            kube.apply(_list([_lease(name) for name in sorted(self._alive)]))
            if self._ended.wait(RENEW_SECONDS):
                return


@contextmanager
def made(
    namespace: str, count: int, *, labels: Mapping[str, str] | None = None, room: Mapping[str, str] | None = None
) -> Iterator[WorkerNodes]:
    """Nodes for the pods of a namespace, and the bound claim that these need. `room` is what a node has beside ROOM."""
    workspace = fake_nodes.workspace(namespace)
    kube.apply(_list(workspace))
    nodes = WorkerNodes(namespace, count, labels=labels or {}, room=room or {})
    try:
        yield nodes
    finally:
        # No kubelet would end these pods, so that they and their namespace would stay.
        kube.kubectl("delete", "ftj", "--all", "-n", namespace)
        kube.kubectl("delete", "pods", "--all", "-n", namespace, "--grace-period=0", "--force", "--wait=false")
        nodes.close()
        kube.kubectl("delete", "pv", workspace[0]["metadata"]["name"], "--wait=false")


def _list(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "List", "items": objects}


def _own_taint(namespace: str) -> dict[str, str]:
    return {"key": KEY, "value": namespace, "effect": "NoSchedule"}


def _node(name: str, namespace: str, labels: Mapping[str, str], room: Mapping[str, str]) -> dict[str, Any]:
    now = _now()
    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "KubeletReady",
        "message": "kubelet is posting ready status",
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
    }
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {KEY: namespace, **labels}},
        "spec": {"taints": [_own_taint(namespace)]},
        "status": {"allocatable": dict(room), "capacity": dict(room), "conditions": [ready]},
    }


def _lease(name: str) -> dict[str, Any]:
    renewed = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": name, "namespace": LEASES},
        "spec": {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": renewed},
    }


def _patch(name: str, patch: Mapping[str, Any]) -> None:
    kube.kubectl("patch", "node", name, "--type=merge", "-p", json.dumps(patch))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
