"""What is wrong with a spec, as values: one Problem a field, and SpecError that carries all of them at once."""

from __future__ import annotations

from collections.abc import Iterable

from finetune_trainer.spec_checks import Problem

__all__ = ["Problem", "SpecError"]


class SpecError(Exception):
    """The user's fault: the object cannot be acted on as it is. `problems` are all that were found, in field order."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(str(problem) for problem in self.problems))
