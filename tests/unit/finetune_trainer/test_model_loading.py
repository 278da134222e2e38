"""Models as transformers loads them, and what it would let pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM

from finetune_trainer.errors import UserError
from finetune_trainer.model_loading import Quantization, load_causal_model, load_skeleton


def test_a_model_comes_in_the_dtype_asked_for_with_sdpa(tiny_model: Path) -> None:
    model = load_causal_model(tiny_model, dtype=torch.bfloat16)
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "sdpa")


def test_an_architecture_without_sdpa_is_loaded_too(tmp_path: Path) -> None:
    BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    assert load_causal_model(tmp_path, dtype="auto").config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_weights_that_would_be_made_up_are_refused(tiny_model: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_model, tmp_path / "cut")
    weights = load_file(tiny_model / "model.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks weights of LlamaForCausalLM: {name}") as caught:
        load_causal_model(tmp_path / "cut", dtype="auto")
    assert caught.value.reason == "ModelNotLoadable"


@pytest.mark.parametrize("load", [partial(load_causal_model, dtype="auto"), load_skeleton], ids=["weights", "skeleton"])
def test_a_base_that_is_quantized_already_is_refused_with_what_to_do_instead(
    tiny_model: Path, tmp_path: Path, load: Callable[[Path], Any]
) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    settings = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises(
        UserError, match="quantization_config .* says bitsandbytes.*name the model that they were made"
    ) as caught:
        load(tmp_path)
    assert caught.value.reason == "QuantizedBaseModel"


def test_an_image_without_bitsandbytes_is_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UserError, match="method.quantization is nf4, and this image has no bitsandbytes"):
        load_causal_model(
            tiny_model,
            dtype=torch.float32,
            quantization=Quantization("nf4", torch.float32, (), torch.device("cpu")),
        )


def test_a_skeleton_has_names_shapes_and_ties_but_no_weights(tmp_path: Path) -> None:
    BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    skeleton = load_skeleton(tmp_path)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert skeleton.lm_head.weight is skeleton.transformer.word_embeddings.weight


def test_code_of_the_model_runs_only_when_it_is_trusted(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto}))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(UserError, match="trust_remote_code"):
        load_causal_model(folder, dtype="auto")
    assert type(load_causal_model(folder, dtype="auto", trust_remote_code=True)).__name__ == "OwnModel"
