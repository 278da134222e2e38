"""Record formats: which fields a record has, and the exact text that the model sees.

prepare builds training examples here and evaluate builds its prompts here, so that both show the model the very same
string. Reading files (records.py) and tokens (tokenization.py) are no business of this module.

    dolly             instruction, optional context, response: sections "### Instruction", "### Context", "### Answer"
    alpaca            instruction, optional input, output: Alpaca's own words, with and without input
    samsum            dialogue, summary: "Summarize the chat dialogue:", the dialogue, "---", "Summary:"
    promptCompletion  prompt, completion: the prompt as it is
    template          fields of the user's own in the user's own prompt and completion
    text              text: learnt as it is
    messages          messages of role and content, by the model's own chat template; learnt is what the assistant says
    sharegpt          the same as conversations of from (human, gpt, system) and value

Each document ends in the end-of-sequence token, or in the token by which the chat template ends a turn.
"""

from __future__ import annotations

import json
import string
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune_trainer.chat import ASSISTANT, ChatTemplate
from finetune_trainer.contract import digest_of
from finetune_trainer.errors import UserError
from finetune_trainer.examples import EMPTY, Example, RecordError, Span
from finetune_trainer.spec_rules import template_fields

DOLLY = "dolly"
SAMSUM = "samsum"
PROMPT_COMPLETION = "promptCompletion"
ALPACA = "alpaca"
MESSAGES = "messages"
SHAREGPT = "sharegpt"
TEXT = "text"
TEMPLATE = "template"
FORMATS = (DOLLY, SAMSUM, PROMPT_COMPLETION, ALPACA, MESSAGES, SHAREGPT, TEXT, TEMPLATE)
CONVERSATIONS = frozenset({MESSAGES, SHAREGPT})

_ROLES = ("system", "developer", "user", ASSISTANT, "tool")
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bing": ASSISTANT, "bard": ASSISTANT,
    "assistant": ASSISTANT, "model": ASSISTANT, "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
_SHOWN = 60
"""Characters of a wrong value that a message shows."""


class RecordFormat(ABC):
    """One format. `rendered` is true where a chat template writes the text and its beginning of sequence."""

    name: str
    rendered = False

    @abstractmethod
    def example(self, record: Any) -> Example:
        """The example of one record of a dataset file; fields that the format does not know are ignored.

        RecordError names the field that is missing, empty or no text.
        """

    @abstractmethod
    def prompt(self, text: str, context: str | None = None) -> str:
        """The prompt string for one question, as example() puts it before the answer.

        `text` is the instruction, the dialogue, the prompt, or what the user says; `context` is dolly's context,
        alpaca's input, a conversation's system message or a template's second field. UserError when the format has no
        place for it.
        """

    @property
    def end_of_turn(self) -> str:
        """The token that ends an answer in place of the end-of-sequence token; "" without one of its own."""
        return ""

    def prompt_digest(self) -> str:
        """ "sha256:<hex>" of what the format puts around a question, its template included."""
        prompts = [self.prompt("\0question", context) for context in (None, "\0context") if self._takes(context)]
        return digest_of([self.name, self.template, self.end_of_turn, *prompts])

    @property
    def template(self) -> Any:
        """The template by which the format writes, as JSON; None where its words are all in this module."""
        return None

    def _takes(self, context: str | None) -> bool:
        try:
            self.prompt("\0question", context)
        except UserError:
            return False
        return True

    def _refuse_context(self, context: str | None) -> None:
        if context:
            raise UserError(
                "InvalidPrompt", f"format {self.name} has no context, got {_shown(context)}: put it into the text"
            )


def open_format(name: str, *, template: Mapping[str, Any] | None = None, tokenizer: Any = None) -> RecordFormat:
    """The format `name`. `template` is spec.dataset.template; conversations need the model's tokenizer.

    UserError when the format is unknown, the template is no template, or the tokenizer has no usable chat template.
    """
    if name in CONVERSATIONS:
        return _Conversations(name, ChatTemplate(tokenizer))
    if name == TEMPLATE:
        return _Template(template or {})
    if name == TEXT:
        return _Text()
    if name in _QUESTIONS:
        return _QuestionAndAnswer(name)
    raise UserError("UnknownFormat", f"dataset format {name!r} is not available: use one of {', '.join(FORMATS)}")


