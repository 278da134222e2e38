"""Turns examples into tokens and labels; evaluate encodes its prompts here too.

What the trained model will be asked is exactly what it was trained on: a document is the tokenizer's own prefix (its
beginning-of-sequence token, if it adds one; a chat template writes its own), the text, and the token that ends it.

Each span of an example is encoded by itself. So labels are the tokens of the learnt spans, to the character, and
nothing is searched for; and the tokens before an answer are those that the model sees at inference, which one that
straddles the boundary (a prompt that ends in a space) never would be. It costs one pass over the text, without
character offsets; label_audit.py holds sampled documents against the offsets of their whole text.

The padding token is never consulted for labels: padding is told by length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_trainer.errors import UserError
from finetune_trainer.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_JOINT = "\n"
"""Stands in front of a span that is not the first, where the tokenizer would put a space of its own there."""


@dataclass(frozen=True)
class Document:
    """One example as tokens; the last token is a stop token, by which a model ends its answer.

    `learnt` are the ranges (first, end) of tokens that are labels, never the first token of all. `double_bos` is true
    where the sequence begins twice: the text has the token that the tokenizer puts in front, or has it two times.
    """

    tokens: list[int]
    learnt: list[tuple[int, int]]
    double_bos: bool

    @property
    def supervised(self) -> int:
        """Tokens that are labels."""
        return sum(end - first for first, end in self.learnt)

    @property
    def learns_to_stop(self) -> bool:
        """Whether the last token is a label."""
        return bool(self.learnt) and self.learnt[-1][1] == len(self.tokens)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The fast tokenizer in the model folder; no network.

    UserError (TokenizerNotUsable) when it cannot be loaded, is a slow one, or has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code, use_fast=True
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError("TokenizerNotUsable", f"cannot load the model's tokenizer: {error}") from error
    if not tokenizer.is_fast:
        raise UserError(
            "TokenizerNotUsable",
            f"{type(tokenizer).__name__} has no fast form: the model must come with a tokenizer.json",
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "TokenizerNotUsable",
            "the tokenizer has no end-of-sequence token, so the model could never learn to stop: set eos_token in "
            "tokenizer_config.json",
        )
    # tokenizer.json may itself ask for cutting and padding, which the rust tokenizer would do without a word.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


class Encoder:
    """Encodes with one tokenizer. `prefix` are the tokens it puts in front of every text, often just one.

    `end_of_turn` is a format's own stop token, as text; `stop_token_ids` are it and the end of sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, end_of_turn: str = "") -> None:
        self._backend: Any = tokenizer.backend_tokenizer
        self.eos_token_id: int = tokenizer.eos_token_id
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.pad_token_id: int = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        self.stop_token_ids = {self.eos_token_id}
        if end_of_turn:
            self.stop_token_ids.add(self._backend.token_to_id(end_of_turn))
        plain, joint, joined = self._encode(["a", _JOINT, _JOINT + "a"])
        whole = self._backend.encode("a", add_special_tokens=True).ids
        starts = [index for index in range(len(whole)) if whole[index : index + len(plain)] == plain]
        self.prefix: list[int] = whole[: starts[0]] if starts else []
        # What it would add behind a text (some add the end of sequence) is left out of prompts on purpose.
        self._joint: list[int] = joint if joined != joint + plain and joined[: len(joint)] == joint else []

    def encode_prompts(self, prompts: Sequence[str], *, rendered: bool = False) -> list[list[int]]:
        """The tokens that a model is asked to continue, prefix included; `rendered` where a chat template wrote it."""
        prefix = [] if rendered else self.prefix
        return [prefix + tokens for tokens in self._encode(prompts)]

    def encode_whole(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of a text in one piece, without prefix and end, and the characters (first, end) of each."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, special ones written out."""
        return str(self._backend.decode(list(tokens), skip_special_tokens=False))

    def encode_examples(self, examples: Sequence[Example]) -> list[Document]:
        """The documents of `examples`, in their order. Runs on the tokenizer's own threads: pass batches."""
        texts = [span.text for example in examples for span in example.spans]
        if not self._joint:
            encoded = iter(self._encode(texts))
        else:
            later = [number > 0 for example in examples for number in range(len(example.spans))]
            encoded = iter(self._encode_joined(texts, later))
        return [self._document(example, [next(encoded) for _ in example.spans]) for example in examples]

    def _document(self, example: Example, spans: list[list[int]]) -> Document:
        tokens = [] if example.rendered else list(self.prefix)
        size = len(tokens)
        learnt: list[tuple[int, int]] = []
        for span, some in zip(example.spans, spans, strict=True):
            if span.learnt and some:
                learnt.append((max(1, len(tokens)), len(tokens) + len(some)))
            tokens += some
        if not tokens or tokens[-1] not in self.stop_token_ids:
            tokens.append(self.eos_token_id)
            if learnt and learnt[-1][1] == len(tokens) - 1:
                learnt[-1] = (learnt[-1][0], len(tokens))
        bos = [self.bos_token_id]
        double_bos = tokens[:2] == bos + bos or (size > 0 and tokens[size : 2 * size] == self.prefix)
        return Document(tokens, [(first, end) for first, end in learnt if end > first], double_bos)

    def _encode_joined(self, texts: Sequence[str], later: Sequence[bool]) -> list[list[int]]:
        """Each text; one that is `later` in its document as it is tokenised there, without a space in front."""
        size = len(self._joint)
        found = self._encode([_JOINT + text if joined else text for text, joined in zip(texts, later, strict=True)])
        for number, tokens in enumerate(found):
            if later[number]:
                fits = tokens[:size] == self._joint
                found[number] = tokens[size:] if fits else self._encode([texts[number]])[0]
        return found

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
