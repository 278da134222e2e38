"""Chat templates: what of a conversation is the assistant's, and which templates show a model something else later."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, DATED, MISTRAL, PLAIN, THINKING, chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.chat import ChatTemplate
from finetune_trainer.errors import UserError
from finetune_trainer.examples import RecordError
from finetune_trainer.formats import open_format
from finetune_trainer.label_audit import compare_offsets
from finetune_trainer.tokenization import Encoder


def turns(*contents: str) -> list[dict[str, Any]]:
    """A conversation whose turns are the user's and the assistant's by turns."""
    return [
        {"role": "assistant" if number % 2 else "user", "content": content} for number, content in enumerate(contents)
    ]


@pytest.mark.parametrize(
    ("template", "end_of_turn"),
    [
        pytest.param(CHATML, "<|im_end|>", id="a token of its own"),
        pytest.param(MISTRAL, "</s>", id="the end of sequence"),
        pytest.param(PLAIN, "", id="none"),
    ],
)
def test_the_token_that_ends_a_turn_is_told_from_the_template(
    tiny_tokenizer: Path, template: str, end_of_turn: str
) -> None:
    assert ChatTemplate(chat_tokenizer(tiny_tokenizer, template)).end_of_turn == end_of_turn


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        pytest.param(
            MISTRAL,
            [("<s>[INST] A [/INST]", False), (" B</s>", True), ("[INST] C [/INST]", False), (" D</s>", True)],
            id="the end of sequence ends each answer",
        ),
        pytest.param(
            PLAIN,
            [("user: A\nassistant: ", False), ("B\n", True), ("user: C\nassistant: ", False), ("D\n</s>", True)],
            id="no token ends a turn, the end of sequence ends the last",
        ),
        pytest.param(
            CHATML,
            [
                ("<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n", False),
                ("B<|im_end|>", True),
                ("\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n", False),
                ("D<|im_end|>", True),
            ],
            id="the template's own token ends each answer",
        ),
    ],
)
def test_every_answer_is_learnt_with_its_end_and_nothing_else(
    tiny_tokenizer: Path, template: str, expected: list[tuple[str, bool]]
) -> None:
    tokenizer = chat_tokenizer(tiny_tokenizer, template)
    record_format = open_format("messages", tokenizer=tokenizer)
    encoder = Encoder(tokenizer, record_format.end_of_turn)
    (document,) = encoder.encode_examples([record_format.example({"messages": turns("A", "B", "C", "D")})])
    bounds = [0, *(bound for run in document.learnt for bound in run)]
    runs = [encoder.decode(document.tokens[first:end]) for first, end in pairwise(bounds)]
    assert list(zip(runs, [False, True] * 2, strict=True)) == expected
    assert bounds[-1] == len(document.tokens)
    assert not document.double_bos


contents = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=50, deadline=None)
@given(said=st.lists(contents, min_size=2, max_size=6).filter(lambda said: len(said) % 2 == 0))
def test_each_answer_is_asked_for_as_it_will_be_served(tiny_chat: Any, said: list[str]) -> None:
    """Pains of other trainers: masks that miss the answer, and prompts that are rendered otherwise when serving."""
    tokenizer, record_format = tiny_chat
    messages = turns(*said)
    example = record_format.example({"messages": messages})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(example.text)
    position, answer = 0, 0
    for span in example.spans:
        if span.learnt:
            answer += 1
            asked = tokenizer.apply_chat_template(
                messages[: 2 * answer - 1], tokenize=False, add_generation_prompt=True
            )
            assert example.text[:position] == asked
            assert span.text == said[2 * answer - 1] + "<|im_end|>"
        position += len(span.text)
    assert answer == len(said) // 2
    assert record_format.prompt(said[0]) == example.spans[0].text
    encoder = Encoder(tokenizer, record_format.end_of_turn)
    (document,) = encoder.encode_examples([example])
    assert compare_offsets(encoder, example, document) != "wrong"
    assert document.learns_to_stop


@pytest.fixture(scope="module")
def tiny_chat(tiny_tokenizer: Path) -> Any:
    tokenizer = chat_tokenizer(tiny_tokenizer, CHATML)
    return tokenizer, open_format("messages", tokenizer=tokenizer)


def test_a_template_that_changes_earlier_answers_is_refused_with_the_place(tiny_tokenizer: Path) -> None:
    chat = ChatTemplate(chat_tokenizer(tiny_tokenizer, THINKING))
    assert len(chat.render_spans(turns("A", "<think>hm</think>B"))) == 2
    with pytest.raises(RecordError) as caught:
        chat.render_spans(turns("A", "<think>hm</think>B", "C", "D"))
    assert "the first 2 messages, up to the end of the answer" in caught.value.found
    assert "assistant\\n<think>hm</think>B<|im_end|>\\n' and '" in caught.value.found
    assert "assistant\\nB<|im_end|>\\n" in caught.value.found
    assert caught.value.kind == "chatTemplate"


def test_a_model_without_a_chat_template_is_told_with_the_remedy(tiny_tokenizer: Path) -> None:
    with pytest.raises(UserError, match="no chat template.*instruct or chat variant.*spec.dataset.format") as caught:
        open_format("messages", tokenizer=chat_tokenizer(tiny_tokenizer, None))
    assert caught.value.reason == "NoChatTemplate"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        pytest.param("{{ messages", "unexpected end of template", id="a syntax error"),
        pytest.param("{{ messages[0]['content'] }}", "leaves out what the assistant says", id="questions only"),
        pytest.param("{{ raise_exception('no chat here') }}", "no chat here", id="one that always refuses"),
        pytest.param(
            "{% if add_generation_prompt %}ask{% endif %}{{ messages[-1]['content'] }}",
            "differ from character 0",
            id="a prompt that is no beginning of the text",
        ),
        pytest.param(
            "{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe", id="one that leaves the sandbox"
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_told_before_any_record(
    tiny_tokenizer: Path, template: str, words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        ChatTemplate(chat_tokenizer(tiny_tokenizer, template))
    assert caught.value.reason == "ChatTemplateNotUsable"


def test_a_conversation_that_the_template_refuses_is_a_wrong_record(tiny_tokenizer: Path) -> None:
    chat = ChatTemplate(chat_tokenizer(tiny_tokenizer, MISTRAL))
    with pytest.raises(RecordError, match="refuses it: Roles must alternate"):
        chat.render_spans([*turns("A"), *turns("B", "C")])


def test_a_template_that_asks_for_the_date_gets_always_the_same(tiny_tokenizer: Path) -> None:
    chat = ChatTemplate(chat_tokenizer(tiny_tokenizer, DATED))
    assert chat.render_prompt(turns("A")).startswith("Today is 26 Jul 2024.\n")
