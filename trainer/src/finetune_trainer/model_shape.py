"""The sizes of a model, as prepare reports them: what the operator needs to check parallelism and memory beforehand.

Read from config.json and the headers of the weights; no weight is loaded and no library of the model is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_trainer.artifacts import read_tensor_header
from finetune_trainer.errors import UserError
from finetune_trainer.model_files import read_model_config
from finetune_trainer.neuron_rules import has_biases

_NAMES: Mapping[str, tuple[str, ...]] = {
    "hiddenSize": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocabSize": ("vocab_size",),
}
"""Keys of config.json by the reported name, the first that is there counts: families differ in them."""
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""Dtypes of parameters; integers in a weights file are buffers, such as positions."""


def read_model_shape(folder: Path) -> dict[str, Any] | None:
    """The sizes of the causal language model in `folder`, None where config.json does not say them in known words.

    `parameters` counts the numbers in the files, so tied embeddings once; `tied` says that they hold one matrix of
    vocabSize x hiddenSize and not two. A family without a key for it has as many kv heads as heads, and an MLP four
    times as wide as its hidden state. `modelType` is config.json's model_type, where it has one. `biased`
    is there where attention or MLP layers have biases in a family that can do without, `headDim` where a head's width
    is not hiddenSize / heads (Qwen3).
    """
    config = read_model_config(folder)
    model_type = config.get("model_type")  # of the whole: that of a part would promise what only the part can do
    nested = config.get("text_config")
    if isinstance(nested, Mapping):
        config = nested
    found = {name: _size(config, keys) for name, keys in _NAMES.items()}
    if any(size is None for size in found.values()):
        return None
    sizes: dict[str, Any] = {name: size for name, size in found.items() if size is not None}
    sizes["kvHeads"] = _size(config, _KV_HEADS) or sizes["heads"]
    sizes["intermediateSize"] = _size(config, _INTERMEDIATE) or 4 * sizes["hiddenSize"]
    weights = _weights(folder)
    sizes["parameters"] = sum(math.prod(shape) for shape in weights)
    embedding = [sizes["vocabSize"], sizes["hiddenSize"]]
    sizes["tied"] = sum(shape == embedding for shape in weights) < 2
    if isinstance(model_type, str):
        sizes["modelType"] = model_type
    if has_biases(config):
        sizes["biased"] = True
    head_dim = _size(config, ("head_dim",))
    if head_dim is not None and head_dim * sizes["heads"] != sizes["hiddenSize"]:
        sizes["headDim"] = head_dim
    return sizes


def _weights(folder: Path) -> list[list[int]]:
    """The shape of every parameter in the files of `folder`; CorruptArtifact where a header cannot be read."""
    return [
        tensor["shape"]
        for shard in sorted(folder.glob("*.safetensors"))
        for tensor in read_tensor_header(shard).values()
        if tensor["dtype"] in _FLOATS
    ]


def _size(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def check_length(model: Path, max_length: int) -> None:
    """UserError when rows of `max_length` tokens are longer than the model in the folder has positions."""
    limit = read_model_config(model).get("max_position_embeddings")
    if isinstance(limit, int) and max_length > limit:
        raise UserError(
            "MaxLengthTooLong", f"spec.dataset.maxLength is {max_length}, the model has {limit} positions: lower it"
        )
