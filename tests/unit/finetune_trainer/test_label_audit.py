"""The label audit: counts over all documents, samples that are always the same, and what stops a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.errors import UserError
from finetune_trainer.examples import DOUBLE_BOS, Example
from finetune_trainer.label_audit import LabelAudit
from finetune_trainer.rejections import Problem
from finetune_trainer.tokenization import Document, Encoder, load_tokenizer

PLACE = Problem("a.jsonl", 1, field="", found="")
EXAMPLE = Example.of("Who?\n", "I.")


@pytest.fixture(scope="module")
def encoder(tiny_tokenizer: Path) -> Encoder:
    return Encoder(load_tokenizer(tiny_tokenizer))


def document(size: int, learnt: int, *, stops: bool = True) -> Document:
    """`learnt` of `size` tokens are labels, the last among them where it `stops`."""
    end = size if stops else size - 1
    return Document([5] * size, [(end - learnt, end)] if learnt else [], double_bos=False)


def audited(encoder: Encoder, documents: list[Document], chunk: int = 1000) -> tuple[LabelAudit, list[dict[str, Any]]]:
    audit, chunks = LabelAudit(encoder), []
    for number, one in enumerate(documents):
        audit.add(Problem("a.jsonl", number + 1, field="", found=""), number * 7919, EXAMPLE, one)
        if (number + 1) % chunk == 0:
            chunks.append(audit.take_chunk())
    chunks.append(audit.take_chunk())
    return audit, chunks


def test_documents_are_counted_by_the_share_that_is_learnt(encoder: Encoder) -> None:
    audit, _ = audited(encoder, [document(100, 1), document(100, 10), document(100, 11), document(10, 9)])
    assert audit.metrics() == {
        "supervisedPercent": round(100 * 31 / 310, 3),
        "stopSupervisedPercent": 100.0,
        "doubleBos": 0,
        "supervisedHistogram": [2, 1, 0, 0, 0, 0, 0, 0, 1, 0],
    }
    assert audit.violations() == []


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        pytest.param([document(9, 0)] * 3, "none of 27 tokens is learnt", id="nothing is learnt"),
        pytest.param(
            [document(9, 3)] * 98 + [document(9, 3, stops=False)] * 2,
            "98 of 100 documents teach the model to stop, at least 99 % must",
            id="two of a hundred never stop",
        ),
    ],
)
def test_labels_that_must_not_be_trained_on_stop_the_run(
    encoder: Encoder, documents: list[Document], words: str
) -> None:
    audit, _ = audited(encoder, documents)
    with pytest.raises(UserError, match=words) as caught:
        audit.check()
    assert caught.value.reason == "LabelAuditFailed"
    assert any(words in violation for violation in json.loads(audit.as_lines().splitlines()[0])["violations"])


def test_one_of_a_hundred_may_lack_its_end(encoder: Encoder) -> None:
    audit, _ = audited(encoder, [document(9, 3)] * 99 + [document(9, 3, stops=False)])
    audit.check()
    assert audit.metrics()["stopSupervisedPercent"] == 99


def test_a_sample_whose_labels_are_other_characters_stops_the_run(encoder: Encoder) -> None:
    (right,) = encoder.encode_examples([EXAMPLE])
    ((first, end),) = right.learnt
    audit, _ = audited(encoder, [right, Document(right.tokens, [(first - 1, end)], double_bos=False)])
    assert audit.violations() == ["a.jsonl, line 2: its labels are not the characters to be learnt"]


def test_doubled_beginnings_are_counted_though_such_documents_are_refused(encoder: Encoder) -> None:
    audit = LabelAudit(encoder)
    audit.refuse(DOUBLE_BOS)
    audit.refuse("tooLong")
    audit.take_chunk()
    assert (audit.metrics()["doubleBos"], audit.counts.documents) == (1, 0)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(0, 120), chunk=st.integers(1, 50), killed_after=st.integers(0, 5))
def test_a_resumed_audit_is_the_same_to_the_byte(encoder: Encoder, count: int, chunk: int, killed_after: int) -> None:
    documents = [document(9, 1 + number % 8) for number in range(count)]
    whole, chunks = audited(encoder, documents, chunk)
    resumed = LabelAudit(encoder)
    for some in chunks[:killed_after]:
        resumed.add_chunk(json.loads(json.dumps(some)))
    for number in range(min(count, killed_after * chunk), count):
        resumed.add(Problem("a.jsonl", number + 1, field="", found=""), number * 7919, EXAMPLE, documents[number])
        if (number + 1) % chunk == 0:
            resumed.take_chunk()
    resumed.take_chunk()
    assert resumed.as_lines() == whole.as_lines()
    assert len(whole.samples) == min(count, 20)
    assert whole.samples == sorted(whole.samples, key=lambda sample: sample["line"])


def test_a_sample_shows_the_tokens_in_spans(encoder: Encoder) -> None:
    (one,) = encoder.encode_examples([EXAMPLE])
    audit, _ = audited(encoder, [one])
    (sample,) = audit.samples
    assert [(span["text"], span["learnt"]) for span in sample["spans"]] == [("<s>Who?\n", False), ("I.</s>", True)]
    assert [token for span in sample["spans"] for token in span["tokens"]] == one.tokens
    assert (sample["file"], sample["line"], sample["offsets"]) == ("a.jsonl", 1, "same")
