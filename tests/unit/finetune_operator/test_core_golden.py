"""Every manifest that a job is made of, as files that a review reads. `make golden` rewrites them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import job_body
from simulated import Simulation

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden"


def example() -> dict[str, Any]:
    body: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "tiny-cpu.yaml").read_text(encoding="utf-8"))
    identity = job_body(name=body["metadata"]["name"])["metadata"]
    return {**body, "metadata": identity}


JOBS = {
    "tiny-cpu": example,
    "hub-model-overrides": lambda: job_body(
        name="hub-model-overrides",
        model={"source": "hf://org/gated", "tokenSecretRef": {"name": "hub", "key": "token"}},
        accelerator={"type": "cpu", "nodes": 1},
        stages={
            "train": {
                "resources": {"requests": {"cpu": "2"}, "limits": {"memory": "8Gi"}},
                "nodeSelector": {"disk": "fast"},
                "tolerations": [{"key": "batch", "operator": "Exists"}],
                "image": "registry.example/own-trainer:1",
                "env": [{"name": "OMP_NUM_THREADS", "value": "2"}],
            }
        },
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_golden_manifests(name: str) -> None:
    simulation = Simulation(body=JOBS[name]())
    for stage in ("prepare", "train", "consolidate", "merge", "evaluate"):
        simulation.settle()
        simulation.run_stage(stage)
    made = [*simulation.services.values(), *simulation.jobs.values()]
    for manifest in made:
        del manifest["metadata"]["creationTimestamp"], manifest["metadata"]["uid"]
        for key in [key for key in manifest["metadata"].get("annotations", {}) if key.endswith(("outcome", "report"))]:
            del manifest["metadata"]["annotations"][key]
    text = yaml.safe_dump_all(sorted(made, key=lambda m: (m["metadata"]["name"], m["kind"])), width=120)
    path = GOLDEN / f"job-{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path.name} differs: run `make golden` and review the diff"
