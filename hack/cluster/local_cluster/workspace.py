"""The workspace on one node: a folder of the host as a PersistentVolume that a claim in any namespace can have.

hostPath volumes ignore fsGroup, so the folder itself is made writable for the pods' user.
"""

import json
import os

from .settings import POD_UID, Settings


def claim(settings: Settings, namespace: str, name: str, size: str = "100Gi") -> dict[str, object]:
    """A List of the volume and the claim that it is reserved for; ReadWriteMany, no storage class."""
    volume = f"{namespace}-{name}"
    both = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    return {
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": volume},
                "spec": {
                    **both,
                    "capacity": {"storage": size},
                    "persistentVolumeReclaimPolicy": "Retain",
                    "claimRef": {"kind": "PersistentVolumeClaim", "namespace": namespace, "name": name},
                    "hostPath": {"path": str(settings.workspace / volume), "type": "Directory"},
                },
            },
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": name, "namespace": namespace},
                "spec": {**both, "volumeName": volume, "resources": {"requests": {"storage": size}}},
            },
        ],
    }


def prepare_claim(settings: Settings, namespace: str, name: str) -> str:
    """Make the host's folder for the claim; the manifest to apply, as JSON, which is YAML too."""
    folder = settings.workspace / f"{namespace}-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    os.chown(folder, POD_UID, POD_UID)
    folder.chmod(0o777)
    return json.dumps(claim(settings, namespace, name), indent=1)
