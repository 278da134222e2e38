"""Which tokenizer a run was prepared with: the digests of its files, chat template included, and what became of them.

prepare keeps them in data.json, and one digest of all in its manifest, which every later artifact takes over; merge and
evaluate hold the tokenizers that they meet against it. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_trainer.artifacts import Manifest, read_manifest
from finetune_trainer.contract import digest_of
from finetune_trainer.errors import UserError

TOKENIZER_KEY, PROMPT_KEY = "tokenizerSha256", "promptSha256"
"""Where a manifest's metadata has the digests of the tokenizer's files and of what stands around a question."""

_FILE = re.compile(
    r"tokenizer[^/]*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|[^/]+\.(spm|tiktoken)|spiece\.model|chat_template\.(json|jinja)"
)


def is_tokenizer_file(name: str) -> bool:
    """True for a file that a tokenizer is read from."""
    return _FILE.fullmatch(name) is not None


def tokenizer_files(manifest: Manifest) -> dict[str, str]:
    """Name and hex sha256 of each file of an artifact that its tokenizer is read from."""
    return {entry.path: entry.sha256 for entry in manifest.files if is_tokenizer_file(entry.path)}


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


def carried_digests(artifact: Path) -> dict[str, str]:
    """What frozen_digests gave prepare's artifact, from any artifact made of it; empty where it was made by hand."""
    metadata = read_manifest(artifact).metadata
    return {key: metadata[key] for key in (TOKENIZER_KEY, PROMPT_KEY) if key in metadata}


def check_base_tokenizer(artifact: Path, model: Path) -> None:
    """UserError (TokenizerChanged) when the model has another tokenizer than `artifact` was prepared with."""
    expected = carried_digests(artifact).get(TOKENIZER_KEY)
    found = digest_of(tokenizer_files(read_manifest(model)))
    if expected not in (None, found):
        raise UserError(
            "TokenizerChanged",
            f"the base model's tokenizer files have digest {found}, {artifact.name} was prepared with {expected}: the "
            "result would be served with other prompts than it was trained with; run prepare again with this model",
        )
