"""make test-resume: runs of train killed at every step, by SIGKILL, and resumed: sha256-equal to one left alone.

Every step and every moment of a checkpoint's writing, 1, 2 and 4 processes, copies and shares, LoRA and full
fine-tuning; and every change of world size and strategy between two attempts. A sample of it is in
tests/unit/finetune_trainer/test_resume.py. The artifact's digest covers weights, moments, random states and loss log.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny_model as tiny_model_source
from train_runs import METHOD, ONE_STEP, Ranks, gradient_of_one_step, outputs, read_reports, train_config

from finetune_trainer.contract import ExitCode, StageConfig

pytestmark = pytest.mark.timeout(600)

STEPS = 8
EVERY = 3
TRAINING = {"maxSteps": STEPS, "checkpointEverySteps": EVERY, "logEverySteps": 2}
FULL = {"type": "full", "quantization": "none"}
METHODS: dict[str, dict[str, Any]] = {"lora": METHOD, "full": FULL, "one step": FULL}
SAVED = [step for step in range(1, STEPS + 1) if step % EVERY == 0 or step == STEPS]
KILLS = [
    *(f"step:{step}" for step in range(1, STEPS + 1)),
    *(f"rush:{step + 1}" for step in SAVED if step < STEPS),
    *(f"{place}:{step}" for step in SAVED for place in ("file", "publish")),
]
WORLDS = [(nodes, strategy) for nodes in (1, 2, 4) for strategy in ("ddp", "fsdp")]
KILLED = [
    *(("lora", nodes, strategy) for nodes, strategy in WORLDS),
    *(("full", nodes, strategy) for nodes, strategy in ((2, "ddp"), (2, "fsdp"), (4, "fsdp"))),
]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    server = Ranks()
    yield server
    server.close()


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("space")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module: ModuleType = tiny_model_source
    folder: Path = module.write_tiny_model(tmp_path_factory.mktemp("model"))
    return folder


Config = Callable[[str, str, int, str], StageConfig]


@pytest.fixture(scope="module")
def config_for(space: Path, tiny_model: Path) -> Config:
    def config(name: str, method: str, nodes: int, strategy: str) -> StageConfig:
        return train_config(
            space,
            tiny_model,
            nodes=nodes,
            strategy=strategy,
            rendezvous="here:1",
            packed=True,
            output=f"finetune/jobs/n/j/{name}",
            training=ONE_STEP if method == "one step" else TRAINING,
            method=METHODS[method],
        )

    return config


@pytest.fixture(scope="module")
def uninterrupted(ranks: Ranks, space: Path, config_for: Config) -> Callable[[str, int, str], str]:
    @cache
    def digest(method: str, nodes: int, strategy: str) -> str:
        name = f"whole-{method}-{nodes}-{strategy}"
        reports = ranks.run(config_for(name, method, nodes, strategy), space / name, nodes)
        assert reports[0].exit_code == ExitCode.SUCCESS, outputs(space / name)
        return reports[0].artifacts["train"].digest

    return digest


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize(("method", "nodes", "strategy"), KILLED, ids=str)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(
    ranks: Ranks,
    space: Path,
    config_for: Config,
    uninterrupted: Callable[[str, int, str], str],
    method: str,
    nodes: int,
    strategy: str,
    kill: str,
) -> None:
    expected = uninterrupted(method, nodes, strategy)
    name = f"killed-{method}-{nodes}-{strategy}-{kill.replace(':', '-')}"
    config = config_for(name, method, nodes, strategy)
    ranks.run_killed(config, space / name, nodes, kill)

    reports = ranks.run(replace(config, attempt=2), space / name, nodes)

    assert reports[0].exit_code == ExitCode.SUCCESS, outputs(space / name)
    place, at = kill.split(":")
    if place != "rush":
        before = [step for step in SAVED if step < int(at)]
        assert reports[0].metrics["resumedFromStep"] == (before[-1] if before else 0)
    assert reports[0].artifacts["train"].digest == expected


@pytest.mark.parametrize(("nodes", "strategy"), WORLDS, ids=str)
def test_sigterm_ends_in_a_checkpoint_and_the_run_goes_on_exactly(
    ranks: Ranks,
    space: Path,
    config_for: Config,
    uninterrupted: Callable[[str, int, str], str],
    nodes: int,
    strategy: str,
) -> None:
    name = f"stopped-{nodes}-{strategy}"
    config = config_for(name, "lora", nodes, strategy)
    codes = ranks.wait(ranks.start(config, space / name, nodes, kill="term:4"))
    assert codes == [ExitCode.INTERRUPTED] * nodes, outputs(space / name)
    assert {report.reason for report in read_reports(space / name)} == {"Interrupted"}
    reports = ranks.run(replace(config, attempt=2), space / name, nodes)
    assert reports[0].metrics["resumedFromStep"] == 5
    assert reports[0].artifacts["train"].digest == uninterrupted("lora", nodes, strategy)


@pytest.mark.parametrize(
    ("before", "after"),
    [(before, after) for before in WORLDS for after in WORLDS if before != after],
    ids=lambda world: f"{world[0]} {world[1]}",
)
def test_another_world_goes_on_with_the_same_batches(
    ranks: Ranks,
    space: Path,
    config_for: Config,
    uninterrupted: Callable[[str, int, str], str],
    before: tuple[int, str],
    after: tuple[int, str],
) -> None:
    uninterrupted("lora", 1, "ddp")
    name = f"changed-{before}-{after}".replace(" ", "")
    ranks.run_killed(config_for(name, "lora", *before), space / name, before[0], "step:5")
    config = replace(config_for(name, "lora", *after), attempt=2)
    reports = ranks.run(config, space / name, after[0])
    assert reports[0].metrics["resumedFromStep"] == EVERY, outputs(space / name)
    whole, found = (
        [json.loads(line) for line in (path / "training.jsonl").read_text().splitlines()]
        for path in (config_for("whole-lora-1-ddp", "lora", 1, "ddp").output_path, config.output_path)
    )
    assert [line["step"] for line in found] == [line["step"] for line in whole]
    for line, expected in zip(found, whole, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.parametrize(("nodes", "strategy"), WORLDS[1:], ids=str)
def test_the_gradient_is_the_same_however_many_ranks_share_a_batch(
    space: Path, config_for: Config, uninterrupted: Callable[[str, int, str], str], nodes: int, strategy: str
) -> None:
    for world in ((1, "ddp"), (nodes, strategy)):
        uninterrupted("one step", *world)
    alone, shared = (
        gradient_of_one_step(config_for(f"whole-one step-{n}-{s}", "one step", n, s).output_path)
        for n, s in ((1, "ddp"), (nodes, strategy))
    )
    assert float(np.linalg.norm(shared - alone) / np.linalg.norm(alone)) <= 1e-6
