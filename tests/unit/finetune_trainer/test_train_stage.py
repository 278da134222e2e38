"""train as a program: arguments, the report of a pod from those of its ranks, and whole runs through the launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from train_runs import METHOD, free_port, train_config, wait_until

from finetune_trainer import contract
from finetune_trainer.artifacts import verify_artifact
from finetune_trainer.checkpoints import read_checkpoint
from finetune_trainer.contract import ArtifactRef, ContractError, ExitCode, Report, StageConfig
from finetune_trainer.stages.train import Launch, pod_report
from finetune_trainer.stages.train_args import parse_args


@pytest.fixture
def config(workspace: Path, tiny_model: Path) -> StageConfig:
    return train_config(workspace, tiny_model)


def changed(config: StageConfig, where: str, name: str, value: Any) -> StageConfig:
    """`config` with one field of spec.training or parallelism replaced."""
    if where == "parallelism":
        return replace(config, parallelism={**config.parallelism, name: value})
    return replace(config, spec={**config.spec, where: {**config.spec[where], name: value}})


def test_arguments_are_read_and_the_identity_leaves_out_what_does_not_change_the_result(config: StageConfig) -> None:
    args = parse_args(config)
    assert (args.world_size, args.global_batch_size, args.micro_batch_size) == (1, 8, 2)
    assert args.identity["method"] == METHOD
    assert args.identity["data"] == config.inputs["prepare"].digest
    assert "seed" in args.identity["training"]
    assert "checkpointEverySteps" not in args.identity["training"]
    other = changed(changed(config, "parallelism", "strategy", "fsdp"), "training", "gradientCheckpointing", True)
    assert (parse_args(other).strategy, parse_args(other).gradient_checkpointing) == ("fsdp", True)
    assert parse_args(other).identity == args.identity


@pytest.mark.parametrize(
    ("where", "name", "value", "words"),
    [
        ("training", "learningRate", -1, "spec.training.learningRate must be a number of at least 0, got -1"),
        ("training", "precision", "fp8", "spec.training.precision must be one of fp32, bf16, got 'fp8'"),
        ("training", "checkpointEverySteps", 0, "checkpointEverySteps must be a whole number of at least 1, got 0"),
        ("training", "seed", True, "spec.training.seed must be a whole number of at least 0, got True"),
        (
            "parallelism",
            "globalBatchSize",
            9,
            "globalBatchSize 9 must be microBatchSize 2 x gradientAccumulationSteps 4",
        ),
        ("parallelism", "dataParallelSize", 2, "dataParallelSize 2 must be numNodes 1 x procsPerNode 1"),
        ("parallelism", "tensorParallelSize", 2, "tensorParallelSize is 2: on CPU and CUDA this trainer has data par"),
        ("parallelism", "strategy", "zero", "parallelism.strategy must be one of ddp, fsdp, got 'zero'"),
        ("training", "gradientCheckpointing", 1, "spec.training.gradientCheckpointing must be true or false, got 1"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_wrong_argument_is_named_with_its_value(
    config: StageConfig, where: str, name: str, value: Any, words: str
) -> None:
    with pytest.raises(ContractError, match=words):
        parse_args(changed(config, where, name, value))


SUCCESS = Report("train", ExitCode.SUCCESS, artifacts={"train": ArtifactRef("out", "sha256:" + "0" * 64)})


def failure(code: ExitCode, reason: str) -> Report:
    return Report("train", code, reason=reason, message="m")


@pytest.mark.parametrize(
    ("reports", "silent", "facts", "expected"),
    [
        ({0: SUCCESS, 1: SUCCESS}, [], {}, (ExitCode.SUCCESS, "")),
        ({0: SUCCESS, 1: SUCCESS}, [], {"exit_code": 1}, (ExitCode.SUCCESS, "")),
        (
            {0: failure(ExitCode.RETRYABLE, "PeerLost"), 1: failure(ExitCode.USER_ERROR, "LossNotFinite")},
            [],
            {"exit_code": 1},
            (ExitCode.USER_ERROR, "LossNotFinite"),
        ),
        ({0: failure(ExitCode.RETRYABLE, "PeerLost")}, [1], {"exit_code": 1}, (ExitCode.RETRYABLE, "WorkerDied")),
        (
            {0: failure(ExitCode.RETRYABLE, "PeerLost")},
            [1],
            {"exit_code": 1, "out_of_memory": True},
            (ExitCode.OUT_OF_HOST_MEMORY, "OutOfHostMemory"),
        ),
        ({}, [], {"exit_code": 1, "rendezvous": "h:1"}, (ExitCode.RETRYABLE, "RendezvousFailed")),
        ({}, [0], {"exit_code": -15, "terminated": True}, (ExitCode.INTERRUPTED, "Interrupted")),
        (
            {0: failure(ExitCode.INTERRUPTED, "Interrupted"), 1: failure(ExitCode.RETRYABLE, "PeerLost")},
            [],
            {"exit_code": 1, "terminated": True},
            (ExitCode.INTERRUPTED, "Interrupted"),
        ),
    ],
    ids=[
        "all ranks succeeded",
        "all ranks succeeded and torchrun stumbled at the end",
        "the cause wins over what it caused",
        "a rank that was killed wins over one that lost it",
        "killed for memory",
        "the pods never met",
        "stopped before the first step",
        "stopped with a checkpoint",
    ],
)
def test_the_report_of_a_pod_follows_from_those_of_its_ranks(
    reports: dict[int, Report], silent: list[int], facts: dict[str, Any], expected: tuple[ExitCode, str]
) -> None:
    defaults = {"exit_code": 0, "out_of_memory": False, "terminated": False, "rendezvous": ""}
    report = pod_report(reports, silent=silent, expected=2, **{**defaults, **facts})
    assert (report.exit_code, report.reason) == expected


def test_several_ranks_meet_under_a_name_of_this_attempt_at_the_host_of_node_0(
    workspace: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = train_config(workspace, tiny_model, nodes=2, rendezvous="j-train-0.j-train.n:29400")

    def options(config: StageConfig, node: int) -> dict[str, str]:
        words = Launch(config, parse_args(config), node, tmp_path).command()[3:]
        return dict(zip(words[::2], words[1::2], strict=True))

    first, again = options(config, 1), options(replace(config, attempt=2), 0)
    assert (first["--nodes"], first["--node-rank"], again["--node-rank"]) == ("2", "1", "0")
    assert first["--endpoint"] == again["--endpoint"] == "j-train-0.j-train.n:29400"
    assert first["--run-id"] != again["--run-id"]


def test_a_single_rank_needs_no_agent(config: StageConfig, tmp_path: Path) -> None:
    command = Launch(config, parse_args(config), 0, tmp_path).command()
    assert command[1:3] == ["-m", "finetune_trainer.stages.train_worker"]


def test_two_nodes_without_a_place_to_meet_are_refused(workspace: Path, tiny_model: Path) -> None:
    from finetune_trainer.stages.train import run

    with pytest.raises(ContractError, match="rendezvous is empty and numNodes is 2"):
        run(train_config(workspace, tiny_model, nodes=2))


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start the program in a pod's surroundings: no home, a node rank, a file for the termination message."""

    def start(config: StageConfig, node: int = 0) -> subprocess.Popen[bytes]:
        stage_json = tmp_path / f"stage-{node}.json"
        stage_json.write_bytes(contract.canonical_json(config.as_json()))
        scratch = tmp_path / f"tmp-{node}"
        scratch.mkdir(exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "OMP_NUM_THREADS")}
        environment = {
            **kept,
            "TMPDIR": str(scratch),
            "JOB_COMPLETION_INDEX": str(node),
            "FINETUNE_TERMINATION_PATH": str(tmp_path / f"report-{node}"),
        }
        command = [sys.executable, "-m", "finetune_trainer", "train", "--config", str(stage_json)]
        with (tmp_path / f"output-{node}").open("wb") as output:
            return subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    return start


