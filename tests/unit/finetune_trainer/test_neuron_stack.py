"""The table of instance family, SDK, image, torch and optimum-neuron."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from finetune_trainer.neuron_stack import (
    RELEASE_SDK,
    STACKS,
    base_image,
    find_stack,
    instance_family,
    sdk_of_image,
    sound_types,
)


def test_every_pair_stands_once_with_a_reason_and_a_source() -> None:
    assert max(Counter((row.family, row.sdk) for row in STACKS).values()) == 1
    for row in STACKS:
        assert re.fullmatch(r"2\.\d+\.\d", row.sdk)
        assert len(row.why) > 20
        assert len(row.source) > 20


def test_a_pair_that_may_be_used_has_all_that_an_image_is_built_from() -> None:
    for row in STACKS:
        if row.verdict != "broken":
            assert row.image
            assert (row.python, row.torch, row.optimum_neuron) == ("3.10", "2.8.0", "0.4.5")
            assert sdk_of_image(row.image) == row.sdk
            assert f":{row.torch}-" in row.image
            assert f"-py{row.python.replace('.', '')}-" in row.image


def test_the_release_is_built_on_the_walkthroughs_image() -> None:
    assert base_image() == (
        "763104351884.dkr.ecr.us-east-1.amazonaws.com/huggingface-pytorch-training-neuronx:"
        "2.8.0-transformers4.55.4-neuronx-py310-sdk2.26.0-ubuntu22.04"
    )
    assert base_image("trn2", region="eu-west-1").startswith("763104351884.dkr.ecr.eu-west-1.amazonaws.com/")
    assert sound_types() == ("trn1", "trn1n", "trn2")
    with pytest.raises(KeyError, match="no base image of SDK 2.26.0 for trn3"):
        base_image("trn3")


@pytest.mark.parametrize("name", ["ml.trn1.32xlarge", "trn1.2xlarge"])
def test_a_row_is_found_by_the_name_of_an_instance_type(name: str) -> None:
    row = find_stack(name)
    assert row is not None
    assert (
        (row.family, row.sdk, row.verdict)
        == (instance_family(name), RELEASE_SDK, "works")
        == ("trn1", "2.26.0", "works")
    )
    assert find_stack(name, "2.99.0") is None


def test_an_image_tells_its_sdk_by_its_name_or_is_the_releases() -> None:
    assert sdk_of_image("r/pytorch-training-neuronx:2.9.0-neuronx-py312-sdk2.28.0-ubuntu24.04") == "2.28.0"
    assert sdk_of_image("registry.example/finetune-trainer-neuron:0123abc") == RELEASE_SDK
