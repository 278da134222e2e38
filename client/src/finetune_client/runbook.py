"""The runbook's tables by reason: what caused it and what to do, in the words of docs/runbook.md.

Used by doctor.py. The file itself is in this package (in the repository a link to docs/), so there is no second copy of
any sentence; tests/unit/chart/test_documents.py holds its reasons equal to the operator's and the stages'.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")


@dataclass(frozen=True)
class Entry:
    """One reason's row: markdown's backquotes are kept around what can be typed, links are their text."""

    reason: str
    cause: str
    cure: str
    evidence: str = ""
    tried_again: str = ""
    """no, counted, free or waits, or several of them; "" where the table does not say."""


@cache
def entries() -> Mapping[str, Entry]:
    """Every reason of the runbook's tables, the operator's before the stages' where both have one."""
    text = resources.files("finetune_client").joinpath("runbook.md").read_text(encoding="utf-8")
    found: dict[str, Entry] = {}
    columns: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| reason "):
            columns = cells
        elif not line.startswith("|"):
            columns = []
        elif columns and line.startswith("| `") and len(cells) == len(columns):
            row = {name: _LINK.sub(r"\1", cell) for name, cell in zip(columns, cells, strict=True)}
            for reason in re.findall(r"`(\w+)`", cells[0]):
                found.setdefault(
                    reason,
                    Entry(
                        reason,
                        row.get("cause", ""),
                        row.get("cure", ""),
                        row.get("evidence", ""),
                        row.get("tried again", ""),
                    ),
                )
    return MappingProxyType(found)
