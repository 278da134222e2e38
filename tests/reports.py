"""Where a stage's report stands: on its own Job, or on the Job that was made right after it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

_PREFIX = "finetune-operator.io/"


def find_report(k8s_jobs: Iterable[dict[str, Any]], stage: str, attempt: int | None = None) -> dict[str, Any] | None:
    """The report of the stage's newest (or that) attempt that came to a good end, among a FineTuneJob's Jobs."""
    found: dict[int, dict[str, Any]] = {}
    for job in k8s_jobs:
        labels, annotations = job["metadata"]["labels"], job["metadata"].get("annotations", {})
        if labels[f"{_PREFIX}stage"] == stage and f"{_PREFIX}report" in annotations:
            found[int(labels[f"{_PREFIX}attempt"])] = json.loads(annotations[f"{_PREFIX}report"])
        for entry in json.loads(annotations.get(f"{_PREFIX}ended-before", "[]")):
            if entry["stage"] == stage:
                found[entry["attempt"]] = entry["report"]
    if attempt is not None:
        return found.get(attempt)
    return found[max(found)] if found else None


def report_of(k8s_jobs: Iterable[dict[str, Any]], stage: str, attempt: int | None = None) -> dict[str, Any]:
    """As find_report; AssertionError when there is none."""
    report = find_report(k8s_jobs, stage, attempt)
    assert report is not None, f"no report of {stage} attempt {attempt or 'any'}"
    return report
