"""Tokens, and which of them are labels: to the character what is to be learnt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.errors import UserError
from finetune_trainer.examples import Example, Span
from finetune_trainer.label_audit import APART, SAME, WRONG, compare_offsets
from finetune_trainer.tokenization import Document, Encoder, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Any:
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer)


def change(source: Path, target: Path, name: str, **values: Any) -> Path:
    """A copy of the tokenizer folder with some fields of one file changed; None removes a field."""
    shutil.copytree(source, target)
    config = json.loads((target / name).read_text()) | values
    (target / name).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return target


def labelled(tokenizer: Any, document: Document) -> list[tuple[str, bool]]:
    """The document's text in runs of tokens that are labels or not."""
    runs: list[tuple[list[int], bool]] = []
    for number, token in enumerate(document.tokens):
        learnt = any(first <= number < end for first, end in document.learnt)
        if not runs or runs[-1][1] != learnt:
            runs.append(([], learnt))
        runs[-1][0].append(token)
    return [(tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False), learnt) for ids, learnt in runs]


def test_a_document_is_prefix_text_and_end(encoder: Encoder, tokenizer: Any) -> None:
    (document,) = encoder.encode_examples([Example.of("Who?\n", "Paris.")])
    assert document.tokens[0] == tokenizer.bos_token_id
    assert document.tokens[-1] == tokenizer.eos_token_id
    assert labelled(tokenizer, document) == [("<s>Who?\n", False), ("Paris.</s>", True)]
    assert document.learns_to_stop


def test_prompts_are_encoded_as_the_tokenizer_itself_does(encoder: Encoder, tokenizer: Any) -> None:
    prompts = ["### Instruction\nWho?\n\n### Answer\n", "é\u4e2d  x"]
    assert encoder.encode_prompts(prompts) == [tokenizer(prompt).input_ids for prompt in prompts]


texts = st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(pieces=texts, learnt_first=st.booleans(), rendered=st.booleans())
def test_supervised_characters_are_the_learnt_spans(
    encoder: Encoder, tokenizer: Any, pieces: list[str], learnt_first: bool, rendered: bool
) -> None:
    spans = [Span(text, learnt=(number % 2 == 0) == learnt_first) for number, text in enumerate(pieces)]
    if not spans[-1].learnt:
        spans.append(Span("end", learnt=True))
    (document,) = encoder.encode_examples([Example(tuple(spans), rendered=rendered)])
    expected = [(span.text, span.learnt) for span in spans]
    expected[-1] = (expected[-1][0] + "</s>", True)
    if not rendered:
        assert document.tokens[0] == tokenizer.bos_token_id
        document = Document(
            document.tokens[1:], [(first - 1, end - 1) for first, end in document.learnt], document.double_bos
        )
    elif learnt_first:
        # nothing is there that the first token could be learnt from
        assert document.learnt[0][0] == 1
        document = Document(document.tokens, [(0, document.learnt[0][1]), *document.learnt[1:]], False)
    assert labelled(tokenizer, document) == expected
    assert document.supervised == sum(end - first for first, end in document.learnt)
    assert document.learns_to_stop


@settings(max_examples=200, deadline=None)
@given(prompt=st.text(min_size=1, max_size=30), completion=st.text(min_size=1, max_size=30))
def test_an_answer_stands_after_the_prompts_own_tokens(encoder: Encoder, prompt: str, completion: str) -> None:
    (document,) = encoder.encode_examples([Example.of(prompt, completion)])
    ((first, end),) = document.learnt
    assert [document.tokens[:first]] == encoder.encode_prompts([prompt])
    assert end == len(document.tokens)
    assert document.tokens.count(encoder.eos_token_id) == 1


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.from_regex(r"[a-z ]{0,20}\n", fullmatch=True),
    completion=st.from_regex(r"[A-Za-z]{1,10}[a-z .]{0,20}", fullmatch=True),
)
def test_labels_agree_with_character_offsets(encoder: Encoder, prompt: str, completion: str) -> None:
    example = Example.of(prompt, completion)
    (document,) = encoder.encode_examples([example])
    # a line's end is a boundary of its own for this tokenizer
    assert compare_offsets(encoder, example, document) == SAME


def test_a_token_across_the_boundary_splits_the_text_there(encoder: Encoder, tokenizer: Any) -> None:
    # " France" begins with the space that ends the prompt
    example = Example.of("The capital of France is ", "France")
    (document,) = encoder.encode_examples([example])
    assert labelled(tokenizer, document) == [("<s>The capital of France is ", False), ("France</s>", True)]
    assert compare_offsets(encoder, example, document) == APART