def build_prompt(format_name: str, text: str, context: str | None = None) -> str:
    """The prompt string for one question in a format that needs neither template nor tokenizer."""
    return open_format(format_name).prompt(text, context)


# ---- one question and its answer

_QUESTIONS: Mapping[str, tuple[str, str | None, str]] = {
    DOLLY: ("instruction", "context", "response"),
    ALPACA: ("instruction", "input", "output"),
    SAMSUM: ("dialogue", None, "summary"),
    PROMPT_COMPLETION: ("prompt", None, "completion"),
}
"""Fields of question, context (None: the format has none) and answer."""


class _QuestionAndAnswer(RecordFormat):
    def __init__(self, name: str) -> None:
        self.name = name

    def example(self, record: Any) -> Example:
        fields = _object(record)
        question, context_name, answer = _QUESTIONS[self.name]
        context = None
        if context_name is not None:
            context = fields.get(context_name)
            if context is not None and not isinstance(context, str):
                raise RecordError(
                    context_name, f"expected text or nothing, found {_type_name(context)} {_shown(context)}"
                )
            if context:
                _check_unicode(context_name, context)
        return Example.of(self.prompt(_text(fields, question), context), _text(fields, answer))

    def prompt(self, text: str, context: str | None = None) -> str:
        # Blank context is how the datasets' own files write "none".
        has_context = bool(context and context.strip())
        if self.name == DOLLY:
            middle = f"### Context\n{context}\n\n" if has_context else ""
            return f"### Instruction\n{text}\n\n{middle}### Answer\n"
        if self.name == ALPACA:
            with_input = ", paired with an input that provides further context" if has_context else ""
            middle = f"### Input:\n{context}\n\n" if has_context else ""
            return (
                f"Below is an instruction that describes a task{with_input}. Write a response that appropriately "
                f"completes the request.\n\n### Instruction:\n{text}\n\n{middle}### Response:\n"
            )
        self._refuse_context(context)
        return f"Summarize the chat dialogue:\n{text}\n---\nSummary:\n" if self.name == SAMSUM else text


class _Text(RecordFormat):
    name = TEXT

    def example(self, record: Any) -> Example:
        return Example((Span(_text(_object(record), "text"), learnt=True),))

    def prompt(self, text: str, context: str | None = None) -> str:
        self._refuse_context(context)
        return text


class _Template(RecordFormat):
    """Prompt and completion with {name} in place of the field of that name; what is no text is written as JSON."""

    name = TEMPLATE

    def __init__(self, template: Mapping[str, Any]) -> None:
        self._parts = {}
        for part in ("prompt", "completion"):
            text = template.get(part)
            try:
                template_fields(str(text or ""))
            except ValueError as error:
                raise UserError("InvalidTemplate", f"spec.dataset.template.{part} is {_shown(text)}: {error}") from None
            if not text:
                raise UserError("InvalidTemplate", f"spec.dataset.template.{part} is empty: set it")
            self._parts[part] = text
        self._asked = list(dict.fromkeys(template_fields(self._parts["prompt"])))

    @property
    def template(self) -> Any:
        return self._parts

    def example(self, record: Any) -> Example:
        fields = _object(record)
        return Example.of(*(self._fill(part, fields) for part in ("prompt", "completion")))

    def prompt(self, text: str, context: str | None = None) -> str:
        given = [value for value in (text, context) if value is not None]
        # Whatever the order in the template, a field called context is the context.
        names = sorted(self._asked, key=lambda name: name == "context")
        if len(names) != len(given):
            raise UserError(
                "InvalidPrompt",
                f"spec.dataset.template.prompt has {len(names)} fields ({', '.join(names) or 'none'}), a prompt of "
                f"evaluate gave {len(given)} values: its text stands for the first field, its context for the second",
            )
        return self._fill("prompt", dict(zip(names, given, strict=True)))

    def _fill(self, part: str, fields: Mapping[str, Any]) -> str:
        found = []
        for literal, name, _, _ in string.Formatter().parse(self._parts[part]):
            found.append(literal)
            if name is not None:
                found.append(self._value(part, name, fields))
        text = "".join(found)
        if not text.strip():
            raise RecordError("", f"template.{part} is empty with its fields", EMPTY)
        return text

    @staticmethod
    def _value(part: str, name: str, fields: Mapping[str, Any]) -> str:
        if name not in fields:
            raise RecordError(name, f"missing, spec.dataset.template.{part} needs it; the record has {_names(fields)}")
        value = fields[name]
        if part == "completion" and (value is None or (isinstance(value, str) and not value.strip())):
            raise RecordError(name, "is empty: there is no answer to learn", EMPTY)
        if value is None:
            return ""
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        _check_unicode(name, text)
        return text


