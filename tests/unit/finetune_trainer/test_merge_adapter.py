"""`finetune-trainer merge-adapter` as people call it, on folders of the hub's layout."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finetune_trainer.artifacts import read_manifest
from finetune_trainer.contract import ExitCode
from finetune_trainer.merge_adapter import ProgressBar, main

TOKENS = torch.arange(3, 35).reshape(2, 16)


@pytest.fixture
def folders(tiny_model: Path, tmp_path: Path, adapter_artifacts: ModuleType) -> tuple[Path, Path, Path]:
    return tiny_model, adapter_artifacts.random_adapter(tiny_model, tmp_path / "adapter"), tmp_path / "merged"


def test_the_command_writes_a_model_that_transformers_loads(folders: tuple[Path, Path, Path]) -> None:
    base, adapter, output = folders
    ran = subprocess.run(
        [sys.executable, "-m", "finetune_trainer", "merge-adapter", base, adapter, output, "--max-shard-size", "50KB"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "values read back from the files equal base plus adapter" in ran.stdout
    assert ran.stderr == ""
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    merged = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        assert (merged(TOKENS).logits - expected(TOKENS).logits).abs().max() < 1e-5
    proofs = read_manifest(output).metadata["targets"]
    assert proofs["model.layers.0.self_attn.q_proj.weight"]["deltaNorm"] > 0
    assert not output.with_name("merged.work").exists()


def test_what_is_wrong_is_said_in_one_line(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base, adapter, output = map(str, folders)

    def said(*arguments: str) -> str:
        assert main(arguments) == ExitCode.USER_ERROR
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "NoSuchFolder" in said(f"{base}-not", adapter, output)
    (tmp_path / "empty").mkdir()
    assert "save the adapter with peft's save_pretrained" in said(base, str(tmp_path / "empty"), output)
    assert "neither model.safetensors.index.json nor model.safetensors" in said(
        str(tmp_path / "empty"), adapter, output
    )
    assert "--max-shard-size is '5XB'" in said(base, adapter, output, "--max-shard-size", "5XB")
    assert "OutputExists" in said(base, adapter, str(tmp_path / "empty"))
    assert not Path(output).exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_how_far_it_is_and_a_file_sees_nothing() -> None:
    terminal, file = Terminal(), io.StringIO()
    for target in (terminal, file):
        bar = ProgressBar(1000, target, min_interval=0.0)
        bar.add(250)
        bar.add(750)
        bar.close()
    assert " 25% " in terminal.getvalue()
    assert "100% " in terminal.getvalue()
    assert terminal.getvalue().endswith("\n")
    assert file.getvalue() == ""
