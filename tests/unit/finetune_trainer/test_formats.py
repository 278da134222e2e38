"""The exact strings that the model sees, and what is said of a record that does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_trainer.errors import UserError
from finetune_trainer.formats import Example, RecordError, build_example, build_prompt


@pytest.mark.parametrize(
    ("format_name", "record", "expected"),
    [
        pytest.param(
            "dolly",
            {"instruction": "Who?", "context": "", "response": "I.", "category": "qa"},
            Example("### Instruction\nWho?\n\n### Answer\n", "I."),
            id="dolly without context",
        ),
        pytest.param(
            "dolly",
            {"instruction": "Who?", "context": "We are here.", "response": "I."},
            Example("### Instruction\nWho?\n\n### Context\nWe are here.\n\n### Answer\n", "I."),
            id="dolly with context",
        ),
        pytest.param(
            "dolly",
            {"instruction": "Who?", "response": "I."},
            Example("### Instruction\nWho?\n\n### Answer\n", "I."),
            id="dolly whose context field is missing",
        ),
        pytest.param(
            "samsum",
            {"id": "1", "dialogue": "A: Hi\r\nB: Hi", "summary": "They greet."},
            Example("Summarize the chat dialogue:\nA: Hi\r\nB: Hi\n---\nSummary:\n", "They greet."),
            id="samsum",
        ),
        pytest.param(
            "promptCompletion", {"prompt": "1+1=", "completion": "2"}, Example("1+1=", "2"), id="prompt and completion"
        ),
    ],
)
def test_records_become_examples(format_name: str, record: dict[str, Any], expected: Example) -> None:
    assert build_example(format_name, record) == expected


@pytest.mark.parametrize(
    ("format_name", "text", "context"),
    [
        pytest.param("dolly", "Who?", None, id="dolly without context"),
        pytest.param("dolly", "Who?", "We.", id="dolly with context"),
        pytest.param("dolly", "Who?", " \n", id="dolly with a blank context"),
        pytest.param("samsum", "A: Hi", None, id="samsum"),
        pytest.param("promptCompletion", "1+1=", None, id="prompt and completion"),
    ],
)
def test_evaluation_asks_with_the_string_that_was_trained(format_name: str, text: str, context: str | None) -> None:
    names = {"dolly": ("instruction", "response"), "samsum": ("dialogue", "summary")}
    question, answer = names.get(format_name, ("prompt", "completion"))
    record = {question: text, "context": context, answer: "x"}
    assert build_prompt(format_name, text, context) == build_example(format_name, record).prompt


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
    ],
)
def test_a_record_that_does_not_fit_is_told_by_field(format_name: str, record: Any, field: str, found: str) -> None:
    with pytest.raises(RecordError) as caught:
        build_example(format_name, record)
    assert caught.value.field == field
    assert found in caught.value.found
    assert len(caught.value.found) < 200


def test_only_dolly_has_a_context() -> None:
    with pytest.raises(UserError, match="format samsum has no context, got 'c'"):
        build_prompt("samsum", "x", "c")


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="'chat' is not available: use one of dolly, samsum, promptCompletion"):
        build_prompt("chat", "x")
