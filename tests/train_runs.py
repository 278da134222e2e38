"""Inputs and stage.json for runs of train, and the processes that run them: what its tests share.

The rows are made here, seeded and ragged, in the form that prepare writes; the base model is tests/tiny_model.py's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from finetune_trainer import contract
from finetune_trainer.artifacts import artifact_ref, new_artifact
from finetune_trainer.checkpoints import FIRST_MOMENT, read_checkpoint
from finetune_trainer.contract import ExitCode, Report, StageConfig

ROW_LENGTH = 24
VOCABULARY = 300
METHOD = {
    "type": "lora",
    "quantization": "none",
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "targetModules": ["q_proj", "v_proj"], "variant": "standard"},
}
TRAINING = {
    "maxSteps": 8,
    "learningRate": 0.01,
    "learningRateSchedule": "cosine",
    "warmupSteps": 2,
    "weightDecay": 0.1,
    "maxGradNorm": 1.0,
    "precision": "fp32",
    "seed": 11,
    "checkpointEverySteps": 2,
    "keepCheckpoints": 2,
    "logEverySteps": 3,
}


def make_rows(rows: int, *, packed: bool, seed: int = 5, length: int = ROW_LENGTH) -> dict[str, np.ndarray]:
    """Rows of random tokens: one document a row, or two, with ragged numbers of supervised tokens and padding."""
    random = np.random.default_rng(seed)
    names = ("input_ids", "labels", "position_ids", "segment_ids")
    arrays = {name: np.zeros((rows, length), dtype=np.int32) for name in names}
    arrays["labels"][:] = -100
    for row in range(rows):
        start = 0
        for document in (1, 2) if packed else (1,):
            size = int(random.integers(length // 4, length // 2 if packed else length))
            tokens = random.integers(3, VOCABULARY, size)
            prompt = int(random.integers(1, size - 1))
            place = slice(start, start + size)
            arrays["input_ids"][row, place] = tokens
            arrays["labels"][row, start + prompt : start + size] = tokens[prompt:]
            arrays["position_ids"][row, place] = np.arange(size)
            arrays["segment_ids"][row, place] = document
            start += size
    return arrays


def write_prepared(path: Path, *, steps: int, global_batch_size: int, packed: bool = False, seed: int = 5) -> Path:
    """A prepare artifact with 2 * global_batch_size rows, read in one seeded order, and 3 held-out ones."""
    rows, held_out = (
        make_rows(2 * global_batch_size, packed=packed, seed=seed),
        make_rows(3, packed=packed, seed=seed + 1),
    )
    order = np.random.default_rng(seed).integers(0, len(rows["input_ids"]), steps * global_batch_size)
    with new_artifact(path, "prepare") as writer:
        save_file(rows, writer.folder / "rows.safetensors")
        save_file(held_out, writer.folder / "validation.safetensors")
        save_file({"order": order.astype(np.int32)}, writer.folder / "order.safetensors")
        (writer.folder / "data.json").write_text(json.dumps({"maxSteps": steps, "rowLength": ROW_LENGTH}))
    return path


def write_model(path: Path, tiny_model: Path) -> Path:
    """The tiny model as a shared artifact."""
    with new_artifact(path, "model") as writer:
        shutil.copytree(tiny_model, writer.folder, dirs_exist_ok=True)
        writer.metadata["source"] = "hf://example/tiny"
    return path


def train_config(
    workspace: Path,
    tiny_model: Path,
    *,
    nodes: int = 1,
    output: str = "finetune/jobs/n/j/train-0123",
    micro_batch_size: int = 2,
    global_batch_size: int = 8,
    packed: bool = False,
    rendezvous: str = "",
    strategy: str = "ddp",
    training: Mapping[str, Any] | None = None,
    method: Mapping[str, Any] | None = None,
) -> StageConfig:
    """stage.json of a train run whose inputs are made under `workspace` where they are missing."""
    settings = {**TRAINING, **(training or {})}
    steps = settings["maxSteps"]
    model = workspace / contract.MODELS_FOLDER / "tiny"
    prepared = workspace / f"finetune/jobs/n/j/prepare-{steps}-{global_batch_size}-{int(packed)}"
    if not model.exists():
        write_model(model, tiny_model)
    if not prepared.exists():
        write_prepared(prepared, steps=steps, global_batch_size=global_batch_size, packed=packed)
    return StageConfig(
        stage=contract.TRAIN,
        image="trainer:test",
        spec={"method": method or METHOD, "training": settings},
        output=output,
        inputs={
            contract.MODEL_INPUT: artifact_ref(workspace, model),
            contract.PREPARE: artifact_ref(workspace, prepared),
        },
        parallelism={
            "numNodes": nodes,
            "procsPerNode": 1,
            "worldSize": nodes,
            "tensorParallelSize": 1,
            "pipelineParallelSize": 1,
            "dataParallelSize": nodes,
            "microBatchSize": micro_batch_size,
            "gradientAccumulationSteps": global_batch_size // (micro_batch_size * nodes),
            "globalBatchSize": global_batch_size,
            "strategy": strategy,
        },
        job={"namespace": "n", "name": "j", "uid": "0f0e"},
        workspace=str(workspace),
        rendezvous=rendezvous,
    )


ONE_STEP = {**TRAINING, "maxSteps": 1, "maxGradNorm": 0}
"""A run of one step without clipping: gradient_of_one_step reads its gradient."""


def gradient_of_one_step(artifact: Path) -> np.ndarray:
    """The gradient of a run with ONE_STEP, all parameters in turn: its checkpoint has a tenth of it as first moment."""
    checkpoint = read_checkpoint(artifact / "checkpoint")
    moments = [
        checkpoint.read_rows(FIRST_MOMENT, name, 0, stored.shape[0]) for name, stored in checkpoint.parameters().items()
    ]
    return 10 * np.frombuffer(b"".join(moments), dtype=np.float32)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Ranks:
    """Starts ranks of train as processes of their own, forked from one that has imported everything.

    A rank is `python -m finetune_trainer.stages.train_worker` in all but the seconds of its imports: its own process
    id, signals, memory and sockets.
    """

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
        command = [sys.executable, str(Path(__file__).with_name("train_rank_server.py"))]
        self._server = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def start(
        self,
        config: StageConfig,
        folder: Path,
        world_size: int = 1,
        *,
        kill: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> list[int]:
        """Start every rank; their process ids. Reports and output go to `folder`, `environment` is on top of ours.

        `kill` is where each rank kills itself with SIGKILL, as train_rank_server.py describes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for report in folder.glob("report-*"):
            report.unlink()
        stage_json = folder / "stage.json"
        stage_json.write_bytes(contract.canonical_json(config.as_json()))
        port = free_port()
        return [
            self._ask(
                environment={
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    **(environment or {}),
                },
                arguments=["--config", str(stage_json), "--scratch", str(folder)],
                output=str(folder / f"output-{rank}"),
                kill=kill,
            )
            for rank in range(world_size)
        ]

    def wait(self, pids: list[int]) -> list[int]:
        """Exit codes, negative for signals."""
        return [self._ask(wait=pid) for pid in pids]

    def run(self, config: StageConfig, folder: Path, world_size: int = 1) -> list[Report]:
        """Start every rank and wait; their reports by rank."""
        codes = self.wait(self.start(config, folder, world_size))
        reports = read_reports(folder)
        assert [report.exit_code for report in reports] == codes, outputs(folder)
        return reports

    def run_killed(self, config: StageConfig, folder: Path, world_size: int, kill: str) -> None:
        """Start every rank and wait for the kill; one that is a moment late ends because it has lost the others."""
        codes = self.wait(self.start(config, folder, world_size, kill=kill))
        assert -signal.SIGKILL in codes, outputs(folder)
        assert set(codes) <= {-signal.SIGKILL, ExitCode.RETRYABLE}, outputs(folder)

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(timeout=30)
        self._server.stdout.close()

    def _ask(self, **request: Any) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        return int(self._server.stdout.readline())


def read_reports(folder: Path) -> list[Report]:
    return [contract.parse_report(path.read_bytes()) for path in sorted(folder.glob("report-*.json"))]


def outputs(folder: Path) -> str:
    """What the ranks printed, for a failing test's message."""
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(folder.glob("output-*")))


def wait_until(condition: Callable[[], bool], seconds: float, reason: str) -> None:
    """Wait for `condition` with a deadline; TimeoutError says `reason`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {reason}")
        time.sleep(0.002)
