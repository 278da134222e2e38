"""The demo as `make demo` runs it: from `kubectl apply` to a model that answers, then again from what is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import kube
import pytest
from team import remove_namespace

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def run_demo(namespace: str, image: str) -> str:
    command = [sys.executable, "hack/demo/demo.py", "--namespace", namespace, "--trainer-image", image]
    if os.environ.get("CLUSTER") == "existing":
        command.append("--existing-cluster")
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=840)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_the_demo_teaches_the_model_and_a_second_run_reuses_it(trainer_image: str, operator_namespace: str) -> None:
    namespace = f"demo-{uuid.uuid4().hex[:8]}"
    try:
        first = run_demo(namespace, trainer_image)
        assert first.rstrip().endswith("demo: Succeeded")
        scores = re.search(r"base (\d+) of (\d+).*tuned (\d+) of \d+", first.lower(), re.S)
        assert scores, "the demo prints how many prompts each model answers word for word"
        base, prompts, tuned = map(int, scores.groups())
        assert prompts == 10
        assert base == 0
        assert tuned >= 8
        jobs = {job["metadata"]["uid"] for job in kube.items("jobs", "-n", namespace)}

        second = run_demo(namespace, trainer_image)
        assert second.rstrip().endswith("demo: Succeeded")
        assert {job["metadata"]["uid"] for job in kube.items("jobs", "-n", namespace)} == jobs, "nothing ran again"
    finally:
        remove_namespace(namespace, "finetune-workspace")
