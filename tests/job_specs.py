"""The spec of a FineTuneJob as plain JSON, for tests that run where the operator cannot: it needs Python 3.11."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

SPEC: Mapping[str, Any] = {
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


def job_spec(**changes: Any) -> dict[str, Any]:
    """A spec that two CPU pods can run, with `changes` merged into it."""
    return merged(SPEC, changes)
