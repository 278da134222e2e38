"""The sizes that prepare reports, for the spellings of config.json that families use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetune_trainer.model_shape import read_model_shape

BLOOM = {"model_type": "bloom", "hidden_size": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11}
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": None, "vocab_size": 11}
LLAMA = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 20, "vocab_size": 11,
}  # fmt: skip
PLAIN = {"hiddenSize": 8, "layers": 1, "heads": 2, "kvHeads": 2, "intermediateSize": 32, "vocabSize": 11}
GROUPED = {"hiddenSize": 8, "layers": 1, "heads": 4, "kvHeads": 2, "intermediateSize": 20, "vocabSize": 11}


def write(folder: Path, config: dict[str, Any], *shards: dict[str, np.ndarray]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    for number, tensors in enumerate(shards, 1):
        save_file(tensors, folder / f"model-{number:05}-of-{len(shards):05}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(LLAMA, GROUPED, id="llama"),
        pytest.param(
            {"model_type": "llava", "text_config": {**LLAMA, "model_type": "llama"}, "hidden_size": 99},
            {**GROUPED, "modelType": "llava"},
            id="the text part of a model of several",
        ),
        pytest.param(BLOOM, {**PLAIN, "modelType": "bloom"}, id="bloom"),
        pytest.param(GPT2, PLAIN, id="gpt2"),
    ],
)
def test_sizes_are_found_under_the_words_of_each_family(
    config: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    embedding, matrix = np.zeros((11, 8), np.float32), np.zeros((8, 8), np.float16)
    buffer = np.arange(5)
    folder = write(tmp_path, config, {"embed": embedding, "positions": buffer}, {"matrix": matrix})
    assert read_model_shape(folder) == {**expected, "parameters": 11 * 8 + 8 * 8, "tied": True}


def test_a_second_matrix_of_the_embeddings_size_unties_them(tmp_path: Path) -> None:
    embedding = np.zeros((11, 8), np.float32)
    shape = read_model_shape(write(tmp_path, LLAMA, {"embed": embedding, "lm_head": embedding + 1}))
    assert shape is not None
    assert (shape["parameters"], shape["tied"]) == (2 * 11 * 8, False)


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_config_without_a_size_gives_none(missing: str, tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA.items() if key != missing}
    assert read_model_shape(write(tmp_path, config, {"a": np.zeros(1, np.float32)})) is None


def test_the_model_type_is_told_and_biases_where_a_family_can_do_without(tmp_path: Path) -> None:
    shape = read_model_shape(
        write(tmp_path, {**LLAMA, "model_type": "llama", "attention_bias": True}, {"a": np.zeros(1, np.float32)})
    )
    assert shape is not None
    assert (shape["modelType"], shape["biased"]) == ("llama", True)


def test_the_width_of_a_head_is_told_where_it_is_not_its_share_of_the_hidden_state(tmp_path: Path) -> None:
    for head_dim, told in ((2, None), (4, 4)):
        config = {**LLAMA, "head_dim": head_dim}
        shape = read_model_shape(write(tmp_path, config, {"a": np.zeros(1, np.float32)}))
        assert shape is not None
        assert shape.get("headDim") == told
