"""The installed release of the chart: its values changed for a test, its pods, its leader, and the way back.

tests/e2e/conftest.py has it as the fixture `release`; kube.py has the client underneath.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import kube

CHART = Path(__file__).resolve().parents[1] / "charts" / "finetune-operator"
OPERATORS = "app.kubernetes.io/name=finetune-operator"


@dataclass(frozen=True)
class Release:
    """The installed release, which the Deployment and the Lease are named by."""

    name: str
    namespace: str
    deployment: str

    def helm(self, *arguments: str) -> str:
        command = [os.environ.get("HELM") or "helm", *arguments, "--namespace", self.namespace]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def revision(self) -> int:
        return int(json.loads(self.helm("history", self.name, "--max=1", "--output=json"))[-1]["revision"])

    def upgrade(self, *settings: str) -> None:
        """Change values by helm's own options, such as --set=a=b; returns when new pods are ready and old ones gone."""
        self.helm("upgrade", self.name, str(CHART), "--reuse-values", *settings, "--wait", "--timeout=3m")
        self.wait_for_one_generation()

    def back_to(self, revision: int) -> None:
        self.helm("rollback", self.name, str(revision), "--wait", "--timeout=3m")
        self.wait_for_one_generation()

    def wait_for_one_generation(self) -> None:
        wanted = kube.get("deployment", self.deployment, "-n", self.namespace)["spec"]["replicas"]
        kube.eventually(lambda: len(self.pods()) == wanted, deadline=60, reason="the old pods of the operator to go")

    def pods(self) -> dict[str, str]:
        """Uid by name of the operator's pods."""
        found = kube.items("pods", "-n", self.namespace, "-l", OPERATORS)
        return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in found}

    def leader(self) -> str:
        """Name of the pod that holds the Lease, empty for none."""
        identity = kube.get("lease", self.deployment, "-n", self.namespace)["spec"].get("holderIdentity") or ""
        return str(identity.rpartition("_")[0])


@contextmanager
def installed(namespace: str) -> Iterator[Release]:
    """The release in `namespace`, which is as it was again afterwards."""
    [deployment] = kube.items("deployments", "-n", namespace, "-l", OPERATORS)
    name = deployment["metadata"]["labels"]["app.kubernetes.io/instance"]
    release = Release(name, namespace, deployment["metadata"]["name"])
    revision = release.revision()
    try:
        yield release
    finally:
        if release.revision() != revision:
            release.back_to(revision)
