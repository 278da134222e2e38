"""Scores of an answer: what counts as equal, and ROUGE-L by its definition."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.answer_scores import is_exact_match, rouge_l


@pytest.mark.parametrize(
    ("answer", "expected", "equal"),
    [
        pytest.param("Paris.", "Paris.", True, id="the same text"),
        pytest.param(" The\n Smiths \t", "The Smiths", True, id="other white space"),
        pytest.param("paris", "Paris", False, id="case counts"),
        pytest.param("Paris", "Paris.", False, id="punctuation counts"),
        pytest.param("-5", "5", False, id="a sign counts"),
        pytest.param("", "Paris", False, id="no answer"),
    ],
)
def test_exact_match_overlooks_white_space_only(answer: str, expected: str, equal: bool) -> None:
    assert is_exact_match(answer, expected) is equal


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        pytest.param("The cat sat.", "the CAT sat", 1.0, id="case and punctuation are no words"),
        pytest.param("police kill the gunman", "police killed the gunman", 0.75, id="three of four words in order"),
        pytest.param("the gunman kill police", "police killed the gunman", 0.5, id="two of four words in order"),
        pytest.param("a b c d", "a", 0.4, id="all that was asked for, and three words more"),
        pytest.param("", "Paris", 0.0, id="no answer"),
        pytest.param("?!", "Paris", 0.0, id="an answer without a word"),
        pytest.param("naïve café", "Naïve café", 1.0, id="letters beyond ASCII are letters"),
        pytest.param("我们走", "我们去", 2 / 3, id="Han characters are words"),
    ],
)
def test_rouge_l_of_known_texts(answer: str, expected: str, score: float) -> None:
    assert rouge_l(answer, expected) == pytest.approx(score, abs=1e-6)


WORDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6)


@given(WORDS, WORDS)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(one: list[str], other: list[str]) -> None:
    def subsequences(words: list[str]) -> set[tuple[str, ...]]:
        return {chosen for size in range(len(words) + 1) for chosen in combinations(words, size)}

    longest = max(len(common) for common in subsequences(one) & subsequences(other))
    expected = 2 * longest / (len(one) + len(other)) if longest else 0.0
    assert rouge_l(" ".join(one), " ".join(other)) == pytest.approx(expected, abs=1e-6)
