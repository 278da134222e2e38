"""What a model folder of the hub's layout has beside its weights: their index, configuration, tokenizer, licence.

Merging and consolidation write it with this, from the base model's folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_trainer.artifacts import ArtifactWriter
from finetune_trainer.contract import MANIFEST_NAME
from finetune_trainer.model_files import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    ModelFiles,
    is_companion_file,
    read_model_config,
)
from finetune_trainer.safetensors_stream import read_header

_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def write_index(files: Sequence[Path], writer: ArtifactWriter, base: ModelFiles | None = None) -> None:
    """The index of the written shards, where the base has one or there are several: which file holds which tensor."""
    has_index = base is not None and (base.folder / INDEX_NAME).is_file()
    if len(files) == 1 and files[0].name == SINGLE_NAME and not has_index:
        return
    headers = [read_header(file) for file in files]
    total = sum(header.size - header.data_start for header in headers)
    names = {name: header.path.name for header in headers for name in header.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    writer.write(INDEX_NAME, _encode(index))


def copy_companions(base: Path, writer: ArtifactWriter, *, dtype: str | None = None, untied: bool = False) -> int:
    """Copy the base's configuration and tokenizer files; returns how many.

    config.json says `dtype` where one is given, and where `untied` that the output layer is its own. Files are copied
    and not linked: artifacts share no inodes, since one may be deleted alone.
    """
    names = sorted(entry.name for entry in base.iterdir() if entry.is_file() and is_companion_file(entry.name))
    config = _changed_config(base, dtype, untied=untied)
    copied = 0
    for name in names:
        if name == MANIFEST_NAME:
            continue
        if name == CONFIG_NAME and config is not None:
            writer.write(name, _encode(config))
        else:
            copy_file(base / name, writer)
        copied += 1
    return copied


def write_config(folder: Path, writer: ArtifactWriter, *, dtype: str | None) -> None:
    """config.json of `folder`, which says `dtype` where one is given. CorruptArtifact when there is none."""
    config = _changed_config(folder, dtype, untied=False)
    if config is not None:
        writer.write(CONFIG_NAME, _encode(config))
    else:
        copy_file(folder / CONFIG_NAME, writer)


def copy_file(path: Path, writer: ArtifactWriter) -> None:
    """A copy of `path` under its own name."""
    with path.open("rb") as source, writer.open(path.name) as target:
        while chunk := source.read(1 << 20):
            target.write(chunk)


def _changed_config(base: Path, dtype: str | None, *, untied: bool) -> dict[str, Any] | None:
    """config.json where it is not the base's, else None."""
    config = dict(read_model_config(base))
    changes: dict[str, Any] = {}
    if dtype is not None:
        names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
        changes |= dict.fromkeys(names, _DTYPE_NAMES[dtype])
    if untied:
        changes["tie_word_embeddings"] = False
    if not changes:
        return None
    nested = config.get("text_config")
    if isinstance(nested, dict):
        config["text_config"] = {**nested, **changes}
    return config | changes


def _encode(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
