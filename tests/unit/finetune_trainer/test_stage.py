"""The frame around every stage: arguments, reuse, reports and exit codes."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import contract, stage
from finetune_trainer.artifacts import artifact_ref, new_artifact, remove_artifact
from finetune_trainer.contract import ExitCode, StageConfig
from finetune_trainer.errors import CorruptArtifact, DeviceOutOfMemory, HostOutOfMemory, RetryableError, UserError


def config(workspace: Path, **overrides: Any) -> StageConfig:
    values: dict[str, Any] = {
        "stage": "prepare",
        "image": "i",
        "spec": {},
        "output": "out",
        "workspace": str(workspace),
    }
    return StageConfig(**{**values, **overrides})


def finish(workspace: Path, stage_config: StageConfig) -> None:
    with new_artifact(workspace / "model", "model") as writer:
        writer.write("a", b"1")
    with new_artifact(stage_config.output_path, "prepare") as writer:
        writer.write("rows", b"2")
        metrics = {"rows": 3, "seconds": 1.5, "tokensPerSecond": 9}
        stage.keep_report(writer, metrics, {"model": artifact_ref(workspace, workspace / "model")})


def run_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *argv: str) -> tuple[int, dict[str, Any]]:
    termination = tmp_path / "termination"
    monkeypatch.setenv(contract.TERMINATION_PATH_ENV, str(termination))
    code = stage.main(argv)
    return code, json.loads(termination.read_bytes())


def test_a_finished_stage_says_its_report_again(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = config(workspace)
    finish(workspace, done)
    (tmp_path / "stage.json").write_text(json.dumps(done.as_json()))
    code, report = run_main(monkeypatch, tmp_path, "prepare", "--config", str(tmp_path / "stage.json"))
    assert code == ExitCode.SUCCESS
    assert report["reused"] is True
    assert report["metrics"].keys() == {"rows", "seconds"}
    assert report["artifacts"] == {
        "model": artifact_ref(workspace, workspace / "model").as_json(),
        "prepare": artifact_ref(workspace, workspace / "out").as_json(),
    }


def test_an_artifact_whose_companion_is_gone_is_not_reused(workspace: Path) -> None:
    done = config(workspace)
    finish(workspace, done)
    remove_artifact(workspace / "model")
    assert stage.reusable_report(done) is None
    assert not done.output_path.exists()


def test_measurements_are_no_part_of_the_artifact(workspace: Path) -> None:
    done = config(workspace)
    finish(workspace, done)
    assert stage.finished_report(done).metrics == {"rows": 3}
    assert stage.finished_report(done, {"tokensPerSecond": 9}).metrics == {"rows": 3, "tokensPerSecond": 9}


@pytest.mark.parametrize(
    ("text", "reason", "words"),
    [
        pytest.param(None, "InvalidStageConfig", "cannot read stage config", id="no stage.json"),
        pytest.param("{", "InvalidStageConfig", "is no JSON", id="no JSON"),
        pytest.param('{"contractVersion": 9}', "InvalidStageConfig", "contractVersion 9", id="another contract"),
        pytest.param(
            json.dumps(config(Path("/w"), stage="merge").as_json()),
            "InvalidStageConfig",
            "for stage 'merge'",
            id="another stage",
        ),
        pytest.param(
            json.dumps(config(Path("/w")).as_json()),
            "InvalidStageConfig",
            "spec.model must be an object",
            id="an empty spec",
        ),
    ],
)
def test_a_wrong_stage_config_is_a_user_error_with_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, reason: str, words: str
) -> None:
    path = tmp_path / "stage.json"
    if text is not None:
        path.write_text(text)
    code, report = run_main(monkeypatch, tmp_path, "prepare", "--config", str(path))
    assert (code, report["exitCode"], report["reason"]) == (20, 20, reason)
    assert words in report["message"]


@pytest.mark.parametrize("stage", contract.STAGES)
def test_every_stage_of_the_contract_has_a_program(stage: str) -> None:
    assert importlib.util.find_spec(f"finetune_trainer.stages.{stage}") is not None


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        pytest.param(MemoryError(), HostOutOfMemory, id="memory error"),
        pytest.param(
            RuntimeError("DefaultCPUAllocator: can't allocate memory"), HostOutOfMemory, id="torch on the host"
        ),
        pytest.param(OutOfMemoryError("CUDA out of memory"), DeviceOutOfMemory, id="torch on a device"),
        pytest.param(contract.ContractError("x"), UserError, id="contract error"),
        pytest.param(OSError(errno.ENOSPC, "No space left on device", "/w/x"), RetryableError, id="volume full"),
        pytest.param(OSError(errno.EDQUOT, "Disk quota exceeded", "/w/x"), RetryableError, id="quota used up"),
        pytest.param(RuntimeError("I/O error: No space left on device (os error 28)"), RetryableError, id="in Rust"),
        pytest.param(OSError(errno.ESTALE, "Stale file handle", "/w/x"), RetryableError, id="volume went away"),
        pytest.param(OSError(errno.ESHUTDOWN, "Cannot send", "/w/x"), RetryableError, id="evicted by the file server"),
        pytest.param(PermissionError(errno.EACCES, "Permission denied", "/w/x"), UserError, id="permission denied"),
        pytest.param(CorruptArtifact("x"), CorruptArtifact, id="a stage error is itself"),
        pytest.param(ValueError("x"), type(None), id="anything else is a bug"),
    ],
)
def test_errors_are_classified(error: Exception, kind: type[Any]) -> None:
    assert type(stage.as_stage_error(error)) is kind


def test_a_bug_keeps_its_traceback_and_exits_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("the very cause")
    except ValueError as error:
        report = stage.failure_report("prepare", error)
    assert (report.exit_code, report.reason) == (ExitCode.BUG, "UnexpectedError")
    assert report.message == "ValueError: the very cause"
    assert "Traceback" in capsys.readouterr().err


def test_secrets_are_masked_in_what_is_printed() -> None:
    spec = {"model": {"source": "hf://a/b", "token": "hf_x", "tokenSecretRef": {"name": "n", "key": "k"}}}
    shown = stage.describe(config(Path("/w"), spec=spec, secrets={"model-token": "/etc/x"}))
    assert "hf_x" not in shown
    assert "/etc/x" not in shown
    assert json.loads(shown)["spec"]["model"]["tokenSecretRef"] == {"name": "n", "key": "k"}


def test_the_program_runs_without_a_home_and_imports_only_what_its_stage_needs(tmp_path: Path) -> None:
    program = (
        "import sys; from finetune_trainer import stage, __main__\n"
        "stage.set_environment('merge')\n"
        "import os; print(os.environ['HOME'], os.environ['HF_HUB_OFFLINE'], os.environ['HF_HOME'])\n"
        "heavy = ('torch', 'transformers', 'numpy', 'boto3', 'huggingface_hub')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.splitlines() == [f"{tmp_path} 1 {tmp_path}/huggingface", "[]"]


def test_a_terminated_stage_reports_and_cleans_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a hub that takes a request and never answers
        spec = {
            "model": {"source": "hf://org/base"},
            "dataset": {"source": "hf://org/data", "format": "dolly", "maxLength": 16},
            "training": {"maxSteps": 1},
        }
        stage_config = config(tmp_path, spec=spec, parallelism={"globalBatchSize": 1})
        (tmp_path / "stage.json").write_text(json.dumps(stage_config.as_json()))
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
            contract.TERMINATION_PATH_ENV: str(tmp_path / "report"),
        }
        command = [sys.executable, "-m", "finetune_trainer", "prepare", "--config", str(tmp_path / "stage.json")]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            silent.settimeout(60)
            connection, _ = silent.accept()
            with connection:
                process.terminate()
                assert process.wait(20) == ExitCode.RETRYABLE
    assert contract.parse_report((tmp_path / "report").read_bytes()).reason == "Terminated"


def test_the_console_program_exits_with_the_stages_code(tmp_path: Path) -> None:
    environment = {**os.environ, contract.TERMINATION_PATH_ENV: str(tmp_path / "report")}
    command = [sys.executable, "-m", "finetune_trainer", "merge", "--config", str(tmp_path / "none.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == ExitCode.USER_ERROR
    assert contract.parse_report((tmp_path / "report").read_bytes()).reason == "InvalidStageConfig"
    assert "InvalidStageConfig: cannot read stage config" in done.stderr
