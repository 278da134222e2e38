"""What is done is not done again: by another job, after a change of what comes last, by a job that is applied anew."""

from __future__ import annotations

import json
from typing import Any

import kube
import pytest
from reports import report_of
from team import STAGES, Team, failed, make_sources, stage, succeeded, tiny_job

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def jobs_by_stage(team: Team, name: str) -> dict[str, str]:
    """Uid of the one Job of each stage."""
    jobs = team.k8s_jobs(name)
    found = {job["metadata"]["labels"]["finetune-operator.io/stage"]: job["metadata"]["uid"] for job in jobs}
    assert len(found) == len(jobs), "one Job a stage"
    return found


def model_of(team: Team, name: str) -> str:
    """Where the job's prepare stage has its base model from."""
    report = report_of(team.k8s_jobs(name), "prepare")
    return str(report["artifacts"]["model"]["path"])


def test_what_is_done_is_not_done_again(team: Team) -> None:
    make_sources(team)
    for name in ("first", "second"):
        team.apply(tiny_job(team, name))
    for name in ("first", "second"):
        team.wait(name, succeeded, 300, f"{name} to succeed", unless=failed)
    assert model_of(team, "first") == model_of(team, "second"), "two jobs at once share one base model"
    assert len(team.list_files("finetune/models/**/manifest.json")) == 1
    assert len(team.list_files("finetune/datasets/**/manifest.json")) == 1

    before = jobs_by_stage(team, "first")
    prompts = {"evaluate": {"prompts": [{"text": "What is the number after 9?", "expected": "It is 10."}]}}
    kube.kubectl("patch", "ftj", "first", "-n", team.namespace, "--type=merge", "-p", json.dumps({"spec": prompts}))

    def is_done_again(job: dict[str, Any]) -> bool:
        return bool(succeeded(job) and job["status"]["observedGeneration"] == job["metadata"]["generation"])

    team.wait("first", is_done_again, 120, "the changed evaluation", unless=failed)
    after = jobs_by_stage(team, "first")
    assert {name for name in STAGES if before[name] != after[name]} == {"evaluate"}, "only what changed ran"

    kube.kubectl("delete", "ftj", "second", "-n", team.namespace, "--timeout=60s")
    kube.eventually(lambda: not team.k8s_jobs("second"), deadline=60, reason="the Jobs of the deleted job to go")
    team.apply(tiny_job(team, "second"))
    job = team.wait("second", succeeded, 180, "the job that was applied anew", unless=failed)
    assert {name: stage(job, name)["state"] for name in STAGES} == dict.fromkeys(STAGES, "Reused")
    shown = kube.kubectl("get", "ftj", "second", "-n", team.namespace)
    assert "Reused" in shown, shown
