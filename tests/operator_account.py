"""The service account that an operator under test runs as: the chart's own, with exactly the chart's roles.

Contract tests and the kill runs start the operator as a process of this machine. With an administrator's kubeconfig a
right that the chart lacks would show only once it is installed; with this one the API server refuses, and its audit log
has every use under this account's name.
"""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kube
import pytest
import yaml
from rbac_audit import service_account_user

CHART = Path(__file__).resolve().parents[1] / "charts" / "finetune-operator"
KINDS = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
KUBERNETES = "1.34.4"
"""What helm takes the cluster for when it only renders."""
TOKEN_LIFE = "4h"
"""Longer than any session, and short enough that no cluster refuses it."""


@dataclass(frozen=True)
class Account:
    """A service account with the chart's rights. `manifests` are the chart's that give them."""

    namespace: str
    name: str
    kubeconfig: Path
    manifests: tuple[Mapping[str, Any], ...]

    @property
    def user(self) -> str:
        """Its name in the audit log."""
        return service_account_user(self.namespace, self.name)

    @property
    def lease(self) -> str:
        """The one Lease that it may hold."""
        return self.name

    @property
    def tls_secret(self) -> str:
        """The one Secret that it may write."""
        return f"{self.name}-tls"

    @property
    def environment(self) -> dict[str, str]:
        """What makes an operator process run as it, with its own objects in its own namespace."""
        return {"KUBECONFIG": str(self.kubeconfig), "FINETUNE_NAMESPACE": self.namespace}


ACCOUNT = pytest.StashKey[Account]()
"""Where a session keeps its account for the comparison at its end."""


def render(name: str, namespace: str, *values: str) -> tuple[Mapping[str, Any], ...]:
    """What the chart makes as release `name` that has to do with rights; `values` as helm's --set takes them."""
    images = [f"images.{image}.repository=example.invalid/{image}" for image in ("operator", "trainer")]
    sets = [part for value in (*images, "crds.install=false", *values) for part in ("--set", value)]
    command = [os.environ.get("HELM") or "helm", "template", name, str(CHART), "--namespace", namespace]
    command += ["--kube-version", KUBERNETES, *sets]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return tuple(each for each in yaml.safe_load_all(done.stdout) if each and each["kind"] in KINDS)


@contextmanager
def made(folder: Path) -> Iterator[Account]:
    """An account in a namespace of its own; its kubeconfig is written into `folder`. Gone afterwards."""
    name = f"contract-{uuid.uuid4().hex[:6]}-finetune-operator"
    namespace = name
    manifests = render(name, namespace, "rbac.aggregate=false")
    path = folder / "operator.kubeconfig"
    kube.kubectl("create", "namespace", namespace)
    try:
        kube.apply({"apiVersion": "v1", "kind": "List", "items": list(manifests)})
        token = kube.kubectl("create", "token", name, "-n", namespace, f"--duration={TOKEN_LIFE}").strip()
        path.touch(mode=0o600)
        path.write_text(json.dumps(kubeconfig_of(token)))
        # The authorizer hears of a new role a moment after it was written.
        kube.eventually(
            lambda: (
                kube.kubectl("auth", "can-i", "list", "jobs", "-A", "--kubeconfig", str(path), check=False).strip()
                == "yes"
            ),
            deadline=30,
            reason="the roles to be in force",
        )
        yield Account(namespace, name, path, manifests)
    finally:
        label = f"app.kubernetes.io/instance={name}"
        kube.kubectl("delete", "clusterrolebindings,clusterroles", "-l", label)
        kube.kubectl("delete", "namespace", namespace, "--wait=false")


def kubeconfig_of(token: str) -> dict[str, Any]:
    """The cluster of the current context, entered with a token."""
    config: dict[str, Any] = json.loads(kube.kubectl("config", "view", "--minify", "--flatten", "--raw", "-o", "json"))
    user = {"name": "operator", "user": {"token": token}}
    context = {**config["contexts"][0]["context"], "user": "operator"}
    context.pop("namespace", None)
    named = {"name": "operator", "context": context}
    return {**config, "users": [user], "contexts": [named], "current-context": "operator"}
