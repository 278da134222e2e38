"""Test objects of the operator's API: the only place where a FineTuneJob is spelt out for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job_specs import job_spec

from finetune_operator.api.constants import API_VERSION, KIND
from finetune_operator.api.finetunejob import FineTuneJob, parse_job


def job_body(
    *,
    name: str = "tiny",
    namespace: str = "team-a",
    uid: str = "11111111-2222-3333-4444-555555555555",
    generation: int = 1,
    metadata: Mapping[str, Any] | None = None,
    status: Mapping[str, Any] | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """A FineTuneJob as the API server gives it, runnable on two CPU pods; `spec` is merged into its spec."""
    body: dict[str, Any] = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid,
            "generation": generation,
            "creationTimestamp": "2026-01-02T03:04:05Z",
            **(metadata or {}),
        },
        "spec": job_spec(**spec),
    }
    if status is not None:
        body["status"] = dict(status)
    return body


def job_manifest(*, name: str = "tiny", **spec: Any) -> dict[str, Any]:
    """A FineTuneJob as a user writes it, without what the API server adds."""
    return {**job_body(**spec), "metadata": {"name": name}}


def make_job(**changes: Any) -> FineTuneJob:
    """job_body's object, parsed. make_job(suspend=True, training={"maxSteps": 3}, name="other")."""
    return parse_job(job_body(**changes))
