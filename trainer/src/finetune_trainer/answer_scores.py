"""How near an answer comes to the right one: exact match and ROUGE-L.

stages/evaluate.py asks for both where a prompt has an expected answer. Exact match takes two texts for equal that
differ in white space only: case and punctuation count, for an answer may be code, a name or a number. ROUGE-L is the
F-measure of the longest common subsequence of words (Lin 2004), computed by torchmetrics.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
"""A run of letters and digits of any script. Kana and Han characters are words of their own: no space parts them."""


def is_exact_match(answer: str, expected: str) -> bool:
    """Whether both texts are the same but for white space around and between their words."""
    return answer.split() == expected.split()


def rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L's F-measure, 0 to 1, of the words of both texts in lower case without stemming.

    For ASCII text this is what rouge-score computes by its defaults, which knows no other letters.
    """
    # Imported here: it takes a second, and most jobs' prompts and every other stage do without.
    from torchmetrics.functional.text.rouge import rouge_score

    scores = rouge_score(answer, expected, rouge_keys="rougeL", normalizer=str.lower, tokenizer=_WORD.findall)
    return float(scores["rougeL_fmeasure"])
