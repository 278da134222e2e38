from __future__ import annotations

import re
from typing import Any

import pytest
from builders import make_job

from finetune_operator.core.model_shapes import BUILT_IN_SHAPES, ModelShape, find_shape, model_shapes

ENTRY = {
    "hiddenSize": 64, "layers": 2, "heads": 8, "kvHeads": 4, "intermediateSize": 128, "vocabSize": 100,
    "parameters": 100_000,
}  # fmt: skip
SHAPE = ModelShape(64, 2, 8, 4, 128, 100, 100_000)


def counted(name: str, shape: ModelShape) -> int:
    """Parameters by the architecture's own layout: every matrix, bias and norm of the family."""
    h, i = shape.hidden_size, shape.intermediate_size
    if "bloom" in name:
        # qkv, projection and MLP with biases; two layer norms a layer, one before and one after all layers
        layer = (3 * h * h + 3 * h) + (h * h + h) + (h * i + i) + (i * h + h) + 4 * h
        return shape.embedding_parameters + shape.layers * layer + 4 * h
    layer = 2 * h * h + 2 * h * shape.kv_size + 3 * h * i + 2 * h
    if "qwen" in name:
        layer += h + 2 * shape.kv_size  # biases of q, k and v
    return shape.embedding_parameters + shape.layers * layer + h


@pytest.mark.parametrize("name", sorted(BUILT_IN_SHAPES))
def test_the_sizes_of_a_row_give_its_number_of_parameters(name: str) -> None:
    shape = BUILT_IN_SHAPES[name]
    assert counted(name, shape) == shape.parameters
    assert shape.has_gated_mlp is ("bloom" not in name)
    assert shape.heads % shape.kv_heads == 0
    assert name == name.lower()


def test_a_hub_model_is_known_by_its_name_in_any_case() -> None:
    assert find_shape(make_job(model={"source": "hf://meta-llama/Meta-Llama-3-8B"}), None) == ModelShape(
        4096, 32, 32, 8, 14336, 128256, 8_030_261_248, model_type="llama"
    )


@pytest.mark.parametrize("source", ["hf://org/unknown", "workspace:///meta-llama/meta-llama-3-8b", "s3://bucket/model"])
def test_a_model_that_nobody_knows_has_no_sizes_before_prepare_reports_them(source: str) -> None:
    job = make_job(model={"source": source})
    assert find_shape(job, None) is None
    assert find_shape(job, ENTRY) == SHAPE
    assert find_shape(job, {**ENTRY, "tied": True}) == ModelShape(64, 2, 8, 4, 128, 100, 100_000, tied=True)
    reported = find_shape(job, {**ENTRY, "modelType": "qwen3", "biased": True, "headDim": 32})
    assert reported == ModelShape(64, 2, 8, 4, 128, 100, 100_000, model_type="qwen3", biased=True, head_dim=32)
    assert (reported.head_size, reported.query_size, reported.kv_size) == (32, 256, 128)


def test_what_prepare_read_wins_over_the_name() -> None:
    assert find_shape(make_job(model={"source": "hf://meta-llama/Meta-Llama-3-8B"}), ENTRY) == SHAPE


@pytest.mark.parametrize("key", sorted(ENTRY))
@pytest.mark.parametrize("value", [None, 0, -1, 1.5, True, "64"])
def test_a_report_that_is_not_whole_counts_as_none(key: str, value: Any) -> None:
    assert find_shape(make_job(), {**ENTRY, key: value}) is None


def test_the_installation_adds_models_and_replaces_built_in_ones() -> None:
    shapes = model_shapes({"Org/Own": ENTRY, "meta-llama/Meta-Llama-3-8B": {**ENTRY, "tied": True}})
    assert shapes["org/own"] == SHAPE
    assert find_shape(make_job(model={"source": "hf://ORG/own"}), None, shapes) == SHAPE
    assert shapes["meta-llama/meta-llama-3-8b"].tied
    assert len(shapes) == len(BUILT_IN_SHAPES) + 1
    assert not BUILT_IN_SHAPES["meta-llama/meta-llama-3-8b"].tied


def test_everything_that_is_wrong_with_the_installations_models_is_said_at_once() -> None:
    extra = {
        "a/b": {**ENTRY, "heads": 6, "layers": "two"},
        "c/d": {**ENTRY, "heads": 128, "kvheads": 4, "tied": "yes", "modelType": 7, "headDim": 0},
        "e/f": 7,
    }
    with pytest.raises(ValueError, match="models") as caught:
        model_shapes(extra)
    assert re.split("; ", str(caught.value)) == [
        "models.a/b.layers must be a whole number of at least 1, is 'two'",
        "models.a/b.heads must be a multiple of kvHeads, 6 is none of 4",
        "models.c/d has no kvheads: it takes hiddenSize, layers, heads, kvHeads, intermediateSize, vocabSize, "
        "parameters, tied, biased, modelType and headDim",
        "models.c/d.tied must be true or false, is 'yes'",
        "models.c/d.headDim must be a whole number of at least 1, is 0",
        "models.c/d.modelType must be config.json's model_type, is 7",
        "models.c/d.hiddenSize must be at least heads, 64 is less than 128",
        "models.e/f must be an object with hiddenSize, layers, heads, kvHeads, intermediateSize, vocabSize, "
        "parameters, is 7",
    ]
