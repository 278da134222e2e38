"""LoRA: what is trained, how much of it, and the config that peft reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from finetune_trainer.errors import UserError
from finetune_trainer.lora import add_adapter, encode_adapter_config, expected_parameters, file_name, lora_config


def method(**lora: Any) -> dict[str, Any]:
    settings = {"rank": 16, "alpha": 32, "dropout": 0.05, "targetModules": ["q_proj", "v_proj"], "variant": "standard"}
    return {"type": "lora", "quantization": "none", "lora": {**settings, **lora}}


def test_llama_3_8b_with_rank_16_on_q_and_v_trains_6815744_parameters() -> None:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert expected_parameters(model, lora_config(method())) == 6_815_744


def test_the_adapter_is_float32_over_a_bf16_base_and_starts_from_the_seed(tiny_model: Path) -> None:
    def trainable(seed: int) -> dict[str, torch.Tensor]:
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
        adapted = add_adapter(base, method(), seed)
        return {name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad}

    first, again, other = trainable(1), trainable(1), trainable(2)
    assert {p.dtype for p in first.values()} == {torch.float32}
    assert len(first) == 2 * 2 * 2
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_names_in_files_are_those_of_peft() -> None:
    inside = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert file_name(inside) == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_peft_reads_the_config_back(tiny_model: Path, tmp_path: Path) -> None:
    model = add_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), method(variant="rslora"), 1)
    encoded = encode_adapter_config(model, "example/tiny")
    (tmp_path / "adapter_config.json").write_bytes(encoded)
    read = LoraConfig.from_pretrained(str(tmp_path))
    assert (read.r, read.lora_alpha, read.target_modules) == (16, 32, {"q_proj", "v_proj"})
    assert (read.base_model_name_or_path, read.inference_mode, read.use_rslora) == ("example/tiny", True, True)
    assert json.loads(encoded)["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({**method(), "type": "full"}, "method.type is 'full'"),
        ({**method(), "quantization": "nf4"}, "method.quantization is 'nf4'"),
        (method(variant="dora"), "method.lora.variant is 'dora'"),
        (method(rank=0), "method.lora.rank is 0"),
        (method(targetModules=[]), r"method.lora.targetModules is \[\]"),
    ],
    ids=["full fine-tuning", "quantization", "DoRA", "a rank of zero", "no target module"],
)
def test_what_cannot_be_trained_is_refused_with_field_and_value(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        lora_config(changed)


def test_a_target_module_that_the_model_lacks_is_refused_with_what_it_has(tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(UserError, match=r"'query_key_value' names no linear layer .* q_proj \(2\)"):
        add_adapter(base, method(targetModules=["q_proj", "query_key_value"]), 1)


def test_an_output_layer_that_is_the_embedding_is_refused_before_training(tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=True)
    with pytest.raises(UserError, match="'lm_head', whose weight the model also uses as its embedding") as caught:
        add_adapter(base, method(targetModules=["q_proj", "lm_head"]), 1)
    assert caught.value.reason == "TiedEmbeddings"
