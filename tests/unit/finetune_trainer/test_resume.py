"""Runs of train in real processes that are killed, stopped, or find damage, and go on where they should."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import train_runs
from train_runs import (
    ONE_STEP,
    Ranks,
    gradient_of_one_step,
    outputs,
    read_reports,
    train_config,
    wait_until,
)

from finetune_trainer.artifacts import read_manifest
from finetune_trainer.contract import ExitCode, StageConfig

pytestmark = pytest.mark.timeout(300)  # the first test pays for the imports of a process that ranks are forked from

STEPS = 12
LONG = {"maxSteps": STEPS, "checkpointEverySteps": 3, "logEverySteps": 4}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One workspace for the whole module, so that runs are compared with the same uninterrupted one."""
    return tmp_path_factory.mktemp("space")


def config_for(space: Path, tiny_model: Path, output: str, nodes: int, **changes: Any) -> StageConfig:
    changes.setdefault("training", LONG)
    return train_config(
        space,
        tiny_model,
        nodes=nodes,
        rendezvous="here:1",
        packed=True,
        output=f"finetune/jobs/n/j/{output}",
        **changes,
    )


Uninterrupted = Callable[[int, str], str]


@pytest.fixture(scope="module")
def uninterrupted(ranks: Ranks, space: Path, tiny_model: Path) -> Uninterrupted:
    """The digest of the artifact of a run that nobody disturbs, by number of processes and strategy."""

    @cache
    def digest(nodes: int, strategy: str) -> str:
        name = f"whole-{nodes}-{strategy}"
        reports = ranks.run(config_for(space, tiny_model, name, nodes, strategy=strategy), space / name, nodes)
        assert [report.exit_code for report in reports] == [0] * nodes, outputs(space / name)
        assert len({report.artifacts["train"] for report in reports}) == 1
        return reports[0].artifacts["train"].digest

    return digest


def checkpoints_of(config: StageConfig) -> Path:
    return config.workspace_path / (config.output + ".work") / "checkpoints"


def log_of(artifact: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact / "training.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("nodes", "strategy", "kill", "expected"),
    [
        pytest.param(1, "ddp", "publish:9", 6, id="one process, just before a checkpoint has its name"),
        pytest.param(2, "ddp", "step:8", 6, id="two processes, between two checkpoints"),
        pytest.param(2, "fsdp", "step:8", 6, id="two processes with shares, between two checkpoints"),
        pytest.param(2, "fsdp", "file:9", 6, id="two processes with shares, while a checkpoint is written"),
    ],
)
def test_a_killed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    ranks: Ranks,
    space: Path,
    tiny_model: Path,
    uninterrupted: Uninterrupted,
    nodes: int,
    strategy: str,
    kill: str,
    expected: int,
) -> None:
    """tests/resume has every step, more processes and full fine-tuning: make test-resume."""
    name = f"killed-{nodes}-{strategy}-{kill.replace(':', '-')}"
    config = config_for(space, tiny_model, name, nodes, strategy=strategy)
    ranks.run_killed(config, space / name, nodes, kill)

    reports = ranks.run(replace(config, attempt=2), space / name, nodes)

    assert reports[0].exit_code == ExitCode.SUCCESS, outputs(space / name)
    assert reports[0].metrics["resumedFromStep"] == expected
    assert reports[0].artifacts["train"].digest == uninterrupted(nodes, strategy)


def test_sigterm_on_one_rank_writes_a_checkpoint_in_all_and_the_run_goes_on_exactly(
    ranks: Ranks, space: Path, tiny_model: Path, uninterrupted: Uninterrupted
) -> None:
    config = config_for(space, tiny_model, "stopped", 2)
    folder = space / "stopped"
    assert ranks.wait(ranks.start(config, folder, 2, kill="term:4")) == [ExitCode.INTERRUPTED] * 2, outputs(folder)
    interrupted = read_reports(folder)
    assert [report.reason for report in interrupted] == ["Interrupted"] * 2

    reports = ranks.run(replace(config, attempt=2), folder, 2)

    assert "the checkpoint of step 5 of 12 is written" in interrupted[0].message
    assert reports[0].metrics["resumedFromStep"] == 5
    assert reports[0].artifacts["train"].digest == uninterrupted(2, "ddp")


