"""Kueue for contract and end-to-end tests: brought up, given a team's queue as HyperPod's task governance names it.

On the local cluster the real Kueue is started and removed by its command line, once for all tests of a session; on an
existing one it has to be there.
Queues, flavors and the priority classes that were missing are removed afterwards.
"""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kube
import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCAL = os.environ.get("CLUSTER", "local") == "local"
API_VERSION = "kueue.x-k8s.io/v1beta1"
WORKLOADS = "workloads.kueue.x-k8s.io"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
PRIORITIES = {"fine-tuning-priority": 50, "inference-priority": 90}
"""WorkloadPriorityClasses and their values, as in AWS's sample of a cluster policy."""
START_SECONDS = 900
"""The first `kueue up` of a machine builds Kueue."""


def is_installed() -> bool:
    return WORKLOADS in kube.kubectl("get", "crd", "-o", "name", check=False)


def _command(action: str) -> None:
    command = ["python3", "hack/cluster/cluster.py", "kueue", action]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=START_SECONDS, check=False)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}"


class Switch:
    """Turns Kueue on and off for the tests of a session, which share it: a test may find it either way."""

    def __init__(self) -> None:
        self._found = self._is_on = is_installed()

    def on(self) -> None:
        """Kueue runs; a Job with a queue's label waits for it."""
        if not LOCAL:
            if not self._is_on:
                pytest.skip("the cluster has no Kueue")
        elif not self._is_on:
            _command("up")
            self._is_on = True

    def off(self) -> None:
        """No Kueue: its kinds and webhooks are gone."""
        if not self._is_on:
            return
        if not LOCAL:
            pytest.skip("the cluster has a Kueue, which is not ours to remove")
        _command("down")
        self._is_on = False

    def restore(self) -> None:
        """As it was when the session began."""
        if LOCAL and self._is_on != self._found:
            self.on() if self._found else self.off()


@dataclass(frozen=True)
class TeamQueue:
    """One team's queue in one namespace: ClusterQueue and LocalQueue `hyperpod-ns-<team>-...`, one ResourceFlavor."""

    namespace: str
    team: str

    @property
    def cluster_queue(self) -> str:
        return f"hyperpod-ns-{self.team}-clusterqueue"

    @property
    def local_queue(self) -> str:
        return f"hyperpod-ns-{self.team}-localqueue"

    @property
    def flavor(self) -> str:
        return f"ml.c5.4xlarge-{self.team}"

    @property
    def node_labels(self) -> dict[str, str]:
        """Labels of the flavor's nodes, where the queue was made with them."""
        return {"finetune-operator.io/test-flavor": self.team}

    def spec(self, **fields: Any) -> dict[str, Any]:
        """spec.queue of a FineTuneJob of the team, at the priority that fine-tuning has."""
        return {"name": self.local_queue, "priorityClass": "fine-tuning-priority", **fields}

    def used(self, resource: str = "cpu") -> str:
        """Quantity of a resource that is reserved in the ClusterQueue now."""
        status = kube.get("clusterqueue", self.cluster_queue).get("status", {})
        for flavor in status.get("flavorsReservation") or ():
            for entry in flavor["resources"]:
                if entry["name"] == resource:
                    return str(entry["total"])
        return "0"

    def wait_until_used(self, quantity: str, *, deadline: float = 30) -> None:
        last: list[str] = []

        def is_used() -> bool:
            last[:] = [self.used()]
            return last[0] == quantity

        reason = f"{quantity} CPUs to be reserved in {self.cluster_queue}"
        try:
            kube.eventually(is_used, deadline=deadline, reason=reason)
        except kube.DeadlineExceeded as error:
            raise kube.DeadlineExceeded(f"{error}: {last[0]} are") from None

    def patch(self, spec: Mapping[str, Any]) -> None:
        """Change the ClusterQueue."""
        kube.kubectl(
            "patch", "clusterqueue", self.cluster_queue, "--type=merge", "-p", json.dumps({"spec": dict(spec)})
        )

    def workloads(self) -> list[kube.Object]:
        return kube.items(WORKLOADS, "-n", self.namespace)

    def workload_of(self, owner: kube.Object) -> kube.Object:
        """The one Workload whose owner is that object."""
        uid = owner["metadata"]["uid"]

        def found() -> list[kube.Object]:
            owners = [(each, each["metadata"].get("ownerReferences") or []) for each in self.workloads()]
            return [each for each, references in owners if any(reference["uid"] == uid for reference in references)]

        (workload,) = kube.eventually(found, deadline=20, reason=f"the Workload of {owner['metadata']['name']}")
        return workload  # type: ignore[no-any-return]

    def make(self, name: str) -> None:
        """A LocalQueue of that name that leads to the team's ClusterQueue."""
        kube.apply(
            {
                "apiVersion": API_VERSION,
                "kind": "LocalQueue",
                "metadata": {"name": name, "namespace": self.namespace},
                "spec": {"clusterQueue": self.cluster_queue},
            }
        )

    def rival(self, name: str, *, cpu: str, priority: str = "inference-priority", **pod: Any) -> None:
        """Somebody else's Job in the same queue. `pod` replaces fields of its pods' spec."""
        kube.apply(
            {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {
                    "name": name,
                    "namespace": self.namespace,
                    "labels": {QUEUE_LABEL: self.local_queue, PRIORITY_LABEL: priority},
                },
                "spec": {"suspend": True, "backoffLimit": 0, "template": {"spec": {**_rival_pod(cpu), **pod}}},
            }
        )

    def wait_for_rival(self, name: str, *, deadline: float = 60) -> None:
        """Until the rival has its quota and Kueue has started it."""
        arguments = ("job", name, "-n", self.namespace)
        kube.wait_for(
            *arguments,
            until=lambda job: not job["spec"].get("suspend"),
            deadline=deadline,
            reason=f"Kueue to admit {name}",
        )

    def remove_rival(self, name: str) -> None:
        kube.kubectl("delete", "job", name, "-n", self.namespace, "--cascade=foreground", "--timeout=60s")


