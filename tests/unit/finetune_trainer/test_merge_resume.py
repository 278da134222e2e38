"""A merge that is killed or stopped: what the next attempt takes, what it does again, and that nobody can tell."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file, save_file

from finetune_trainer.artifacts import read_manifest
from finetune_trainer.contract import ExitCode, StageConfig
from finetune_trainer.stage import main as run_stage
from finetune_trainer.stages import merge as merge_stage

KILLED_MERGE = """
import os, signal, sys
from finetune_trainer import __main__, merging, shard_rewriting
from finetune_trainer.stages import merge
which, name, offset, shard_bytes, config = sys.argv[1:]
merge.DEFAULT_SHARD_BYTES = int(shard_bytes)
shard_rewriting.BLOCK_BYTES = merging.BLOCK_BYTES = 1024
write = shard_rewriting._OutputFile.write
def write_or_end(self, view, at):
    write(self, view, at)
    if self.path.name == name and at >= int(offset):
        os.kill(os.getpid(), signal.Signals[which])
shard_rewriting._OutputFile.write = write_or_end
sys.argv = ["finetune-trainer", "merge", "--config", config]
__main__.main()
"""
"""The stage's own program, which ends itself by a signal once a shard has been written up to an offset."""


@pytest.fixture
def config(
    workspace: Path, tmp_path: Path, tiny_model_module: ModuleType, adapter_artifacts: ModuleType
) -> StageConfig:
    base = tiny_model_module.write_tiny_model(tmp_path / "base", sharded=True)
    model = adapter_artifacts.copy_artifact(base, workspace / "model", "model")
    adapter = adapter_artifacts.random_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    consolidated = adapter_artifacts.copy_artifact(adapter, workspace / "consolidated", "consolidate")
    made: StageConfig = adapter_artifacts.stage_config(
        workspace, "merge", {}, [model, consolidated], ["model", "consolidate"]
    )
    return made


def write_config(config: StageConfig, path: Path) -> str:
    path.write_text(json.dumps(config.as_json()))
    return str(path)


def end_in_the_middle(
    config: StageConfig, tmp_path: Path, which: str, shard: str, offset: int, shard_bytes: int = 10**9
) -> int:
    """Run the stage until `shard` is written up to `offset`; returns the exit code. It must end within 20 seconds."""
    numbers = [str(offset), str(shard_bytes)]
    command = [sys.executable, "-c", KILLED_MERGE, which, shard, *numbers, write_config(config, tmp_path / "c.json")]
    environment = {"FINETUNE_TERMINATION_PATH": str(tmp_path / "report"), "PATH": ""}
    return subprocess.run(command, env=environment, capture_output=True, timeout=20, check=False).returncode


def uninterrupted(config: StageConfig, tmp_path: Path) -> str:
    """The digest of the same merge, done in one go."""
    other = replace(config, output="out/other")
    assert run_stage(["merge", "--config", write_config(other, tmp_path / "other.json")]) == ExitCode.SUCCESS
    return read_manifest(other.output_path).digest


@pytest.mark.parametrize(
    ("size", "shard", "offset", "kept"),
    [
        pytest.param(10**9, "model-00002-of-00003.safetensors", 9000, 1, id="the base's shards, in the second"),
        pytest.param(60_000, "model-00003-of-00003.safetensors", 5000, 2, id="shards laid out again, in the third"),
    ],
)
@pytest.mark.parametrize("which", ["SIGKILL", "SIGTERM"])
def test_the_next_attempt_takes_the_finished_shards_and_ends_in_the_same_manifest(
    config: StageConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    size: int,
    shard: str,
    offset: int,
    kept: int,
    which: str,
) -> None:
    monkeypatch.setenv("FINETUNE_TERMINATION_PATH", str(tmp_path / "report"))
    monkeypatch.setattr(merge_stage, "DEFAULT_SHARD_BYTES", size)
    code = end_in_the_middle(config, tmp_path, which, shard, offset, size)
    assert code == (-signal.SIGKILL if which == "SIGKILL" else ExitCode.RETRYABLE)
    work = config.output_path.with_name("merge.work")
    records = sorted(path.name for path in work.glob("*.safetensors.json"))
    assert len(records) == kept
    inodes = {path.stat().st_ino for path in work.glob("*.safetensors") if f"{path.name}.json" in records}

    assert run_stage(["merge", "--config", write_config(config, tmp_path / "again.json")]) == ExitCode.SUCCESS
    assert capsys.readouterr().out.count("from an earlier attempt, with the digest") == kept
    assert inodes <= {path.stat().st_ino for path in config.output_path.glob("*.safetensors")}
    assert read_manifest(config.output_path).digest == uninterrupted(config, tmp_path)
    assert not work.exists()
    assert not [path for path in config.output_path.parent.iterdir() if "tmp" in path.name]


def test_a_finished_shard_that_was_damaged_since_is_made_again(
    config: StageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_TERMINATION_PATH", str(tmp_path / "report"))
    end_in_the_middle(config, tmp_path, "SIGKILL", "model-00002-of-00003.safetensors", 9000)
    first = config.output_path.with_name("merge.work") / "model-00001-of-00003.safetensors"
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    assert run_stage(["merge", "--config", write_config(config, tmp_path / "again.json")]) == ExitCode.SUCCESS
    assert read_manifest(config.output_path).digest == uninterrupted(config, tmp_path)


def test_shards_of_another_adapter_are_not_taken(
    config: StageConfig,
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapter_artifacts: ModuleType,
) -> None:
    monkeypatch.setenv("FINETUNE_TERMINATION_PATH", str(tmp_path / "report"))
    end_in_the_middle(config, tmp_path, "SIGKILL", "model-00002-of-00003.safetensors", 9000)
    tensors = {name: 2 * value for name, value in load_file(tmp_path / "adapter/adapter_model.safetensors").items()}
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    other = adapter_artifacts.copy_artifact(tmp_path / "adapter", workspace / "consolidated-2", "consolidate")
    refs = adapter_artifacts.stage_config(
        workspace, "merge", config.spec, [workspace / "model", other], ["model", "consolidate"]
    )
    assert run_stage(["merge", "--config", write_config(refs, tmp_path / "again.json")]) == ExitCode.SUCCESS
    assert read_manifest(config.output_path).digest == uninterrupted(refs, tmp_path)