def test_a_rank_whose_peer_is_killed_ends_soon_and_names_it(ranks: Ranks, space: Path, tiny_model: Path) -> None:
    config = config_for(space, tiny_model, "peer", 2, training={**LONG, "maxSteps": 400})
    folder = space / "peer"
    pids = ranks.start(config, folder, 2)
    wait_until((checkpoints_of(config) / "step-00000003").exists, 60, f"no checkpoint: {outputs(folder)}")
    os.kill(pids[1], signal.SIGKILL)
    assert ranks.wait(pids) == [ExitCode.RETRYABLE, -signal.SIGKILL], outputs(folder)
    (report,) = read_reports(folder)
    assert report.reason == "PeerLost"
    assert "rank 0 of 2 lost rank 1" in report.message


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    ranks: Ranks, space: Path, tiny_model: Path, uninterrupted: Uninterrupted
) -> None:
    config = config_for(space, tiny_model, "damaged", 1)
    folder = space / "damaged"
    ranks.run_killed(config, folder, 1, "step:8")
    newest = checkpoints_of(config) / "step-00000006"
    shard = newest / "rank-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)

    (report,) = ranks.run(replace(config, attempt=2), folder)

    assert report.metrics["resumedFromStep"] == 3
    assert f"checkpoint {newest.name} is damaged and not used" in outputs(folder)
    assert report.artifacts["train"].digest == uninterrupted(1, "ddp")


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, "ddp"), (2, "fsdp")), ((2, "fsdp"), (2, "ddp"))],
    ids=["one process, then two with shares", "two with shares, then two with copies"],
)
def test_another_world_size_or_strategy_goes_on_with_the_same_batches(
    ranks: Ranks,
    space: Path,
    tiny_model: Path,
    uninterrupted: Uninterrupted,
    before: tuple[int, str],
    after: tuple[int, str],
) -> None:
    name = f"changed-{before[0]}-{before[1]}"
    first = config_for(space, tiny_model, name, before[0], strategy=before[1])
    ranks.run_killed(first, space / name, before[0], "step:8")
    second = config_for(space, tiny_model, name, after[0], strategy=after[1])

    reports = ranks.run(replace(second, attempt=2), space / name, after[0])

    assert reports[0].metrics["resumedFromStep"] == 6, outputs(space / name)
    uninterrupted(1, "ddp")
    whole = log_of(config_for(space, tiny_model, "whole-1-ddp", 1).output_path)
    for found, expected in zip(log_of(second.output_path), whole, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("nodes", "strategy", "micro_batch_size"),
    [(2, "ddp", 2), (2, "fsdp", 1)],
    ids=["two copies", "two shares, smaller micro batches"],
)
def test_the_gradient_is_the_same_however_ranks_share_a_batch(
    ranks: Ranks, space: Path, tiny_model: Path, nodes: int, strategy: str, micro_batch_size: int
) -> None:
    alone = first_gradient(ranks, space, tiny_model, 1, "ddp", 8)
    shared = first_gradient(ranks, space, tiny_model, nodes, strategy, micro_batch_size)
    assert float(np.linalg.norm(shared - alone) / np.linalg.norm(alone)) <= 1e-6


def first_gradient(
    ranks: Ranks, space: Path, tiny_model: Path, nodes: int, strategy: str, micro_batch_size: int
) -> np.ndarray:
    name = f"gradient-{nodes}-{strategy}-{micro_batch_size}"
    lora = {**train_runs.METHOD["lora"], "dropout": 0.0}  # type: ignore[dict-item]
    config = config_for(
        space,
        tiny_model,
        name,
        nodes,
        strategy=strategy,
        micro_batch_size=micro_batch_size,
        method={**train_runs.METHOD, "lora": lora},
        training=ONE_STEP,
    )
    if not config.output_path.exists():
        reports = ranks.run(config, space / name, nodes)
        assert reports[0].exit_code == ExitCode.SUCCESS, outputs(space / name)
    return gradient_of_one_step(config.output_path)


def test_a_checkpoint_of_another_job_is_refused_with_each_field_that_differs(
    ranks: Ranks, space: Path, tiny_model: Path
) -> None:
    config = config_for(space, tiny_model, "foreign", 1, training={**LONG, "maxSteps": 3})
    ranks.run(config, space / "foreign")
    lora = {**train_runs.METHOD["lora"], "alpha": 16}  # type: ignore[dict-item]
    other = config_for(
        space,
        tiny_model,
        "foreign",
        1,
        training={**LONG, "maxSteps": 3, "seed": 12},
        method={**train_runs.METHOD, "lora": lora},
    )
    (report,) = ranks.run(other, space / "foreign")
    assert (report.exit_code, report.reason) == (ExitCode.USER_ERROR, "CheckpointOfAnotherJob")
    assert "method.lora.alpha: the job has 16, the checkpoint 8" in report.message
    assert "training.seed: the job has 12, the checkpoint 11" in report.message


def test_the_newest_checkpoints_are_kept_and_the_artifact_has_the_last(
    space: Path, tiny_model: Path, uninterrupted: Uninterrupted
) -> None:
    uninterrupted(2, "ddp")
    config = config_for(space, tiny_model, "whole-2-ddp", 2)
    kept = sorted(path.name for path in checkpoints_of(config).iterdir())
    assert kept == ["step-00000009", "step-00000012"]
    manifest = read_manifest(config.output_path)
    assert [entry.path for entry in manifest.files] == [
        "adapter_config.json",
        "checkpoint/manifest.json",
        "checkpoint/rank-00000.safetensors",
        "checkpoint/rank-00001.safetensors",
        "checkpoint/state.json",
        "training.jsonl",
    ]
