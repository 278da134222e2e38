"""Turns prompts and completions into tokens and labels; evaluate encodes its prompts here too.

What the trained model will be asked is exactly what it was trained on: a document is the tokenizer's own prefix (its
beginning-of-sequence token, if it adds one), the text, and the end-of-sequence token. Text is encoded as one string, so
that the completion gets its natural tokens, and the boundary between prompt and completion is where the tokens of the
prompt alone end. Where a token would straddle that boundary (a prompt that ends in a space) the two are encoded apart,
since at inference the model sees the prompt's own tokens.

The padding token is never consulted for labels: padding is told by length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_trainer.errors import UserError
from finetune_trainer.formats import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Document:
    """One example as tokens; the last token is the end of sequence.

    `boundary` is the index of the completion's first token. `was_split` is true where prompt and completion had to be
    encoded apart. `double_bos` is true where the text itself begins with the token that the tokenizer puts in front.
    """

    tokens: list[int]
    boundary: int
    was_split: bool
    double_bos: bool


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
    """Encodes with one tokenizer. `prefix` are the tokens it puts in front of every text, often just one."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend: Any = tokenizer.backend_tokenizer
        self.eos_token_id: int = tokenizer.eos_token_id
        self.pad_token_id: int = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        plain = self._encode(["a"])[0]
        whole = self._backend.encode("a", add_special_tokens=True).ids
        starts = [index for index in range(len(whole)) if whole[index : index + len(plain)] == plain]
        self.prefix: list[int] = whole[: starts[0]] if starts else []
        # What it would add behind a text (some add the end of sequence) is left out of prompts on purpose.

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens that a model is asked to continue, prefix included."""
        return [self.prefix + tokens for tokens in self._encode(prompts)]

    def encode_examples(self, examples: Sequence[Example]) -> list[Document]:
        """The documents of `examples`, in their order. Runs on the tokenizer's own threads: pass batches."""
        prompts = self._encode([example.prompt for example in examples])
        wholes = self._encode([example.prompt + example.completion for example in examples])
        return [
            self._document(example, prompt, whole)
            for example, prompt, whole in zip(examples, prompts, wholes, strict=True)
        ]

    def _document(self, example: Example, prompt: list[int], whole: list[int]) -> Document:
        was_split = whole[: len(prompt)] != prompt
        if was_split:
            whole = prompt + self._encode([example.completion])[0]
        tokens = self.prefix + whole
        if tokens[-1] != self.eos_token_id:
            tokens.append(self.eos_token_id)
        size = len(self.prefix)
        double_bos = size > 0 and whole[:size] == self.prefix
        return Document(tokens, boundary=size + len(prompt), was_split=was_split, double_bos=double_bos)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
