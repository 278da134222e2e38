"""A tokenizer's own chat template: what a conversation reads like, and which of it the assistant wrote.

formats.py renders conversations here, for training and for evaluation's prompts alike. Spans come from rendering again
and again: up to an answer, with the words that ask for it, and up to its end. Each of these has to be the beginning of
the whole, else the template shows a model that answers something else than the one that learns, and the record is
refused with the place where the two differ.

Templates come with models and are not trusted: transformers renders them in jinja's sandbox. One that asks for the date
gets FROZEN_DATE, so that a re-run gives the same bytes and evaluation asks what was trained.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_trainer.errors import UserError
from finetune_trainer.examples import TEMPLATE, RecordError, Span

ASSISTANT = "assistant"
FROZEN_DATE = datetime.date(2024, 7, 26)
"""What templates that print today's date get; it is what Llama 3's own falls back to."""

_QUESTION, _ANSWER = "probe-question", "probe-answer"
_SHOWN = 40
"""Characters on each side of a difference that a message shows."""

Message = Mapping[str, Any]


class ChatTemplate:
    """The chat template of `tokenizer`.

    `end_of_turn` is the special token that it writes behind an answer, "" where it writes none. UserError when there is
    no template, or a question and an answer cannot be rendered by it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise UserError(
                "NoChatTemplate",
                "the model's tokenizer has no chat template, so nobody knows what a conversation reads like: use the "
                "model's instruct or chat variant, put a chat_template.jinja beside its tokenizer, or choose a "
                "spec.dataset.format without conversations, such as template",
            )
        try:
            self.text: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError("ChatTemplateNotUsable", f"the model has several chat templates: {error}") from error
        self._globals = {**tokenizer.special_tokens_map, "strftime_now": FROZEN_DATE.strftime}
        try:
            self.end_of_turn = self._find_end_of_turn()
        except RecordError as error:
            raise UserError(
                "ChatTemplateNotUsable", f"the chat template cannot be used, one question and its answer: {error.found}"
            ) from error

    def render_prompt(self, messages: Sequence[Message], tools: Any = None) -> str:
        """What the model reads before it answers; RecordError when the template refuses the conversation."""
        return self._render(messages, tools, asks=True)

    def render_spans(self, messages: Sequence[Message], tools: Any = None) -> list[Span]:
        """The whole conversation up to the end of its last answer, which is its last message.

        Learnt is each answer with the end of turn behind it. RecordError when the template refuses the conversation, or
        when what it renders before or up to an answer is not how the whole begins.
        """
        whole = self._render(messages, tools, asks=False)
        spans: list[Span] = []
        done = 0
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            start = self._beginning(whole, messages[:number], tools, asks=True)
            end = len(whole)
            if number + 1 < len(messages):
                end = self._beginning(whole, messages[: number + 1], tools, asks=False)
            stop = whole.rfind(self.end_of_turn, start, end) if self.end_of_turn else -1
            if stop >= 0:
                end = stop + len(self.end_of_turn)
            _append(spans, whole[done:start], learnt=False)
            _append(spans, whole[start:end], learnt=True)
            done = end
        return spans

    def _render(self, messages: Sequence[Message], tools: Any, *, asks: bool) -> str:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            # What apply_chat_template calls; that looks up every special token anew, which takes as long again.
            (text,), _ = render_jinja_template(
                [list(messages)], tools=tools, chat_template=self.text, add_generation_prompt=asks, **self._globals
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise RecordError("", f"the chat template refuses it: {error}", TEMPLATE) from error
        return str(text)

    def _beginning(self, whole: str, messages: Sequence[Message], tools: Any, *, asks: bool) -> int:
        part = self._render(messages, tools, asks=asks)
        if whole.startswith(part):
            return len(part)
        place = next(
            (index for index, (one, other) in enumerate(zip(part, whole, strict=False)) if one != other),
            min(len(part), len(whole)),
        )
        near = slice(max(0, place - _SHOWN), place + _SHOWN)
        what = "before the answer" if asks else "up to the end of the answer"
        raise RecordError(
            "",
            f"the chat template renders the first {len(messages)} messages, {what}, otherwise than within the whole "
            f"conversation; they differ from character {place} on: {part[near]!r} and {whole[near]!r}: leave out "
            "earlier answers, or use a model whose template does not change them",
            TEMPLATE,
        )

    def _find_end_of_turn(self) -> str:
        question = {"role": "user", "content": _QUESTION}
        whole = self._render([question, {"role": ASSISTANT, "content": _ANSWER}], None, asks=False)
        self._beginning(whole, [question], None, asks=True)
        place = whole.rfind(_ANSWER)
        if place < 0:
            raise RecordError("", "it leaves out what the assistant says", TEMPLATE)
        tokens = {token.content for token in self._tokenizer.added_tokens_decoder.values()}
        words = sorted(map(re.escape, tokens), key=len, reverse=True)
        found = re.search("|".join(words), whole[place + len(_ANSWER) :]) if words else None
        return found[0] if found else ""


def _append(spans: list[Span], text: str, *, learnt: bool) -> None:
    """One more span, or more of the last where that is alike."""
    if spans and spans[-1].learnt == learnt:
        text = spans.pop().text + text
    if text:
        spans.append(Span(text, learnt))
