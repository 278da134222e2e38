"""The operator killed around a sample of the API calls of a whole job; `make test-kills` dies at every one of them."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import kill_runs
import pytest
from kill_runs import Plan, Verdict
from operator_account import Account
from raw_api import read_access

DEATHS = 16
"""About as many as fit into half a minute."""


@pytest.mark.timeout(420)
async def test_a_killed_operator_leaves_one_job_a_stage_and_a_finished_job(
    account: Account, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    access, operators = await read_access(os.environ["KUBECONFIG"]), await read_access(str(account.kubeconfig))
    prefix = f"contract-kills-{uuid.uuid4().hex[:6]}"
    async with kill_runs.Lane(access, operators, f"{prefix}-calm", tmp_path) as lane:
        calm = await lane.run(None)
    assert calm.problems == ()
    verdicts: list[Verdict] = []
    plan = Plan(first=3, step=max(1, 2 * len(calm.calls) // DEATHS))
    _, leftovers = await kill_runs.sweep(access, operators, prefix, tmp_path, 2, plan, verdicts.append)
    struck = [verdict for verdict in verdicts if verdict.struck is not None]
    record_property("deaths", [f"{verdict.death}: {verdict.struck}" for verdict in struck])
    assert {f"{verdict.death}, {verdict.struck}": verdict.problems for verdict in verdicts if verdict.problems} == {}
    assert leftovers == []
    assert len(struck) >= DEATHS // 2
    assert any(verdict.struck.mutates for verdict in struck if verdict.struck)
