"""What becomes of records that cannot be used: none is left out silently.

prepare reports every problem here. With maxRejectedPercent 0, the default, the first ten problems fail the stage; with
more, the share of rejected records decides at the end, and every one is listed in the artifact's rejected.jsonl.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from finetune_trainer.errors import UserError
from finetune_trainer.examples import WRONG

_LISTED = 10


@dataclass(frozen=True)
class Problem:
    """One record that cannot be used: where it is, which field is wrong ("" for the record), and what was found.

    `kind` is one of examples.py's words for it.
    """

    file: str
    line: int
    field: str
    found: str
    kind: str = WRONG

    def __str__(self) -> str:
        field = f", field {self.field!r}" if self.field else ""
        return f"{self.file}, line {self.line}{field}: {self.found}"


class Rejections:
    """Collects problems and decides when they are too many."""

    def __init__(self, max_percent: float) -> None:
        self._max_percent = Fraction(str(max_percent))
        self.problems: list[Problem] = []

    def add(self, problem: Problem) -> None:
        """Note one; UserError (RecordsRejected) once there are ten where none is allowed."""
        self.problems.append(problem)
        if self._max_percent == 0 and len(self.problems) == _LISTED:
            self._fail("the first ten problems")

    def check(self, records: int) -> None:
        """UserError (RecordsRejected) when more than the allowed share of `records` was rejected."""
        if len(self.problems) * 100 > self._max_percent * records:
            self._fail(f"{len(self.problems)} of {records} records cannot be used")

    def counts(self) -> dict[str, int]:
        """How many records cannot be used, by kind."""
        return dict(sorted(Counter(problem.kind for problem in self.problems).items()))

    def in_order(self) -> list[Problem]:
        """All problems by file and line."""
        return sorted(self.problems, key=lambda problem: (problem.file, problem.line))

    def as_lines(self) -> bytes:
        """rejected.jsonl: one JSON object a rejected record."""
        return b"".join(json.dumps(vars(problem), ensure_ascii=False).encode() + b"\n" for problem in self.in_order())

    def _fail(self, what: str) -> None:
        listed = "\n".join(str(problem) for problem in self.in_order()[:_LISTED])
        counts = ", ".join(f"{kind} {count}" for kind, count in self.counts().items())
        raise UserError(
            "RecordsRejected",
            f"{what}, maxRejectedPercent is {float(self._max_percent):g} ({counts}): mend these records, or raise "
            f"spec.dataset.maxRejectedPercent or maxLength\n{listed}",
        )
