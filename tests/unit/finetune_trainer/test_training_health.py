"""What ends a training: a loss that is no number, a peer that hangs, memory that runs out, a volume that is full."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from train_runs import Ranks, outputs, read_reports, train_config, wait_until, write_model

from finetune_trainer import contract, stage
from finetune_trainer.artifacts import artifact_ref
from finetune_trainer.backends.torch import TorchBackend
from finetune_trainer.backends.torch_ranks import collective_timeout
from finetune_trainer.batches import PreparedRows, open_rows
from finetune_trainer.checkpoints import find_last_checkpoint
from finetune_trainer.contract import COLLECTIVE_TIMEOUT_ENV, ExitCode, StageConfig
from finetune_trainer.errors import DeviceOutOfMemory, HostOutOfMemory, UserError
from finetune_trainer.throughput import Speed
from finetune_trainer.training_log import TrainingLog

pytestmark = pytest.mark.timeout(300)  # the first test may pay for the imports of a process that ranks are forked from


def checkpoints_of(config: StageConfig) -> Path:
    return config.workspace_path / (config.output + ".work") / "checkpoints"


def with_broken_token(config: StageConfig, tiny_model: Path, token: int, scratch: Path) -> StageConfig:
    """`config` on a base model whose embedding of `token` is no number, as a damaged conversion leaves it."""
    folder = scratch / "broken"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = write_model(config.workspace_path / contract.MODELS_FOLDER / "broken", folder)
    ref = artifact_ref(config.workspace_path, model)
    return replace(config, inputs={**config.inputs, contract.MODEL_INPUT: ref})


def find_new_token(rows: PreparedRows) -> tuple[int, int]:
    """(step, token): the first of a row of the second rank's, in no row of the steps before and of the first rank."""
    for step in range(1, rows.max_steps):
        first, second = np.split(rows.rows_of(step), 2)
        before = {*np.unique(rows.input_ids[rows.order[: step * rows.global_batch_size]])}
        before |= {*np.unique(rows.input_ids[first])}
        for token in rows.input_ids[second, 0]:
            if token not in before:
                return step, int(token)
    raise AssertionError("every row is in the first steps: take another seed")


def test_a_loss_that_is_no_number_in_one_rank_stops_all_and_names_the_rows(
    ranks: Ranks, workspace: Path, tiny_model: Path, tmp_path: Path
) -> None:
    training = {"maxSteps": 8, "checkpointEverySteps": 1, "keepCheckpoints": 2, "logEverySteps": 1}
    config = train_config(workspace, tiny_model, nodes=2, global_batch_size=4, training=training, rendezvous="here:1")
    rows = open_rows(config.input_path(contract.PREPARE), 4)
    step, token = find_new_token(rows)
    config = with_broken_token(config, tiny_model, token, tmp_path)

    codes = ranks.wait(ranks.start(config, workspace / "run", 2))

    reports = read_reports(workspace / "run")
    assert codes == [ExitCode.USER_ERROR] * 2, outputs(workspace / "run")
    assert [report.reason for report in reports] == ["LossNotFinite"] * 2
    assert reports[0].message == reports[1].message
    assert f"step {step + 1} of 8: loss nan" in reports[0].message
    assert f"the rows of that step, {', '.join(map(str, rows.rows_of(step)))} of prepare's" in reports[0].message
    found, damaged = find_last_checkpoint(checkpoints_of(config))
    assert found is not None
    assert (found.step, damaged) == (step, [])


def test_a_peer_that_hangs_is_named_with_the_collective(ranks: Ranks, workspace: Path, tiny_model: Path) -> None:
    training = {"maxSteps": 3000, "checkpointEverySteps": 2, "logEverySteps": 1}
    config = train_config(workspace, tiny_model, nodes=2, training=training, rendezvous="here:1")
    folder = workspace / "run"
    pids = ranks.start(config, folder, 2, environment={COLLECTIVE_TIMEOUT_ENV: "3"})
    wait_until((checkpoints_of(config) / "step-00000002").exists, 120, f"no checkpoint: {outputs(folder)}")
    os.kill(pids[1], signal.SIGSTOP)
    try:
        assert ranks.wait(pids[:1]) == [ExitCode.RETRYABLE], outputs(folder)
    finally:
        os.kill(pids[1], signal.SIGKILL)
    ranks.wait(pids[1:])
    (report,) = read_reports(folder)
    assert report.reason == "CollectiveTimeout", report.message
    assert "rank 0 of 2 has waited 3 s in the reduction of the gradients: rank 1 (" in report.message
    assert "did not arrive" in report.message
    assert find_last_checkpoint(checkpoints_of(config))[1] == []


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_a_timeout_that_is_no_time_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COLLECTIVE_TIMEOUT_ENV, text)
    with pytest.raises(UserError, match=f"{COLLECTIVE_TIMEOUT_ENV} is '{text}': give a positive number of seconds"):
        collective_timeout()


def test_host_memory_that_runs_out_says_which_limit_to_raise() -> None:
    with (
        pytest.raises(
            HostOutOfMemory, match=r"during a micro step: raise stages.train.resources.limits.memory"
        ) as caught,
        TorchBackend("cpu")._guard("a micro step"),
    ):
        torch.empty(1 << 50)
    assert caught.value.exit_code == ExitCode.OUT_OF_HOST_MEMORY
    with pytest.raises(HostOutOfMemory, match="during a micro step"), TorchBackend("cpu")._guard("a micro step"):
        np.empty(1 << 50)


def test_device_memory_that_runs_out_says_which_fields_to_change() -> None:
    """torch's own error as CUDA raises it; where there is a GPU make test-cuda has a real one."""
    words = "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"
    with (
        pytest.raises(
            DeviceOutOfMemory,
            match=r"^OutOfDeviceMemory: CUDA out of memory.*GiB. during a micro step: lower training.microBatchSize",
        ) as caught,
        TorchBackend("cpu")._guard("a micro step"),
    ):
        raise torch.OutOfMemoryError(words)
    assert caught.value.exit_code == ExitCode.OUT_OF_DEVICE_MEMORY
    assert "gradientCheckpointing" in caught.value.message


def test_a_volume_that_is_full_is_said_so_with_what_to_remove(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 0, 1)
    log.close()
    full = Path("/dev/full").open("ab")  # noqa: SIM115 - its buffer cannot be written, so closing it is an error too
    log._lines = full
    with pytest.raises(OSError) as caught:
        log.write({"step": 1, "loss": 1.0}, Speed(1.0, 1.0, 1.0, 0.0, None, None, None))
    with pytest.raises(OSError):
        full.close()
    report = stage.failure_report("train", caught.value)
    assert (report.exit_code, report.reason) == (ExitCode.RETRYABLE, "VolumeFull")
    assert "enlarge the volume" in report.message
