"""Submits FineTuneJobs to a real API server and waits for what their status says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kube
import kubelet
from builders import job_body

from finetune_operator.api import constants


def submit(namespace: str, name: str = "tiny", **spec: Any) -> None:
    body = job_body(name=name, **{"stages": kubelet.OVERRIDES, **spec})
    kube.apply({**body, "metadata": {"name": name, "namespace": namespace}})


def wait_for_job(
    namespace: str, until: Callable[[kube.Object], Any], *, reason: str, name: str = "tiny", deadline: float = 30
) -> kube.Object:
    return kube.wait_for("ftj", name, "-n", namespace, until=until, deadline=deadline, reason=reason)


def events(namespace: str, reason: str, count: int) -> list[kube.Object]:
    """The events of that reason about the namespace's job, oldest first: so many as soon as they are there, no more."""

    def posted() -> list[kube.Object]:
        found = kube.items("events.events.k8s.io", "-n", namespace, "--sort-by=.eventTime")
        ours = [each for each in found if each["reason"] == reason and each["regarding"]["kind"] == constants.KIND]
        return ours if len(ours) >= count else []

    found: list[kube.Object] = kube.eventually(posted, deadline=10, reason=f"{count} events {reason}")
    assert len(found) == count, found
    return found


def condition(job: kube.Object, kind: str) -> dict[str, Any]:
    conditions = job.get("status", {}).get("conditions", [])
    return next((each for each in conditions if each["type"] == kind), {})


def stage(job: kube.Object, name: str) -> dict[str, Any]:
    return next((each for each in job.get("status", {}).get("stages", []) if each["name"] == name), {})


def has_phase(phase: str) -> Any:
    return lambda job: job.get("status", {}).get("phase") == phase
