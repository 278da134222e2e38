"""Which tokenizer a run was prepared with: the digests of its files, chat template included, and what became of them.

prepare keeps them in data.json; evaluate and merge hold the tokenizers that they meet against it. Standard library
only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finetune_trainer.artifacts import Manifest
from finetune_trainer.contract import digest_of
from finetune_trainer.errors import UserError

TOKENIZER_KEY, PROMPT_KEY = "tokenizerSha256", "promptSha256"
"""Where a manifest's metadata has the digests of the tokenizer's files and of what stands around a question."""

_FILE = re.compile(
    r"tokenizer[^/]*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|[^/]+\.(spm|tiktoken)|spiece\.model|chat_template\.(json|jinja)"
)


def tokenizer_files(manifest: Manifest) -> dict[str, str]:
    """Name and hex sha256 of each file of an artifact that its tokenizer is read from."""
    return {entry.path: entry.sha256 for entry in manifest.files if _FILE.fullmatch(entry.path)}


def frozen_digests(data: Mapping[str, Any]) -> dict[str, str]:
    """For the metadata of a manifest: digests of tokenizer and prompts that data.json has; empty where it has none."""
    if not data.get("tokenizer"):
        return {}
    return {TOKENIZER_KEY: digest_of(data["tokenizer"]), PROMPT_KEY: data[PROMPT_KEY]}


def check_tokenizer(expected: Mapping[str, str], found: Mapping[str, str], whose: str) -> None:
    """UserError (TokenizerChanged) when `whose` tokenizer is not the one of prepare; names the files that differ."""
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if different:
        name = different[0]
        raise UserError(
            "TokenizerChanged",
            f"{whose} does not have the tokenizer that the data was prepared with: {', '.join(different)} differ "
            f"({name}: sha256 {found.get(name, 'missing')}, expected {expected.get(name, 'none')}): prompts would be "
            "other tokens than in training; run prepare again with this model",
        )
