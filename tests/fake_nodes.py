"""Fake nodes that KWOK plays the kubelet of, and what a FineTuneJob needs to have its pods put there and nowhere else.

tests/fake_stages.yaml says how their pods run. Every object here is a plain manifest; nothing is done with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

STAGES_FILE = Path(__file__).with_name("fake_stages.yaml")
INSTANCE_TYPE = "ml.trn1.32xlarge"
LABEL = {"finetune-operator.io/fake": "true"}
SELECTOR = "finetune-operator.io/fake=true"
TAINT = {"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"}
CLAIM = "workspace"
PUBLISHER = "finetune-publisher"

_RESOURCES = {
    "cpu": "10k",
    "memory": "100Ti",
    "ephemeral-storage": "100Ti",
    "pods": "100k",
    "aws.amazon.com/neuron": "160k",
    "aws.amazon.com/neuroncore": "320k",
    "vpc.amazonaws.com/efa": "80k",
}
"""Of one node: room for every pod of a benchmark at once, so that no pod ever waits for a node."""


def node(index: int) -> dict[str, Any]:
    """A node of INSTANCE_TYPE that takes only pods that tolerate TAINT."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": f"fake-{index}",
            "annotations": {"kwok.x-k8s.io/node": "fake"},
            "labels": {
                **LABEL,
                "kubernetes.io/hostname": f"fake-{index}",
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": "amd64",
                "node.kubernetes.io/instance-type": INSTANCE_TYPE,
            },
        },
        "spec": {"taints": [TAINT]},
        "status": {"allocatable": _RESOURCES, "capacity": _RESOURCES},
    }


def stage_overrides(stages: tuple[str, ...]) -> dict[str, Any]:
    """spec.stages of a FineTuneJob whose pods run on fake nodes only."""
    toleration = {**TAINT, "operator": "Equal"}
    return {stage: {"nodeSelector": LABEL, "tolerations": [toleration]} for stage in stages}


def workspace(namespace: str) -> list[dict[str, Any]]:
    """A volume and the claim that is bound to it at once; no pod on a fake node ever mounts it."""
    name = f"fake-{namespace}"
    size = {"storage": "1Gi"}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name, "labels": LABEL},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "capacity": size,
            "claimRef": {"namespace": namespace, "name": CLAIM},
            "hostPath": {"path": f"/nonexistent/{name}"},
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": CLAIM, "namespace": namespace},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": size},
            "storageClassName": "",
            "volumeName": name,
        },
    }
    return [volume, claim]


def publisher(namespace: str) -> dict[str, Any]:
    """The service account of the publish stage."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": PUBLISHER, "namespace": namespace},
    }
