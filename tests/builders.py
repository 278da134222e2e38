"""Test objects of the operator's API: the only place where a FineTuneJob is spelt out for tests."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from finetune_operator.api.constants import API_VERSION, KIND
from finetune_operator.api.finetunejob import FineTuneJob, parse_job

_SPEC: Mapping[str, Any] = {
    "model": {"source": "workspace:///models/tiny-llama"},
    "dataset": {"source": "workspace:///datasets/faq", "format": "dolly", "maxLength": 256, "validationPercent": 5},
    "method": {"type": "lora", "lora": {"rank": 8, "alpha": 16, "targetModules": ["q_proj", "v_proj"]}},
    "training": {"maxSteps": 40, "learningRate": 0.001, "warmupSteps": 4, "checkpointEverySteps": 10},
    "accelerator": {"type": "cpu", "nodes": 2},
    "workspace": {"claimName": "workspace"},
    "evaluate": {"prompts": [{"text": "What is a node?", "expected": "A machine."}]},
}


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` with `changes` merged into it, maps in depth; a value of None removes the key."""
    out = copy.deepcopy(dict(base))
    for key, value in changes.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
            out[key] = merged(out[key], value)
        else:
            out[key] = copy.deepcopy(value)
    return out


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
        "spec": merged(_SPEC, spec),
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