def _rival_pod(cpu: str) -> dict[str, Any]:
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 0,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "rival",
                "image": "example.invalid/rival",
                "resources": {"requests": {"cpu": cpu, "memory": "16Mi"}},
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
    }


@contextmanager
def team_queue(
    namespace: str, *, cpu: str, memory: str = "64Gi", team: str | None = None, with_node_labels: bool = False
) -> Iterator[TeamQueue]:
    """A team's queue with that much quota, where who is more important takes from who is less."""
    queue = TeamQueue(namespace, team or f"research-{uuid.uuid4().hex[:6]}")
    quota = [{"name": "cpu", "nominalQuota": cpu}, {"name": "memory", "nominalQuota": memory}]
    with ExitStack() as stack:
        for name, value in PRIORITIES.items():
            if kube.kubectl("get", "workloadpriorityclass", name, "-o", "name", "--ignore-not-found").strip():
                continue
            kube.apply(
                {
                    "apiVersion": API_VERSION,
                    "kind": "WorkloadPriorityClass",
                    "metadata": {"name": name},
                    "value": value,
                }
            )
            stack.callback(_delete, "workloadpriorityclass", name)
        labels = queue.node_labels if with_node_labels else {}
        kube.apply(
            {
                "apiVersion": API_VERSION,
                "kind": "ResourceFlavor",
                "metadata": {"name": queue.flavor},
                "spec": {"nodeLabels": labels} if labels else {},
            }
        )
        stack.callback(_delete, "resourceflavor", queue.flavor)
        kube.apply(
            {
                "apiVersion": API_VERSION,
                "kind": "ClusterQueue",
                "metadata": {"name": queue.cluster_queue},
                "spec": {
                    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                    "resourceGroups": [
                        {
                            "coveredResources": ["cpu", "memory"],
                            "flavors": [{"name": queue.flavor, "resources": quota}],
                        }
                    ],
                    "preemption": {"withinClusterQueue": "LowerPriority"},
                },
            }
        )
        stack.callback(_delete, "clusterqueue", queue.cluster_queue)
        queue.make(queue.local_queue)
        kube.kubectl("wait", "--for=condition=Active", f"clusterqueue/{queue.cluster_queue}", "--timeout=30s")
        yield queue


def _delete(kind: str, name: str) -> None:
    """Not waited for: Kueue keeps a queue until its last Workload is gone, which the namespace's end brings about."""
    kube.kubectl("delete", kind, name, "--wait=false", "--ignore-not-found", check=False)
