"""The objects that the demo itself makes: namespace, claim, the Job that makes the sources, the pod that reads a file.

Pure functions. The FineTuneJob is no part of them: it is examples/tiny-cpu.yaml as it stands.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

POD_UID = 65532
MOUNT = "/workspace"
SOURCES = f"{MOUNT}/sources"
SCRIPTS = "/demo"
CONTAINER = "sources"

_MINUTES = 60
SOURCES_DEADLINE_SECONDS = 10 * _MINUTES


def namespace(name: str) -> dict[str, Any]:
    """A namespace that admits nothing but pods of the restricted standard, which the stages meet."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def claim(namespace: str, name: str, storage_class: str | None, size: str) -> dict[str, Any]:
    """A ReadWriteMany claim; without a class the cluster's default one."""
    spec: dict[str, Any] = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": size}}}
    if storage_class is not None:
        spec["storageClassName"] = storage_class
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def sources(namespace: str, claim_name: str, image: str, files: list[Path], remove: str = "") -> list[dict[str, Any]]:
    """ConfigMap and Job that put model and dataset on the workspace.

    `files` are the script, the dataset and the prose, in this order. Their contents and the image name the objects, so
    a change of either makes a new Job. `remove` is a folder of the workspace to delete first, "" for none.
    """
    data = {path.name: path.read_text(encoding="utf-8") for path in files}
    digest = hashlib.sha256(json.dumps([data, image], sort_keys=True).encode()).hexdigest()[:8]
    metadata = {"name": f"demo-sources-{digest}", "namespace": namespace}
    script, dataset, text = (f"{SCRIPTS}/{path.name}" for path in files)
    command = ["python3", script, "--dataset", dataset, "--text", text, "--output", SOURCES]
    if remove:
        command += ["--remove", f"{MOUNT}/{remove}"]
    template = _pod(claim_name, image, CONTAINER, command)
    template["volumes"].append({"name": "scripts", "configMap": {"name": metadata["name"]}})
    template["containers"][0]["volumeMounts"].append({"name": "scripts", "mountPath": SCRIPTS})
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data},
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": metadata,
            "spec": {
                "backoffLimit": 0,
                "activeDeadlineSeconds": SOURCES_DEADLINE_SECONDS,
                "template": {"metadata": {"labels": {"app": metadata["name"]}}, "spec": template},
            },
        },
    ]


def reader(namespace: str, claim_name: str, image: str, path: str) -> dict[str, Any]:
    """A pod that prints the file at `path`, relative to the workspace's root."""
    metadata = {"name": "demo-reader", "namespace": namespace}
    pod = _pod(claim_name, image, "reader", ["cat", f"{MOUNT}/{path}"])
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod}


def _pod(claim_name: str, image: str, container: str, command: list[str]) -> dict[str, Any]:
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": POD_UID,
            "runAsGroup": POD_UID,
            "fsGroup": POD_UID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": container,
                "image": image,
                "imagePullPolicy": "IfNotPresent",
                "command": command,
                "env": [{"name": "HOME", "value": "/tmp"}],
                "resources": {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}},
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [{"name": "workspace", "mountPath": MOUNT}, {"name": "tmp", "mountPath": "/tmp"}],
            }
        ],
        "volumes": [
            {"name": "workspace", "persistentVolumeClaim": {"claimName": claim_name}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
