"""What stages read cannot change under a running job, only under one that is suspended, planned, or has ended."""

from __future__ import annotations

import json
from typing import Any

import kube
from builders import job_manifest

CHANGES: dict[str, dict[str, Any]] = {
    "model": {"revision": "v2"},
    "dataset": {"maxLength": 512},
    "method": {"lora": {"rank": 16}},
    "training": {"maxSteps": 80},
    "parallelism": {"tensorParallelSize": 2},
    "accelerator": {"nodes": 1},
    "workspace": {"claimName": "other"},
    "compile": {"enabled": False},
    "merge": {"enabled": False},
    "evaluate": {"prompts": [{"text": "What is a pod?"}]},
    "publish": {"s3": {"uri": "s3://bucket/a"}},
    "queue": {"name": "research"},
    "stages": {"train": {"resources": {"limits": {"cpu": "2"}}}},
}

FREE: dict[str, dict[str, Any]] = {
    "suspend": {"suspend": True},
    "retryPolicy": {"retryPolicy": {"maxRetries": 5}},
    "activeDeadlineSeconds": {"activeDeadlineSeconds": 60},
    "ttlSecondsAfterFinished": {"ttlSecondsAfterFinished": 60},
    "dryRun": {"dryRun": True},
}


def create(namespace: str, **spec: Any) -> None:
    kube.kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(job_manifest(**spec)))


def patch(namespace: str, change: dict[str, Any], *flags: str) -> str:
    """The API server's answer to a merge patch of the job, refusals included."""
    body = json.dumps(change)
    return kube.kubectl("patch", "ftj", "tiny", "-n", namespace, "--type=merge", "-p", body, *flags, check=False)


def test_a_running_job_refuses_every_change_of_what_stages_read(namespace: str) -> None:
    create(namespace)
    for section, change in CHANGES.items():
        answer = patch(namespace, {"spec": {section: change}}, "--dry-run=server")
        remedy = f"spec.{section} is immutable while the job runs: set spec.suspend to true first, then change it"
        assert remedy in answer, section
    for name, change in FREE.items():
        assert "patched" in patch(namespace, {"spec": change}, "--dry-run=server"), name


def test_removing_a_section_counts_as_a_change(namespace: str) -> None:
    create(namespace, queue={"name": "research"})
    assert "spec.queue is immutable" in patch(namespace, {"spec": {"queue": None}})


def test_suspending_and_changing_at_once_is_refused(namespace: str) -> None:
    """Pods of the old spec may run on for their grace period; the change comes after the suspension."""
    create(namespace)
    assert "spec.training is immutable" in patch(namespace, {"spec": {"suspend": True, "training": {"maxSteps": 80}}})


def test_a_suspended_job_takes_every_change(namespace: str) -> None:
    create(namespace, suspend=True)
    for section, change in CHANGES.items():
        assert "patched" in patch(namespace, {"spec": {section: change}}, "--dry-run=server"), section
    assert "patched" in patch(namespace, {"spec": {"suspend": False, "training": {"maxSteps": 80}}})
    assert "spec.training is immutable" in patch(namespace, {"spec": {"training": {"maxSteps": 90}}})


def test_a_finished_job_takes_a_change(namespace: str) -> None:
    create(namespace)
    ended = {"status": {"phase": "Failed", "completionTime": "2026-01-02T03:04:05Z"}}
    assert "patched" in patch(namespace, ended, "--subresource=status")
    assert "patched" in patch(namespace, {"spec": {"training": {"maxSteps": 80}}})


def test_a_job_that_is_only_planned_takes_a_change_and_one_that_runs_meanwhile_does_not(namespace: str) -> None:
    create(namespace, dryRun=True)
    assert "spec.training is immutable" in patch(namespace, {"spec": {"training": {"maxSteps": 80}}}), "no plan yet"
    plan = {"worldSize": 2, "dataParallelSize": 2, "globalBatchSize": 2}
    assert "patched" in patch(namespace, {"status": {"plan": plan}}, "--subresource=status")
    assert "patched" in patch(namespace, {"spec": {"training": {"maxSteps": 80}}})
    assert "patched" in patch(namespace, {"status": {"startTime": "2026-01-02T03:04:05Z"}}, "--subresource=status")
    assert "spec.training is immutable" in patch(namespace, {"spec": {"training": {"maxSteps": 90}}})


def test_writing_labels_and_status_of_a_running_job_is_free(namespace: str) -> None:
    create(namespace)
    assert "patched" in patch(namespace, {"metadata": {"labels": {"team": "a"}}})
    assert "patched" in patch(namespace, {"status": {"phase": "Training"}}, "--subresource=status")