def report_of(tmp_path: Path, node: int = 0) -> Report:
    return contract.parse_report((tmp_path / f"report-{node}").read_bytes())


@pytest.mark.timeout(300)  # two launchers, two torchruns and two workers import torch
def test_two_pods_train_together_and_report_the_same_artifact(
    workspace: Path, tiny_model: Path, tmp_path: Path, start: Start
) -> None:
    config = train_config(workspace, tiny_model, nodes=2, rendezvous=f"127.0.0.1:{free_port()}", packed=True)
    processes = [start(config, node) for node in (1, 0)]
    codes = [process.wait(timeout=250) for process in processes]
    said = "".join((tmp_path / f"output-{node}").read_text() for node in (0, 1))
    assert codes == [0, 0], said
    first, second = report_of(tmp_path, 0), report_of(tmp_path, 1)
    assert first.artifacts == second.artifacts
    assert first.metrics["step"] == first.metrics["totalSteps"] == 8
    # rank * (inputs + outputs) of q (32 to 32) and v (32 to 16) in two layers
    assert first.metrics["trainableParameters"] == 2 * 4 * ((32 + 32) + (32 + 16))
    assert "packed documents do not see each other" in said
    verify_artifact(config.output_path, first.artifacts["train"].digest)
    assert read_checkpoint(config.output_path / "checkpoint").world_size == 2
    assert LoraConfig.from_pretrained(str(config.output_path)).base_model_name_or_path == "example/tiny"
    assert list((tmp_path / "tmp-0").glob("train-*")) == []


@pytest.mark.timeout(300)
def test_sigterm_to_the_pod_ends_in_a_checkpoint_and_says_so(
    workspace: Path, tiny_model: Path, tmp_path: Path, start: Start
) -> None:
    config = train_config(
        workspace, tiny_model, training={"maxSteps": 3000, "checkpointEverySteps": 2000, "logEverySteps": 1}
    )
    process = start(config)
    output = tmp_path / "output-0"
    wait_until(lambda: b"step 2/3000" in output.read_bytes(), 120, "no step was logged")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == ExitCode.INTERRUPTED, output.read_text()
    report = report_of(tmp_path)
    assert report.reason == "Interrupted"
    (saved,) = (workspace / (config.output + ".work") / "checkpoints").glob("step-*")
    assert f"the checkpoint of step {int(saved.name[-8:])} of 3000 is written" in report.message
    assert json.loads((saved / "state.json").read_bytes())["rowsConsumed"] == 8 * int(saved.name[-8:])


@pytest.mark.timeout(300)
def test_a_damaged_base_model_is_found_before_the_first_step(
    workspace: Path, tiny_model: Path, tmp_path: Path, start: Start
) -> None:
    config = train_config(workspace, tiny_model)
    weights = config.input_path("model") / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert start(config).wait(timeout=200) == ExitCode.CORRUPT_ARTIFACT, (tmp_path / "output-0").read_text()
    assert "model.safetensors has sha256" in report_of(tmp_path).message
