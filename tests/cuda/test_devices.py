"""make test-cuda: what must hold on a GPU as it does on a CPU. Each test runs on both, on a GPU where there is one.

The CPU's runs keep the tests themselves honest on machines without a GPU; the unit tests cover it in more depth.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model as tiny_model_source
import torch
from gradients import assert_same_gradient, gradient
from train_runs import METHOD, make_rows, read_reports, train_config, wait_until, write_prepared

from finetune_trainer import contract
from finetune_trainer.backends import ModelPlan
from finetune_trainer.backends.torch import TorchBackend
from finetune_trainer.batches import PreparedRows, open_rows
from finetune_trainer.contract import ExitCode, Report, StageConfig
from finetune_trainer.errors import DeviceOutOfMemory
from finetune_trainer.training import chunk_seed

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
NO_DROPOUT: dict[str, Any] = {**METHOD, "lora": {**METHOD["lora"], "dropout": 0.0}}  # type: ignore[dict-item]
FULL = {"type": "full", "quantization": "none"}
NF4 = {**NO_DROPOUT, "quantization": "nf4"}
INT8 = {**NO_DROPOUT, "quantization": "int8"}

pytestmark = pytest.mark.timeout(600)  # workers that import torch, three times


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_source.write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_backend(device: str, tiny_model: Path) -> Iterator[Callable[..., TorchBackend]]:
    backends = []

    def make(method: dict[str, Any] = NO_DROPOUT, precision: str = "fp32", strategy: str = "ddp") -> TorchBackend:
        backend = TorchBackend(device, strategy)
        backend.start()
        backends.append(backend)
        backend.build(
            ModelPlan(folder=tiny_model, method=method, precision=precision, weight_decay=0.1, seed=3, keep_masks=False)
        )
        return backend

    yield make
    for backend in backends:
        backend.stop()


@pytest.fixture
def rows(tmp_path: Path) -> PreparedRows:
    return open_rows(write_prepared(tmp_path / "prepared", steps=8, global_batch_size=8), 8)


def train_steps(backend: TorchBackend, rows: PreparedRows, steps: int, learning_rate: float = 0.01) -> list[float]:
    """Losses of `steps` steps over the same rows."""
    losses = []
    for _ in range(steps):
        for chunk, batch in rows.micro_batches(0, 4, 0, 1):
            backend.micro_step(batch, 1.0 / rows.counts(0).supervised, chunk_seed(3, 0, chunk), last=chunk == 1)
        losses.append(backend.reduce([])[0])
        backend.update(learning_rate, 1.0)
    return losses


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", [NO_DROPOUT, FULL], ids=["lora", "full"])
def test_the_gradient_is_the_same_however_the_batch_is_split(
    make_backend: Callable[..., TorchBackend], rows: PreparedRows, strategy: str, method: dict[str, Any]
) -> None:
    backend = make_backend(method, strategy=strategy)
    whole, loss = gradient(backend, rows, 8, 1)
    for micro_batch_size, dp_size in ((1, 2), (4, 1)):
        split, split_loss = gradient(backend, rows, micro_batch_size, dp_size)
        assert_same_gradient(split, whole)
        assert split_loss == pytest.approx(loss, rel=1e-6)


def test_shares_in_bf16_have_the_gradient_of_copies(
    make_backend: Callable[..., TorchBackend], rows: PreparedRows
) -> None:
    (copies, loss), (shares, shares_loss) = (
        gradient(make_backend(FULL, "bf16", strategy), rows, 4, 1) for strategy in ("ddp", "fsdp")
    )
    assert shares.dtype == torch.float32
    assert float((shares - copies).norm() / copies.norm()) < 0.02
    assert shares_loss == pytest.approx(loss, rel=0.01)


@pytest.mark.parametrize(
    ("method", "precision", "strategy"),
    [(NO_DROPOUT, "bf16", "ddp"), (FULL, "bf16", "fsdp"), (NF4, "bf16", "ddp"), (INT8, "bf16", "ddp")],
    ids=["lora in bf16", "full in bf16 with shares", "lora on an nf4 base", "lora on an int8 base"],
)
def test_training_lowers_the_loss(
    make_backend: Callable[..., TorchBackend],
    rows: PreparedRows,
    method: dict[str, Any],
    precision: str,
    strategy: str,
) -> None:
    losses = train_steps(make_backend(method, precision, strategy), rows, 6)
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_state_that_was_written_and_read_goes_on_like_the_one_that_was_not(
    make_backend: Callable[..., TorchBackend], rows: PreparedRows, tmp_path: Path, strategy: str
) -> None:
    from finetune_trainer.checkpoint_writing import CheckpointWriter
    from finetune_trainer.checkpoints import checkpoint_folder, read_checkpoint

    backend = make_backend(FULL, strategy=strategy)
    train_steps(backend, rows, 2)
    writer = CheckpointWriter(backend, tmp_path, keep=1)
    names = {name: {"shape": list(facts.shape), "dtype": facts.dtype} for name, facts in backend.parameters().items()}
    writer.start(2, {"version": 1, "step": 2, "worldSize": 1, "parameters": names})
    expected = train_steps(backend, rows, 3)  # while it is written
    writer.wait()
    again = make_backend(FULL, strategy=strategy)
    again.load(read_checkpoint(checkpoint_folder(tmp_path, 2)))
    assert train_steps(again, rows, 3) == pytest.approx(expected, rel=1e-6)


@pytest.mark.cuda
def test_a_batch_that_does_not_fit_says_so_with_a_remedy(tiny_model: Path) -> None:
    arrays = make_rows(4096, packed=False, length=256)
    order = np.arange(4096, dtype=np.int32)
    rows = PreparedRows(**arrays, order=order, max_steps=1, global_batch_size=4096)
    backend = TorchBackend("cuda")
    backend.start()
    backend.build(ModelPlan(tiny_model, FULL, "fp32", weight_decay=0.0, seed=3, keep_masks=False))
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        with pytest.raises(DeviceOutOfMemory, match="lower training.microBatchSize"):
            backend.micro_step(rows.batch(order), 1.0, 3, last=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def run_worker(config: StageConfig, folder: Path, device: str, *, kill_at: str = "") -> Report | None:
    """One rank as a process of its own; killed by SIGKILL once a checkpoint `kill_at` is there. Its report, if any."""
    folder.mkdir(parents=True, exist_ok=True)
    for report in folder.glob("report-*"):
        report.unlink()
    (folder / "stage.json").write_bytes(contract.canonical_json(config.as_json()))
    command = [sys.executable, "-m", "finetune_trainer.stages.train_worker", "--config", str(folder / "stage.json")]
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **hidden}
    with (folder / "output").open("ab") as output:
        worker = subprocess.Popen([*command, "--scratch", str(folder)], env=environment, stdout=output, stderr=output)
    try:
        if kill_at:
            root = config.workspace_path / (config.output + ".work") / "checkpoints"
            wait_until((root / kill_at).exists, 200, f"{kill_at} was not written: {(folder / 'output').read_text()}")
            worker.send_signal(signal.SIGKILL)
        worker.wait(timeout=250)
    finally:
        worker.kill()
        worker.wait()
    return next(iter(read_reports(folder)), None)


def test_a_killed_run_goes_on_from_its_checkpoint(device: str, tiny_model: Path, tmp_path: Path) -> None:
    """Bit for bit on the CPU; a GPU's kernels may order their sums differently from run to run."""
    training = {"maxSteps": 60, "checkpointEverySteps": 10, "logEverySteps": 10}
    whole = train_config(tmp_path, tiny_model, output="finetune/jobs/n/j/whole", training=training)
    killed = train_config(tmp_path, tiny_model, output="finetune/jobs/n/j/killed", training=training)
    first = run_worker(whole, tmp_path / "whole", device)
    assert first is not None
    assert first.exit_code == ExitCode.SUCCESS, first.message
    run_worker(killed, tmp_path / "killed", device, kill_at="step-00000010")
    second = run_worker(replace(killed, attempt=2), tmp_path / "killed", device)
    assert second is not None
    assert second.metrics["resumedFromStep"] >= 10, second.message
    assert second.metrics["loss"] == pytest.approx(first.metrics["loss"], rel=1e-4)
    if device == "cpu":
        assert second.artifacts == {"train": replace(first.artifacts["train"], path=killed.output)}
