"""Kueue's Workloads for tests of the pure core, spelt as Kueue 0.12.2 writes them (pkg/workload, pkg/scheduler).

kueue_workloads.json has Workloads as the real Kueue 0.12.2 left them at moments of a few Jobs' lives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from finetune_operator.core.times import format_time

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
JOB_UID = "0a1b2c3d-0000-0000-0000-000000000001"


def at(seconds: float) -> datetime:
    """A moment, so many seconds after NOW."""
    return NOW + timedelta(seconds=seconds)


def condition(kind: str, status: str, reason: str, message: str, seconds: float = 0) -> dict[str, Any]:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": format_time(at(seconds)),
        "observedGeneration": 1,
    }


def workload(*conditions: Mapping[str, Any], flavors: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A stage's Workload with these conditions; an admission is added where quota is reserved."""
    status: dict[str, Any] = {"conditions": [dict(each) for each in conditions]}
    if any(each["type"] == "QuotaReserved" and each["status"] == "True" for each in conditions):
        assignment = {"name": "main", "count": 2, "flavors": dict(flavors or {"cpu": "ml.trn1.32xlarge"})}
        status["admission"] = {"clusterQueue": "hyperpod-ns-research-clusterqueue", "podSetAssignments": [assignment]}
    return {
        "apiVersion": "kueue.x-k8s.io/v1beta1",
        "kind": "Workload",
        "metadata": {
            "name": "job-tiny-train-01234567-1-0a1b2",
            "namespace": "team-a",
            "uid": "w-1",
            "finalizers": ["kueue.x-k8s.io/resource-in-use"],
            "labels": {"kueue.x-k8s.io/job-uid": JOB_UID},
            "ownerReferences": [
                {
                    "apiVersion": "batch/v1",
                    "kind": "Job",
                    "name": "tiny-train-01234567-1",
                    "uid": JOB_UID,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": {
            "active": True,
            "queueName": "hyperpod-ns-research-localqueue",
            "priority": 50,
            "priorityClassName": "fine-tuning-priority",
            "priorityClassSource": "kueue.x-k8s.io/workloadpriorityclass",
            "podSets": [{"name": "main", "count": 2, "template": {"spec": {"containers": [{"name": "stage"}]}}}],
        },
        "status": status,
    }


def pending(message: str, seconds: float = 0) -> dict[str, Any]:
    """No quota, in the scheduler's words."""
    return condition("QuotaReserved", "False", "Pending", message, seconds)


def reserved(seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Quota reserved and admitted at that second."""
    words = "Quota reserved in ClusterQueue hyperpod-ns-research-clusterqueue"
    return (
        condition("QuotaReserved", "True", "QuotaReserved", words, seconds),
        condition("Admitted", "True", "Admitted", "The workload is admitted", seconds),
    )


def evicted(reason: str, message: str, seconds: float) -> dict[str, Any]:
    return condition("Evicted", "True", reason, message, seconds)


def readmitted(message: str, *, again: float, evictions: Mapping[str, int] | None = None) -> dict[str, Any]:
    """A Workload that was evicted with `message` and has its quota again since second `again`."""
    raw = workload(
        *reserved(again),
        condition("Evicted", "False", "QuotaReserved", f"Previously: {message}", again),
        condition("Preempted", "False", "QuotaReserved", f"Previously: {message}", again),
        condition("Requeued", "True", "Preempted", message, again - 1),
    )
    counts = {"Preempted": 1} if evictions is None else evictions
    raw["status"]["accumulatedPastExexcutionTimeSeconds"] = 55
    raw["status"]["schedulingStats"] = {
        "evictions": [{"reason": reason, "underlyingCause": "", "count": count} for reason, count in counts.items()]
    }
    return raw


def recorded() -> dict[str, dict[str, Any]]:
    """The recorded Workloads by their moment, `<job>: <what had happened>`, in the order of time."""
    text = Path(__file__).with_name("kueue_workloads.json").read_text(encoding="utf-8")
    return {entry["moment"]: entry["workload"] for entry in json.loads(text)}
