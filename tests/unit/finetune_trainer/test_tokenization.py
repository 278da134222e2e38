"""Tokens and the boundary between what is asked and what is learnt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.errors import UserError
from finetune_trainer.formats import Example
from finetune_trainer.tokenization import Encoder, load_tokenizer


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


def test_a_document_is_prefix_text_and_end(encoder: Encoder, tokenizer: Any) -> None:
    (document,) = encoder.encode_examples([Example("Who?\n", "Paris.")])
    assert document.tokens[0] == tokenizer.bos_token_id
    assert document.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(document.tokens) == "<s>Who?\nParis.</s>"
    assert tokenizer.decode(document.tokens[document.boundary :]) == "Paris.</s>"
    assert not document.was_split


def test_prompts_are_encoded_as_the_tokenizer_itself_does(encoder: Encoder, tokenizer: Any) -> None:
    prompts = ["### Instruction\nWho?\n\n### Answer\n", "é\u4e2d  x"]
    assert encoder.encode_prompts(prompts) == [tokenizer(prompt).input_ids for prompt in prompts]


@settings(max_examples=200, deadline=None)
@given(prompt=st.text(min_size=1, max_size=30), completion=st.text(min_size=1, max_size=30))
def test_what_is_learnt_is_the_completion_after_the_prompts_own_tokens(
    encoder: Encoder, tokenizer: Any, prompt: str, completion: str
) -> None:
    (document,) = encoder.encode_examples([Example(prompt, completion)])
    assert [document.tokens[: document.boundary]] == encoder.encode_prompts([prompt])
    assert document.tokens[-1] == tokenizer.eos_token_id
    learnt = document.tokens[document.boundary :]
    assert tokenizer.backend_tokenizer.decode(learnt[:-1], skip_special_tokens=False) == completion
    assert document.tokens.count(tokenizer.eos_token_id) == 1


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.from_regex(r"[a-z ]{0,20}\n", fullmatch=True),
    completion=st.from_regex(r"[A-Za-z]{1,10}[a-z .]{0,20}", fullmatch=True),
)
def test_the_boundary_agrees_with_character_offsets(
    encoder: Encoder, tokenizer: Any, prompt: str, completion: str
) -> None:
    (document,) = encoder.encode_examples([Example(prompt, completion)])
    offsets = tokenizer.backend_tokenizer.encode(prompt + completion, add_special_tokens=False).offsets
    if not document.was_split:
        first = next(index for index, (start, _) in enumerate(offsets) if start >= len(prompt))
        assert document.boundary == len(encoder.prefix) + first


def test_a_token_across_the_boundary_splits_the_text_there(encoder: Encoder, tokenizer: Any) -> None:
    # " Paris" begins with the space that ends the prompt
    (document,) = encoder.encode_examples([Example("The capital of France is ", "France")])
    assert document.was_split
    assert tokenizer.decode(document.tokens[document.boundary :]) == "France</s>"


def test_an_end_token_in_the_text_is_not_doubled(encoder: Encoder, tokenizer: Any) -> None:
    (document,) = encoder.encode_examples([Example("a", "b</s>")])
    assert document.tokens.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("prompt", "doubled"),
    [
        pytest.param("<s>Who?", True, id="a prompt with its own"),
        pytest.param("Who?<s>", False, id="one inside is text"),
    ],
)
def test_a_doubled_beginning_is_noticed(encoder: Encoder, prompt: str, doubled: bool) -> None:
    (document,) = encoder.encode_examples([Example(prompt, "I.")])
    assert document.double_bos is doubled


def test_a_tokenizer_that_puts_nothing_in_front_has_no_prefix(tiny_tokenizer: Path, tmp_path: Path) -> None:
    encoder = Encoder(load_tokenizer(change(tiny_tokenizer, tmp_path / "t", "tokenizer.json", post_processor=None)))
    assert encoder.prefix == []
    assert not encoder.encode_examples([Example("<s>a", "b")])[0].double_bos


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
