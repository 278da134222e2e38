"""What both arms of bench/operator create is what the operator itself asks for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import workload
from workload import STAGES, Chain, capture, chain_name, finetune_job

from finetune_operator.api import constants
from finetune_operator.api.finetunejob import parse_job
from finetune_trainer import contract


@pytest.fixture(scope="module")
def chain() -> Chain:
    return capture("bench")


def job(chain: Chain, index: int, number: int) -> dict[str, Any]:
    text = chain.job(index, chain_name(number), f"{number:032x}")
    return json.loads(text)  # type: ignore[no-any-return]


def test_the_finetunejob_is_valid_and_asks_for_every_stage() -> None:
    body = finetune_job("chain-00001", "bench")
    body["metadata"] |= {"uid": "u", "generation": 1}
    assert set(parse_job(body).spec.stages.as_json()) == set(contract.STAGES)


def test_the_floor_has_a_job_for_each_stage_in_order(chain: Chain) -> None:
    stages = [job(chain, index, 1)["metadata"]["labels"][constants.LABEL_STAGE] for index in range(len(chain))]
    assert stages == list(STAGES) == list(contract.STAGES)


def test_chains_differ_in_name_and_uid_only(chain: Chain) -> None:
    for index in range(len(chain)):
        one, other = job(chain, index, 1), job(chain, index, 2)
        assert one["metadata"]["name"].startswith("chain-00001-")
        text = json.dumps(one).replace("chain-00001", "chain-00002").replace(f"{1:032x}", f"{2:032x}")
        assert json.loads(text) == other
        assert one != other


def test_the_floors_jobs_have_no_owner_and_run_on_fake_nodes_only(chain: Chain) -> None:
    for index in range(len(chain)):
        found = job(chain, index, 1)
        assert "ownerReferences" not in found["metadata"]
        pod = found["spec"]["template"]["spec"]
        assert pod["nodeSelector"].items() >= workload.fake_nodes.LABEL.items()
        assert {"key", "value", "effect"} <= set(pod["tolerations"][-1])
