"""docs/hardware-truth.md keeps up: with the code's names, the files it points at, and the rows of trainium-check.sh."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "hardware-truth.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "hack" / "trainium-check.sh").read_text(encoding="utf-8")
ROOTS = (
    ROOT,
    ROOT / "operator" / "src" / "finetune_operator",
    ROOT / "trainer" / "src" / "finetune_trainer",
)
COLUMNS = ["claim", "used in", "source", "checked", "row"]
HOW = ("run", "read", "docs", "inferred", "nothing was checked")

CODE = [
    *(ROOT / "operator" / "src").rglob("*.py"),
    *(ROOT / "trainer" / "src").rglob("*.py"),
    *(ROOT / "charts" / "finetune-operator" / "templates").glob("*"),
]
VENDOR_NAMES = re.compile(
    r"(?:sagemaker|vpc)\.amazonaws\.com/[a-z-]+|aws\.amazon\.com/[a-z]+|nvidia\.com/[a-z]+"
    r"|kueue\.x-k8s\.io/(?:v\d\w+|[a-z-]+)"
    r"|\"(?:(?:NEURON|FI|NCCL|MALLOC|XLA)_[A-Z0-9_]+|HF_HUB_OFFLINE|OMP_NUM_THREADS)\""
)
NOT_THE_VENDORS = {"NEURON_RESOURCE_NAME_MISMATCH"}


def claims() -> list[dict[str, str]]:
    """The rows of every table whose columns are COLUMNS."""
    found = []
    inside = False
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if cells == COLUMNS:
            inside = True
        elif not cells:
            inside = False
        elif inside and not line.startswith("|---"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert len(cells) == len(COLUMNS), line
            found.append(dict(zip(COLUMNS, cells, strict=True)))
    return found


def test_every_claim_names_files_that_are_there() -> None:
    missing = []
    for claim in claims():
        paths = re.findall(r"`([^`]+)`", claim["used in"])
        assert paths, claim["claim"]
        missing += [path for path in paths if not any((root / path).is_file() for root in ROOTS)]
    assert missing == []


def test_every_claim_has_a_source_and_says_how_it_was_checked() -> None:
    assert [claim["claim"] for claim in claims() if not claim["source"]] == []
    assert [claim["claim"] for claim in claims() if not claim["checked"].startswith(HOW)] == []
    assert len(claims()) > 60


def test_every_row_of_the_script_is_named_by_a_claim_and_no_other() -> None:
    named = {row for claim in claims() for row in re.findall(r"\b[KNT]\d+\b", claim["row"])}
    assert named == set(re.findall(r"^  row ([KNT]\d+) ", SCRIPT, re.MULTILINE))


def test_every_name_of_the_vendors_that_the_code_has_is_on_the_page() -> None:
    used = {
        name.strip('"')
        for path in CODE
        if path.is_file()
        for name in VENDOR_NAMES.findall(path.read_text(encoding="utf-8"))
    }
    assert {name for name in used - NOT_THE_VENDORS if f"`{name}`" not in PAGE} == set()


def test_every_step_that_a_claim_points_at_is_in_the_list() -> None:
    steps = set(re.findall(r"^(\d)\. ", PAGE, re.MULTILINE))
    assert {step for claim in claims() for step in re.findall(r"step (\d)", claim["row"])} <= steps