def test_labels_that_are_not_the_characters_to_be_learnt_are_noticed(encoder: Encoder) -> None:
    example = Example.of("Who?\n", "Paris.")
    (document,) = encoder.encode_examples([example])
    ((first, end),) = document.learnt
    shifted = Document(document.tokens, [(first + 1, end)], double_bos=False)
    assert compare_offsets(encoder, example, shifted) == WRONG


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_an_answer_gets_no_space_from_a_tokenizer_that_begins_texts_with_one(
    tiny_tokenizer: Path, tmp_path: Path, scheme: str
) -> None:
    # Llama 2's and Mistral's way: a text begins with a space of its own, and spaces are a visible character
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    folder = change(tiny_tokenizer, tmp_path / "t", "tokenizer.json", pre_tokenizer=metaspace, decoder=metaspace)
    config = json.loads((folder / "tokenizer.json").read_text())
    config["model"].update(vocab={"<s>": 0, "</s>": 1, "<pad>": 2, "▁": 3, "\n": 4, "a": 5, "b": 6}, merges=[])
    (folder / "tokenizer.json").write_text(json.dumps(config))
    encoder = Encoder(load_tokenizer(folder))
    (document,) = encoder.encode_examples([Example.of("a\n", "b a")])
    assert document.tokens == [0, 3, 5, 4, 6, 3, 5, 1]
    assert document.learnt == [(4, 8)]


def test_an_end_token_in_the_text_is_not_doubled(encoder: Encoder, tokenizer: Any) -> None:
    (document,) = encoder.encode_examples([Example.of("a", "b</s>")])
    assert document.tokens.count(tokenizer.eos_token_id) == 1
    assert document.learns_to_stop


def test_the_end_is_learnt_where_it_is_also_the_padding_token(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """Other trainers tell padding by its token, and so never teach the model to stop."""
    folder = change(tiny_tokenizer, tmp_path / "t", "tokenizer_config.json", pad_token="</s>")
    (folder / "special_tokens_map.json").unlink()
    encoder = Encoder(load_tokenizer(folder))
    assert encoder.pad_token_id == encoder.eos_token_id
    (document,) = encoder.encode_examples([Example.of("a", "b")])
    assert document.tokens[-1] == encoder.eos_token_id
    assert document.learns_to_stop


def test_a_turn_that_ends_in_its_own_token_has_no_end_of_sequence_behind_it(tiny_tokenizer: Path) -> None:
    tokenizer = chat_tokenizer(tiny_tokenizer, CHATML)
    encoder = Encoder(tokenizer, "<|im_end|>")
    (document,) = encoder.encode_examples([Example.of("<|im_start|>a", "b<|im_end|>")])
    assert tokenizer.convert_ids_to_tokens(document.tokens[-1]) == "<|im_end|>"
    assert encoder.stop_token_ids == {tokenizer.eos_token_id, document.tokens[-1]}
    assert document.learns_to_stop


@pytest.mark.parametrize(
    ("example", "doubled"),
    [
        pytest.param(Example.of("<s>Who?", "I."), True, id="a prompt with its own"),
        pytest.param(Example.of("Who?<s>", "I."), False, id="one inside is text"),
        pytest.param(Example((Span("<s>Who?", False), Span("I.", True)), rendered=True), False, id="a template's"),
        pytest.param(
            Example((Span("<s><s>Who?", False), Span("I.", True)), rendered=True), True, id="a template's two"
        ),
    ],
)
def test_a_doubled_beginning_is_noticed(encoder: Encoder, example: Example, doubled: bool) -> None:
    (document,) = encoder.encode_examples([example])
    assert document.double_bos is doubled


def test_a_tokenizer_that_puts_nothing_in_front_has_no_prefix(tiny_tokenizer: Path, tmp_path: Path) -> None:
    encoder = Encoder(load_tokenizer(change(tiny_tokenizer, tmp_path / "t", "tokenizer.json", post_processor=None)))
    assert encoder.prefix == []
    assert not encoder.encode_examples([Example.of("<s>a", "b")])[0].double_bos


def test_a_tokenizer_that_cuts_and_pads_by_itself_is_kept_from_it(tiny_tokenizer: Path, tmp_path: Path) -> None:
    cutting = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    folder = change(tiny_tokenizer, tmp_path / "t", "tokenizer.json", truncation=cutting, padding=padding)
    (tokens,) = Encoder(load_tokenizer(folder)).encode_prompts(["q" * 20])
    assert len(tokens) == 21


def test_without_a_padding_token_the_end_token_pads(tiny_tokenizer: Path, tmp_path: Path) -> None:
    folder = change(tiny_tokenizer, tmp_path / "t", "tokenizer_config.json", pad_token=None)
    (folder / "special_tokens_map.json").unlink()
    encoder = Encoder(load_tokenizer(folder))
    assert encoder.pad_token_id == encoder.eos_token_id


def test_a_tokenizer_without_an_end_token_is_refused(tiny_tokenizer: Path, tmp_path: Path) -> None:
    folder = change(tiny_tokenizer, tmp_path / "t", "tokenizer_config.json", eos_token=None)
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(UserError, match="never learn to stop"):
        load_tokenizer(folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load the model's tokenizer"):
        load_tokenizer(tmp_path)