class _Conversations(RecordFormat):
    """Messages and sharegpt. Messages behind the last answer are cut: there is nothing in them to learn."""

    rendered = True

    def __init__(self, name: str, chat: ChatTemplate) -> None:
        self.name = name
        self._chat = chat

    @property
    def end_of_turn(self) -> str:
        return self._chat.end_of_turn

    @property
    def template(self) -> Any:
        return self._chat.text

    def example(self, record: Any) -> Example:
        fields = _object(record)
        key = "messages" if self.name == MESSAGES else "conversations"
        messages = list(self._messages(fields, key))
        answers = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
        if not answers:
            raise RecordError(key, "has no message of the assistant: nothing to learn", EMPTY)
        if answers[0] == 0:
            raise RecordError(key, "begins with the assistant: a message of the user must stand before it")
        kept = messages[: answers[-1] + 1]
        spans = self._chat.render_spans(kept, _decoded(fields.get("tools")) or None)
        return Example(tuple(spans), rendered=True, cut=len(messages) - len(kept))

    def prompt(self, text: str, context: str | None = None) -> str:
        messages = [{"role": "system", "content": context}] if context else []
        try:
            return self._chat.render_prompt([*messages, {"role": "user", "content": text}])
        except RecordError as error:
            raise UserError("InvalidPrompt", error.found) from error

    def _messages(self, fields: Mapping[str, Any], key: str) -> Iterator[dict[str, Any]]:
        if key not in fields:
            raise RecordError(key, f"missing; the record has {_names(fields)}")
        messages = _decoded(fields[key])
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise RecordError(key, f"expected a list of messages, found {_type_name(messages)} {_shown(messages)}")
        if not messages:
            raise RecordError(key, "is empty", EMPTY)
        for number, message in enumerate(messages):
            yield self._message(message, f"{key}[{number}]")

    def _message(self, message: Any, place: str) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise RecordError(place, f"expected an object, found {_type_name(message)} {_shown(message)}")
        who, what = ("from", "value") if self.name == SHAREGPT else ("role", "content")
        role = message.get(who)
        roles = _SHAREGPT_ROLES if self.name == SHAREGPT else dict(zip(_ROLES, _ROLES, strict=True))
        if not isinstance(role, str) or role not in roles:
            raise RecordError(f"{place}.{who}", f"expected one of {', '.join(roles)}, found {_shown(role)}")
        # Columns of Parquet have every field in every row, as null where a message has none.
        others = {name: value for name, value in message.items() if value is not None and name not in (who, what)}
        content = message.get(what)
        if content is None and others.get("tool_calls"):
            content = ""
        elif not isinstance(content, str):
            raise RecordError(f"{place}.{what}", f"expected text, found {_type_name(content)} {_shown(content)}")
        elif not content.strip() and not others.get("tool_calls"):
            raise RecordError(f"{place}.{what}", "is empty", EMPTY)
        _check_unicode(f"{place}.{what}", content)
        return {**others, "role": roles[role], "content": content}


# ---- fields


def _object(record: Any) -> Mapping[str, Any]:
    if not isinstance(record, Mapping):
        raise RecordError("", f"expected an object, found {_type_name(record)} {_shown(record)}")
    return record


def _decoded(value: Any) -> Any:
    """A list that a CSV cell, or a column of text, holds as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _text(record: Mapping[str, Any], field: str) -> str:
    if field not in record:
        raise RecordError(field, f"missing; the record has {_names(record)}")
    value = record[field]
    if not isinstance(value, str):
        raise RecordError(field, f"expected text, found {_type_name(value)} {_shown(value)}")
    if not value.strip():
        raise RecordError(field, "is empty", EMPTY)
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
