"""Runs of train in real processes that are killed, stopped, or find damage, and go on where they should."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import train_runs
from train_runs import Ranks, outputs, read_reports, train_config, wait_until

from finetune_trainer.artifacts import read_manifest
from finetune_trainer.contract import ExitCode, StageConfig

pytestmark = pytest.mark.timeout(300)  # the first test pays for the imports of a process that ranks are forked from

STEPS = 24
LONG = {"maxSteps": STEPS, "checkpointEverySteps": 3, "logEverySteps": 4}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    server = Ranks()
    yield server
    server.close()


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


@pytest.fixture(scope="module")
def uninterrupted(ranks: Ranks, space: Path, tiny_model: Path) -> dict[int, str]:
    """The artifact's digest of a run that nobody disturbs, by number of processes."""
    digests = {}
    for nodes in (1, 2):
        reports = ranks.run(config_for(space, tiny_model, f"whole-{nodes}", nodes), space / f"whole-{nodes}", nodes)
        assert [report.exit_code for report in reports] == [0] * nodes
        assert len({report.artifacts["train"] for report in reports}) == 1
        digests[nodes] = reports[0].artifacts["train"].digest
    return digests


def checkpoints_of(config: StageConfig) -> Path:
    return config.workspace_path / (config.output + ".work") / "checkpoints"


def log_of(artifact: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact / "training.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("nodes", [1, 2], ids=["one process", "two processes"])
@pytest.mark.parametrize(
    "moment",
    ["step-00000006", ".step-00000009.tmp-*"],
    ids=["after a checkpoint", "while a checkpoint is written"],
)
def test_a_killed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    ranks: Ranks, space: Path, tiny_model: Path, uninterrupted: dict[int, str], nodes: int, moment: str
) -> None:
    name = f"killed-{nodes}-{moment.strip('.*')}"
    config = config_for(space, tiny_model, name, nodes)
    folder = space / name
    pids = ranks.start(config, folder, nodes)
    root = checkpoints_of(config)
    later = root / "step-00000009"
    wait_until(lambda: any(root.glob(moment)) or later.exists(), 60, f"{moment} was not seen: {outputs(folder)}")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert ranks.wait(pids) == [-signal.SIGKILL] * nodes

    reports = ranks.run(replace(config, attempt=2), folder, nodes)

    assert reports[0].exit_code == ExitCode.SUCCESS, outputs(folder)
    assert reports[0].metrics["resumedFromStep"] in (6, 9)
    assert reports[0].artifacts["train"].digest == uninterrupted[nodes]


def test_sigterm_on_one_rank_writes_a_checkpoint_in_all_and_the_run_goes_on_exactly(
    ranks: Ranks, space: Path, tiny_model: Path, uninterrupted: dict[int, str]
) -> None:
    config = config_for(space, tiny_model, "stopped", 2)
    folder = space / "stopped"
    pids = ranks.start(config, folder, 2)
    wait_until((checkpoints_of(config) / "step-00000003").exists, 60, f"no checkpoint: {outputs(folder)}")
    os.kill(pids[1], signal.SIGTERM)
    assert ranks.wait(pids) == [ExitCode.INTERRUPTED] * 2, outputs(folder)
    interrupted = read_reports(folder)
    assert [report.reason for report in interrupted] == ["Interrupted"] * 2

    reports = ranks.run(replace(config, attempt=2), folder, 2)

    assert f"checkpoint of step {reports[0].metrics['resumedFromStep']} " in interrupted[0].message
    assert reports[0].artifacts["train"].digest == uninterrupted[2]


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
    ranks: Ranks, space: Path, tiny_model: Path, uninterrupted: dict[int, str]
) -> None:
    config = config_for(space, tiny_model, "damaged", 1)
    folder = space / "damaged"
    pids = ranks.start(config, folder)
    wait_until((checkpoints_of(config) / "step-00000006").exists, 60, f"no checkpoint: {outputs(folder)}")
    os.kill(pids[0], signal.SIGKILL)
    ranks.wait(pids)
    newest = max(checkpoints_of(config).glob("step-*"))
    shard = newest / "rank-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)

    (report,) = ranks.run(replace(config, attempt=2), folder)

    assert report.metrics["resumedFromStep"] == int(newest.name[-8:]) - 3
    assert f"checkpoint {newest.name} is damaged and not used" in outputs(folder)
    assert report.artifacts["train"].digest == uninterrupted[1]


def test_another_world_size_goes_on_with_the_same_batches(
    ranks: Ranks, space: Path, tiny_model: Path, uninterrupted: dict[int, str]
) -> None:
    config = config_for(space, tiny_model, "grown", 1)
    folder = space / "grown"
    pids = ranks.start(config, folder)
    wait_until((checkpoints_of(config) / "step-00000006").exists, 60, f"no checkpoint: {outputs(folder)}")
    os.kill(pids[0], signal.SIGKILL)
    ranks.wait(pids)
    grown = config_for(space, tiny_model, "grown", 2)

    reports = ranks.run(replace(grown, attempt=2), folder, 2)

    assert reports[0].metrics["resumedFromStep"] >= 6
    whole = log_of(space / "finetune/jobs/n/j/whole-1")
    assert [line["step"] for line in log_of(grown.output_path)] == [line["step"] for line in whole]
    for found, expected in zip(log_of(grown.output_path), whole, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)


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
    space: Path, tiny_model: Path, uninterrupted: dict[int, str]
) -> None:
    config = config_for(space, tiny_model, "whole-2", 2)
    kept = sorted(path.name for path in checkpoints_of(config).iterdir())
    assert kept == ["step-00000021", "step-00000024"]
    manifest = read_manifest(config.output_path)
    assert [entry.path for entry in manifest.files] == [
        "adapter_config.json",
        "checkpoint/manifest.json",
        "checkpoint/rank-00000.safetensors",
        "checkpoint/rank-00001.safetensors",
        "checkpoint/state.json",
        "training.jsonl",
    ]
