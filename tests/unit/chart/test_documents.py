"""The documents keep up: every reason is in the runbook, every dependency has its reason, every link a target."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from finetune_operator.api.constants import Reason

ROOT = Path(__file__).resolve().parents[3]
TRAINER = ROOT / "trainer" / "src" / "finetune_trainer"
ERRORS = {"UserError", "RetryableError", "HostOutOfMemory", "DeviceOutOfMemory", "Interrupted"}


def stage_reasons() -> set[str]:
    """The first argument of every StageError raised in the trainer, and the reasons that errors.py and stage.py fix."""
    found = {"CorruptArtifact", "UnexpectedError"}
    for path in TRAINER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args:
                constants = [part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
                found |= {value for value in constants if isinstance(value, str)}
    return found


def documented() -> set[str]:
    """Every CamelCase word in backticks."""
    text = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    return set(re.findall(r"`([A-Z][A-Za-z0-9]+)`", text))


def test_every_reason_of_the_operator_is_explained() -> None:
    assert {str(reason) for reason in Reason} - documented() == set()


def test_every_reason_of_a_stage_is_explained() -> None:
    assert stage_reasons() - documented() == set()


def test_no_reason_is_explained_that_nobody_gives() -> None:
    conditions = {"Validated", "StorageReady", "Evaluated"}
    assert documented() - stage_reasons() - {str(reason) for reason in Reason} - conditions == set()


@pytest.mark.parametrize("name", ["operator", "trainer", "dev"])
def test_every_dependency_has_its_reason(name: str) -> None:
    lines = (ROOT / "requirements" / f"{name}.in").read_text(encoding="utf-8").splitlines()
    named = {re.split(r"[=<>\[ ]", line)[0] for line in lines if line and not line.startswith(("#", "-r"))}
    words = set(re.findall(r"[\w-]+", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")))
    assert named - words == set()


DOCUMENTS = [
    path
    for pattern in ("*.md", "docs/**/*.md", "charts/*/*.md", "hack/*/*.md", "operator/*.md", "trainer/*.md")
    for path in sorted(ROOT.glob(pattern))
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_has_its_target(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []
