"""A document before it is tokens: spans of text, each learnt or not, and what is said of a record that gives none.

formats.py makes Examples of records, by chat.py where they are conversations; tokenization.py turns them into tokens
and labels, and label_audit.py looks at what came of it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A stretch of a document's text; `learnt` where the model is to write it itself."""

    text: str
    learnt: bool


@dataclass(frozen=True)
class Example:
    """One document: its spans in order, of which no two neighbours are alike and none is empty.

    `rendered` is true where a chat template wrote the text, and with it the beginning of the sequence. `cut` counts the
    messages of the record that were left out behind the last answer.
    """

    spans: tuple[Span, ...]
    rendered: bool = False
    cut: int = 0

    @classmethod
    def of(cls, prompt: str, completion: str) -> Example:
        """What the model reads, and what it is to answer."""
        return cls((Span(prompt, learnt=False), Span(completion, learnt=True)))

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)


BROKEN, WRONG, EMPTY, TEMPLATE, TOO_LONG, DOUBLE_BOS, UNLEARNT = (
    "broken",
    "wrongField",
    "empty",
    "chatTemplate",
    "tooLong",
    "doubleBos",
    "nothingLearnt",
)
"""Why a record cannot be used: no record at all, a field of a wrong kind or none, an empty one, a conversation that the
chat template refuses, more tokens than a row, a beginning of sequence twice, no token that is learnt."""


class RecordError(ValueError):
    """A record does not fit its format. `field` is the field's name, "" for the whole record; `found` what is there."""

    def __init__(self, field: str, found: str, kind: str = WRONG) -> None:
        super().__init__(f"field {field!r}: {found}" if field else found)
        self.field = field
        self.found = found
        self.kind = kind
