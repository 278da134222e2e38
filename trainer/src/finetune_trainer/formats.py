"""Record formats: which fields a record has, and the exact text that the model sees.

prepare builds training examples here and evaluate builds its prompts here, so that both show the model the very same
string. Reading files (records.py) and tokens (tokenization.py) are no business of this module.

    dolly             instruction, optional context, response: sections "### Instruction", "### Context", "### Answer"
    samsum            dialogue, summary: "Summarize the chat dialogue:", the dialogue, "---", "Summary:"
    promptCompletion  prompt, completion: the prompt as it is

Every completion is followed by the end-of-sequence token, which tokenization.py adds as a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_trainer.errors import UserError

DOLLY = "dolly"
SAMSUM = "samsum"
PROMPT_COMPLETION = "promptCompletion"
FORMATS = (DOLLY, SAMSUM, PROMPT_COMPLETION)

_SHOWN = 60
"""Characters of a wrong value that a message shows."""


@dataclass(frozen=True)
class Example:
    """What the model reads, and what it is to answer."""

    prompt: str
    completion: str


class RecordError(ValueError):
    """A record does not fit its format. `field` is the field's name, "" for the whole record; `found` what is there."""

    def __init__(self, field: str, found: str) -> None:
        super().__init__(f"field {field!r}: {found}" if field else found)
        self.field = field
        self.found = found


def build_prompt(format_name: str, text: str, context: str | None = None) -> str:
    """The prompt string for one question.

    `text` is the instruction (dolly), the dialogue (samsum) or the whole prompt (promptCompletion). Only dolly has a
    context; UserError when one is given to another format, or the format is unknown.
    """
    if context and format_name != DOLLY:
        raise UserError(
            "InvalidPrompt", f"format {format_name} has no context, got {_shown(context)}: put it into the text"
        )
    if format_name == DOLLY:
        # Blank context is how the dataset's own files write "none".
        middle = f"### Context\n{context}\n\n" if context and context.strip() else ""
        return f"### Instruction\n{text}\n\n{middle}### Answer\n"
    if format_name == SAMSUM:
        return f"Summarize the chat dialogue:\n{text}\n---\nSummary:\n"
    if format_name == PROMPT_COMPLETION:
        return text
    raise UserError(
        "UnknownFormat", f"dataset format {format_name!r} is not available: use one of {', '.join(FORMATS)}"
    )


def build_example(format_name: str, record: Any) -> Example:
    """The example of one record of a dataset file; fields that the format does not know are ignored.

    RecordError names the field that is missing, empty or no text. UserError when the format is unknown.
    """
    if not isinstance(record, Mapping):
        raise RecordError("", f"expected an object, found {_type_name(record)} {_shown(record)}")
    if format_name == DOLLY:
        context = record.get("context")
        if context is not None and not isinstance(context, str):
            raise RecordError("context", f"expected text or nothing, found {_type_name(context)} {_shown(context)}")
        if context:
            _check_unicode("context", context)
        return Example(build_prompt(DOLLY, _text(record, "instruction"), context), _text(record, "response"))
    if format_name == SAMSUM:
        return Example(build_prompt(SAMSUM, _text(record, "dialogue")), _text(record, "summary"))
    return Example(build_prompt(format_name, _text(record, "prompt")), _text(record, "completion"))


def _text(record: Mapping[str, Any], field: str) -> str:
    if field not in record:
        raise RecordError(field, f"missing; the record has {_names(record)}")
    value = record[field]
    if not isinstance(value, str):
        raise RecordError(field, f"expected text, found {_type_name(value)} {_shown(value)}")
    if not value.strip():
        raise RecordError(field, "is empty")
    _check_unicode(field, value)
    return value


def _check_unicode(field: str, value: str) -> None:
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise RecordError(field, r"half of a surrogate pair (a \ud800 to \udfff escape without its other half)")


def _type_name(value: Any) -> str:
    names = {
        bool: "true or false",
        type(None): "null",
        list: "a list",
        dict: "an object",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _names(record: Mapping[str, Any]) -> str:
    # A name comes from the file, too: half a character in it could not be written into any report.
    text = ", ".join(map(str, record)).encode("utf-8", "backslashreplace").decode()
    return (text if len(text) <= 2 * _SHOWN else text[: 2 * _SHOWN] + "…") or "no fields"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
