"""The exact strings that the model sees, and what is said of a record that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, MISTRAL, chat_tokenizer

from finetune_trainer.errors import UserError
from finetune_trainer.examples import Example, RecordError, Span
from finetune_trainer.formats import FORMATS, RecordFormat, build_prompt, open_format

TEMPLATE = {"prompt": "Question: {question}\n{{as JSON}} {tags}\nAnswer: ", "completion": "{answer}!"}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nWho?\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nWho?\n\n### Input:\nWe.\n\n### Response:\n"
)


def learnt(text: str) -> Span:
    return Span(text, learnt=True)


def read(text: str) -> Span:
    return Span(text, learnt=False)


@pytest.fixture(scope="module")
def chatml(tiny_tokenizer: Path) -> Any:
    return chat_tokenizer(tiny_tokenizer, CHATML)


@pytest.fixture(scope="module")
def formats(chatml: Any) -> dict[str, RecordFormat]:
    return {name: open_format(name, template=TEMPLATE, tokenizer=chatml) for name in FORMATS}


@pytest.mark.parametrize(
    ("format_name", "record", "expected"),
    [
        pytest.param(
            "dolly",
            {"instruction": "Who?", "context": "", "response": "I.", "category": "qa"},
            Example.of("### Instruction\nWho?\n\n### Answer\n", "I."),
            id="dolly without context",
        ),
        pytest.param(
            "dolly",
            {"instruction": "Who?", "context": "We are here.", "response": "I."},
            Example.of("### Instruction\nWho?\n\n### Context\nWe are here.\n\n### Answer\n", "I."),
            id="dolly with context",
        ),
        pytest.param(
            "dolly",
            {"instruction": "Who?", "response": "I."},
            Example.of("### Instruction\nWho?\n\n### Answer\n", "I."),
            id="dolly whose context field is missing",
        ),
        pytest.param(
            "alpaca", {"instruction": "Who?", "input": "", "output": "I."}, Example.of(ALPACA, "I."), id="alpaca"
        ),
        pytest.param(
            "alpaca",
            {"instruction": "Who?", "input": "We.", "output": "I."},
            Example.of(ALPACA_WITH_INPUT, "I."),
            id="alpaca with input",
        ),
        pytest.param(
            "samsum",
            {"id": "1", "dialogue": "A: Hi\r\nB: Hi", "summary": "They greet."},
            Example.of("Summarize the chat dialogue:\nA: Hi\r\nB: Hi\n---\nSummary:\n", "They greet."),
            id="samsum",
        ),
        pytest.param(
            "promptCompletion",
            {"prompt": "1+1=", "completion": "2"},
            Example.of("1+1=", "2"),
            id="prompt and completion",
        ),
        pytest.param("text", {"text": "All of it."}, Example((learnt("All of it."),)), id="text"),
        pytest.param(
            "template",
            {"question": "Who {a}?", "tags": ["x", 1], "answer": "I"},
            Example.of('Question: Who {a}?\n{as JSON} ["x", 1]\nAnswer: ', "I!"),
            id="a template",
        ),
        pytest.param(
            "messages",
            {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]},
            Example(
                (read("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"), learnt("I.<|im_end|>")),
                rendered=True,
            ),
            id="a question and its answer",
        ),
        pytest.param(
            "messages",
            {
                "messages": [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "A", "name": None},
                    {"role": "assistant", "content": "B"},
                    {"role": "user", "content": "C"},
                    {"role": "assistant", "content": "D <|im_end|> E"},
                    {"role": "user", "content": "F"},
                ]
            },
            Example(
                (
                    read("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n"),
                    learnt("B<|im_end|>"),
                    read("\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n"),
                    learnt("D <|im_end|> E<|im_end|>"),
                ),
                rendered=True,
                cut=1,
            ),
            id="several turns, the last without an answer",
        ),
        pytest.param(
            "messages",
            {"messages": json.dumps([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}])},
            Example(
                (read("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"), learnt("I.<|im_end|>")),
                rendered=True,
            ),
            id="messages as JSON in a cell of CSV",
        ),
        pytest.param(
            "messages",
            {
                "messages": [
                    {"role": "user", "content": "Who?"},
                    {"role": "assistant", "content": None, "tool_calls": [{"name": "ask"}]},
                    {"role": "tool", "content": "Amy"},
                    {"role": "assistant", "content": "Amy."},
                ],
                "tools": '[{"type": "function", "function": {"name": "ask"}}]',
            },
            Example(
                (
                    read("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"),
                    learnt("<|im_end|>"),
                    read("\n<|im_start|>tool\nAmy<|im_end|>\n<|im_start|>assistant\n"),
                    learnt("Amy.<|im_end|>"),
                ),
                rendered=True,
            ),
            id="a call of a tool without words",
        ),
        pytest.param(
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": "Who?"},
                    {"from": "gpt", "value": "I."},
                ]
            },
            Example(
                (
                    read("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"),
                    learnt("I.<|im_end|>"),
                ),
                rendered=True,
            ),
            id="sharegpt",
        ),
    ],
)
def test_records_become_examples(
    formats: dict[str, RecordFormat], format_name: str, record: dict[str, Any], expected: Example
) -> None:
    assert formats[format_name].example(record) == expected


@pytest.mark.parametrize(
    ("format_name", "record", "text", "context"),
    [
        pytest.param("dolly", {"instruction": "Who?", "response": "x"}, "Who?", None, id="dolly without context"),
        pytest.param(
            "dolly", {"instruction": "Who?", "context": "We.", "response": "x"}, "Who?", "We.", id="dolly with context"
        ),
        pytest.param(
            "dolly", {"instruction": "Who?", "context": " \n", "response": "x"}, "Who?", " \n", id="a blank context"
        ),
        pytest.param("alpaca", {"instruction": "a", "input": "b", "output": "x"}, "a", "b", id="alpaca with input"),
        pytest.param("samsum", {"dialogue": "A: Hi", "summary": "x"}, "A: Hi", None, id="samsum"),
        pytest.param("promptCompletion", {"prompt": "1+1=", "completion": "x"}, "1+1=", None, id="promptCompletion"),
        pytest.param("template", {"question": "Who?", "tags": "t", "answer": "x"}, "Who?", "t", id="a template"),
        pytest.param(
            "messages",
            {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "x"}]},
            "Who?",
            None,
            id="messages",
        ),
        pytest.param(
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": "Who?"},
                    {"from": "gpt", "value": "x"},
                ]
            },
            "Who?",
            "S",
            id="sharegpt with a system message",
        ),
    ],
)
def test_evaluation_asks_with_the_string_that_was_trained(
    formats: dict[str, RecordFormat], format_name: str, record: dict[str, Any], text: str, context: str | None
) -> None:
    record_format = formats[format_name]
    asked, _ = record_format.example(record).spans
    assert record_format.prompt(text, context) == asked.text
    assert not asked.learnt


CHAT = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}


@pytest.mark.parametrize(
    ("format_name", "record", "field", "found"),
    [
        pytest.param(
            "dolly", {"response": "x"}, "instruction", "missing; the record has response", id="a field is missing"
        ),
        pytest.param(
            "dolly", {"instruction": "x", "response": 7}, "response", "expected text, found a number 7", id="a number"
        ),
        pytest.param("dolly", {"instruction": " ", "response": "x"}, "instruction", "is empty", id="a blank field"),
        pytest.param(
            "dolly",
            {"instruction": "x", "context": [], "response": "x"},
            "context",
            "found a list []",
            id="a list as context",
        ),
        pytest.param("samsum", {"dialogue": None, "summary": "x"}, "dialogue", "found null None", id="null"),
        pytest.param("samsum", ["x"], "", "expected an object, found a list ['x']", id="no object"),
        pytest.param("samsum", {}, "dialogue", "the record has no fields", id="an empty object"),
        pytest.param("samsum", {"\ud83d": 1}, "dialogue", "has \\ud83d", id="half a character in a name"),
        pytest.param("samsum", {"x" * 999: 1}, "dialogue", "x…", id="a long name is shortened"),
        pytest.param("text", {"content": "x"}, "text", "missing", id="no text"),
        pytest.param(
            "template",
            {"question": "x", "answer": "y"},
            "tags",
            "missing, spec.dataset.template.prompt needs it; the record has question, answer",
            id="a field of the template is missing",
        ),
        pytest.param(
            "template",
            {"question": "x", "tags": None, "answer": " "},
            "answer",
            "is empty: there is no answer",
            id="no answer",
        ),
        pytest.param(
            "promptCompletion",
            {"prompt": "x", "completion": "\ud83d"},
            "completion",
            "surrogate",
            id="half a character",
        ),
        pytest.param(
            "promptCompletion",
            {"prompt": 5 * [80 * "x"], "completion": ""},
            "prompt",
            "…",
            id="a long value is shortened",
        ),
        pytest.param("messages", {"conversations": []}, "messages", "missing", id="no messages"),
        pytest.param("messages", {"messages": []}, "messages", "is empty", id="an empty list"),
        pytest.param("messages", {"messages": "hello"}, "messages", "expected a list of messages", id="text"),
        pytest.param("messages", {"messages": ["x"]}, "messages[0]", "expected an object", id="a message of text"),
        pytest.param(
            "messages",
            {"messages": [{"role": "bot", "content": "x"}]},
            "messages[0].role",
            "expected one of system, developer, user, assistant, tool, found 'bot'",
            id="an unknown role",
        ),
        pytest.param(
            "messages",
            {"messages": [CHAT["messages"][0], {"role": "assistant", "content": None}]},
            "messages[1].content",
            "expected text, found null",
            id="no content",
        ),
        pytest.param(
            "messages",
            {"messages": [CHAT["messages"][0], {"role": "assistant", "content": " "}]},
            "messages[1].content",
            "is empty",
            id="a blank answer",
        ),
        pytest.param(
            "messages", {"messages": CHAT["messages"][:1]}, "messages", "nothing to learn", id="no answer at all"
        ),
        pytest.param(
            "messages", {"messages": CHAT["messages"][1:]}, "messages", "begins with the assistant", id="no question"
        ),
        pytest.param(
            "sharegpt",
            {"conversations": [{"from": "user ", "value": "x"}]},
            "conversations[0].from",
            "expected",
            id="from",
        ),
    ],
)
def test_a_record_that_does_not_fit_is_told_by_field(
    formats: dict[str, RecordFormat], format_name: str, record: Any, field: str, found: str
) -> None:
    with pytest.raises(RecordError) as caught:
        formats[format_name].example(record)
    assert caught.value.field == field
    assert found in caught.value.found
    assert len(caught.value.found) < 200


@pytest.mark.parametrize("format_name", ["samsum", "promptCompletion", "text"])
def test_a_context_is_refused_where_there_is_no_place_for_it(format_name: str) -> None:
    with pytest.raises(UserError, match=f"format {format_name} has no context, got 'c'"):
        build_prompt(format_name, "x", "c")


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="'chat' is not available: use one of dolly, samsum, promptCompletion"):
        build_prompt("chat", "x")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        pytest.param({"prompt": "{a", "completion": "{b}"}, r"template.prompt is '\{a'.*doubled", id="an open brace"),
        pytest.param({"prompt": "{a}", "completion": "}"}, "template.completion is", id="a closing brace"),
        pytest.param({"prompt": "{a.b}", "completion": "{b}"}, "by its name alone", id="an attribute"),
        pytest.param({"prompt": "{}", "completion": "{b}"}, "by its name alone", id="no name"),
        pytest.param({"prompt": "{a!r:>9}", "completion": "{b}"}, "by its name alone", id="a conversion"),
        pytest.param({"prompt": "{a}"}, "template.completion is empty", id="no completion"),
    ],
)
def test_a_template_that_is_none_is_refused(template: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_format("template", template=template)


def test_a_prompt_that_does_not_fill_the_template_names_its_fields() -> None:
    three = open_format("template", template={"prompt": "{context} {a} {b}", "completion": "{c}"})
    with pytest.raises(UserError, match=r"has 3 fields \(a, b, context\).*gave 1 values"):
        three.prompt("x")
    two = open_format("template", template={"prompt": "{context}: {a}", "completion": "{c}"})
    assert two.prompt("question", "place") == "place: question"


def test_equal_formats_have_equal_prompt_digests_and_others_do_not(tiny_tokenizer: Path, chatml: Any) -> None:
    digests = [
        open_format("dolly").prompt_digest(),
        open_format("alpaca").prompt_digest(),
        open_format("template", template=TEMPLATE).prompt_digest(),
        open_format("template", template={**TEMPLATE, "prompt": "{question}{tags}"}).prompt_digest(),
        open_format("template", template={**TEMPLATE, "prompt": "{a}{b}{c}"}).prompt_digest(),
        open_format("template", template={**TEMPLATE, "prompt": "{a} {b}{c}"}).prompt_digest(),
        open_format("messages", tokenizer=chatml).prompt_digest(),
        open_format("messages", tokenizer=chat_tokenizer(tiny_tokenizer, MISTRAL)).prompt_digest(),
    ]
    assert len(set(digests)) == len(digests)
    assert open_format("messages", tokenizer=chat_tokenizer(tiny_tokenizer, CHATML)).prompt_digest() == digests[-2]
