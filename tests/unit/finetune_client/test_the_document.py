"""docs/client.md is true: its screens are the golden ones, its commands run, and its Python example runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import client_jobs
import pytest
from fake_api import FakeApi, Raw

from finetune_client.commands import app, run
from finetune_client.errors import Exit

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = ROOT / "docs" / "client.md"
GOLDEN = ROOT / "tests" / "golden" / "client"
_SCREEN = re.compile(r"(<!-- golden (\w+) (\w+) -->\n```\n)(.*?)(```\n)", re.DOTALL)


def golden_screen(moment: str, command: str) -> str:
    """One command of a golden file, with its prompt."""
    text = (GOLDEN / f"{moment}.txt").read_text(encoding="utf-8")
    (part,) = (
        each
        for each in re.split(r"(?m)^(?=\$ )", text)
        if each.startswith(f"$ finetune {command}") and not re.match(r"\$ finetune list -", each)
    )
    return part.rstrip("\n") + "\n"


def test_golden_screens_stand_in_the_document() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    updated = _SCREEN.sub(lambda match: match[1] + golden_screen(match[2], match[3]) + match[5], text)
    assert len(_SCREEN.findall(text)) == 3
    if os.environ.get("UPDATE_GOLDEN"):
        DOCUMENT.write_text(updated, encoding="utf-8")
    else:
        assert text == updated, "docs/client.md differs: run `make golden` and review the diff"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[list[str]]:
    """Every command line of ours in the document, without program and comment."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("finetune ")]


@pytest.fixture
def cluster(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    """A cluster whose operator does at once what a job asks for, and a folder with a manifest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig")))
    shutil.copy(ROOT / "examples" / f"{client_jobs.NAME}-trn1.yaml", "job.yaml")
    api.operator = operator
    return api


def operator(job: Raw) -> Raw:
    spec = job["spec"]
    moment = "planned" if spec.get("dryRun") else "suspended" if spec.get("suspend") else "finished"
    return client_jobs.status_at(moment, job["metadata"]["generation"])


def fail(api: FakeApi) -> None:
    api.set_status("research", client_jobs.NAME, client_jobs.job_at("failed")[0].raw["status"])


BEFORE: dict[str, Callable[[FakeApi], Any]] = {"retry": fail, "why": lambda api: None}


def test_every_command_of_the_document_runs(cluster: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    told = {}
    for arguments in commands():
        if arguments[0] == "preview":
            continue  # tests/unit/finetune_trainer/test_preview.py: it needs data and a tokenizer
        BEFORE.get(arguments[0], lambda api: None)(cluster)
        code = run(arguments)
        told[tuple(arguments)] = (code, capsys.readouterr())
    bad = {line: said for line, (code, said) in told.items() if code != Exit.OK}
    assert bad == {}
    assert {arguments[0] for arguments in commands()} == {
        command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands
    } - {"list"}


def test_the_python_example_runs(cluster: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("python")
    exec(compile(example, str(DOCUMENT), "exec"), {})
    out = capsys.readouterr().out
    assert "5/5 evaluate 100%" in out
    assert "fsx-claim finetune/jobs" in out
