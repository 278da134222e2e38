"""The documents keep up: every reason is in the runbook, every dependency has its reason, every link a target."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from finetune_operator.api.constants import Reason
from finetune_operator.core.failure_rules import JUDGED, RULES, Verdict

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


RUNBOOK = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
OPERATOR_PART, STAGES_PART = "## Reasons of the operator", "## Reasons of the stages"
TRIED_AGAIN = "tried again"


def part(heading: str) -> str:
    """The runbook from one heading of the second level to the next."""
    return RUNBOOK.split(f"\n{heading}\n")[1].split("\n## ")[0]


def rows(heading: str) -> list[tuple[str, dict[str, str]]]:
    """(reason, its row's cells by column) of every table in a part of the runbook."""
    found: list[tuple[str, dict[str, str]]] = []
    columns: list[str] = []
    for line in part(heading).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| reason "):
            columns = cells
        elif line.startswith("| `"):
            assert len(cells) == len(columns), line
            found += [(reason, dict(zip(columns, cells, strict=True))) for reason in re.findall(r"`(\w+)`", cells[0])]
    return found


def documented(heading: str) -> list[str]:
    """The reasons that a part of the runbook explains: the first cells of its tables, and the words of "No failure"."""
    healthy = part(heading).split("\n### No failure\n")[1:]
    words = [word for text in healthy for word in re.findall(r"`([A-Z][A-Za-z]+)`", text)]
    return [reason for reason, _ in rows(heading)] + words


def verdicts(reason: str) -> str:
    """What the failure doctor's table says of a reason, in the runbook's words."""
    given = {rule.verdict for rule in RULES if rule.reason == reason}
    return ", ".join(
        verdict for verdict in (Verdict.FAIL, Verdict.FREE, Verdict.COUNTED, Verdict.WAIT) if verdict in given
    )


def alerts() -> set[str]:
    """Names of the chart's alerts."""
    text = (ROOT / "charts" / "finetune-operator" / "templates" / "monitoring.yaml").read_text(encoding="utf-8")
    return set(re.findall(r"alert: (\w+)", text))


def test_every_reason_of_the_operator_is_explained_once_and_no_other() -> None:
    assert sorted(documented(OPERATOR_PART)) == sorted(str(reason) for reason in Reason)


def test_the_runbook_says_of_each_reason_what_the_table_does() -> None:
    said = {reason: cells[TRIED_AGAIN] for reason, cells in rows(OPERATOR_PART) if TRIED_AGAIN in cells}
    judged = {str(reason) for reason in JUDGED}
    assert {reason: said.get(reason) for reason in judged} == {reason: verdicts(reason) for reason in judged}
    assert {reason for reason in said if reason not in judged and said[reason] not in set(Verdict)} == set()


def test_every_reason_of_a_stage_is_explained() -> None:
    assert stage_reasons() - {*documented(STAGES_PART), *documented(OPERATOR_PART)} == set()


def test_no_reason_of_a_stage_is_explained_that_no_stage_gives() -> None:
    assert set(documented(STAGES_PART)) - stage_reasons() == set()


def test_every_alert_is_explained_and_no_other() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", part("## Alerts"), re.MULTILINE)) == alerts()


@pytest.mark.parametrize("name", ["operator", "trainer", "client", "neuron", "dev", "python310"])
def test_every_dependency_has_its_reason(name: str) -> None:
    lines = (ROOT / "requirements" / f"{name}.in").read_text(encoding="utf-8").splitlines()
    named = {re.split(r"[=<>\[ ]", line)[0] for line in lines if line and not line.startswith(("#", "-r"))}
    words = set(re.findall(r"[\w-]+", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")))
    assert named - words == set()


DISTRIBUTIONS = ("operator", "trainer", "client")
DOCUMENTS = [
    path
    for pattern in ("*.md", "docs/**/*.md", "charts/*/*.md", "hack/*/*.md", *(f"{d}/*.md" for d in DISTRIBUTIONS))
    for path in sorted(ROOT.glob(pattern))
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_has_its_target(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []
