"""Merged models as transformers loads them, against peft: every kind of adapter, tied and bare models, precisions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from finetune_trainer.artifacts import new_artifact, read_manifest
from finetune_trainer.errors import UserError
from finetune_trainer.merged_model import WrittenModel, write_merged_model
from finetune_trainer.merging import plan_merge
from finetune_trainer.model_files import read_model_files

pytestmark = [
    # What peft says when it adapts them: the question here is whether the merge is right all the same.
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]
TOKENS = torch.arange(3, 35).reshape(2, 16)
C_LAYERS = ["c_attn", "c_proj", "c_fc"]


def write_merged(base: Path, adapter: Path, output: Path, **plan: Any) -> WrittenModel:
    with new_artifact(output, "merge") as writer:
        return write_merged_model(plan_merge(read_model_files(base), adapter, **plan), writer, output, {}, 2)


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float()


def llama(folder: Path, **config: Any) -> Path:
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return folder


def gpt2(folder: Path, *, bare: bool = False) -> Path:
    """GPT-2 with its transposed layers, biases and tied embeddings; `bare` as its hub files are, without a prefix."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if bare:
        weights = load_file(folder / "model.safetensors")
        plain = {name.removeprefix("transformer."): value for name, value in weights.items()}
        save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tied_llama(folder: Path) -> Path:
    return llama(folder, tie_word_embeddings=True)


def bare_gpt2(folder: Path) -> Path:
    return gpt2(folder, bare=True)


def biased_llama(folder: Path) -> Path:
    return llama(folder, attention_bias=True, mlp_bias=True)


MERGES = [
    pytest.param(gpt2, {"target_modules": C_LAYERS, "fan_in_fan_out": True}, False, id="transposed layers"),
    pytest.param(gpt2, {"target_modules": [*C_LAYERS, "lm_head"]}, True, id="transposed and plain layers, output tied"),
    pytest.param(gpt2, {"target_modules": C_LAYERS, "use_dora": True}, False, id="DoRA on transposed layers"),
    pytest.param(gpt2, {"target_modules": ["c_attn"], "bias": "all"}, False, id="all biases"),
    pytest.param(gpt2, {"target_modules": ["c_attn"], "lora_bias": True}, False, id="a bias on lora_B"),
    pytest.param(bare_gpt2, {"target_modules": ["c_attn"], "bias": "all"}, False, id="files of a bare model"),
    pytest.param(bare_gpt2, {"target_modules": ["wte"]}, True, id="files of a bare model, embedding tied"),
    pytest.param(bare_gpt2, {"target_modules": ["lm_head"]}, True, id="files of a bare model, output tied"),
    pytest.param(biased_llama, {"bias": "all"}, False, id="all biases, most of them not adapted"),
    pytest.param(biased_llama, {"bias": "lora_only"}, False, id="biases that peft does not write"),
    pytest.param(tied_llama, {"target_modules": ["lm_head"]}, True, id="output layer tied"),
    pytest.param(tied_llama, {"target_modules": ["embed_tokens", "q_proj"]}, True, id="embedding tied"),
    pytest.param(tied_llama, {"target_modules": ["embed_tokens"], "use_dora": True}, True, id="DoRA embedding tied"),
    pytest.param(tied_llama, {"modules_to_save": ["lm_head"]}, True, id="output layer tied and saved"),
    pytest.param(tied_llama, {"modules_to_save": ["embed_tokens"]}, True, id="embedding tied and saved"),
    pytest.param(tied_llama, {"target_modules": ["q_proj"]}, False, id="a tied model whose embedding stays"),
]


@pytest.mark.parametrize(("make_base", "lora", "untied"), MERGES)
def test_the_merged_model_computes_what_base_and_adapter_do(
    tmp_path: Path, adapter_artifacts: ModuleType, make_base: Callable[[Path], Path], lora: dict[str, Any], untied: bool
) -> None:
    base = make_base(tmp_path / "base")
    adapter = adapter_artifacts.random_adapter(base, tmp_path / "adapter", **lora)
    write_merged(base, adapter, tmp_path / "merged")

    before = logits(AutoModelForCausalLM.from_pretrained(base))
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    merged, found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert (logits(merged) - expected).abs().max() < 2e-5
    assert (expected - before).abs().max() > 1e-2
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert ("untied" in read_manifest(tmp_path / "merged").metadata) == untied
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config.get("tie_word_embeddings") is False) == (untied or make_base is biased_llama)


def test_an_embedding_that_peft_stores_beside_its_matrices_is_taken_from_the_adapter(
    tmp_path: Path, adapter_artifacts: ModuleType
) -> None:
    base = llama(tmp_path / "base")
    adapter = adapter_artifacts.random_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head"])
    stored = load_file(adapter / "adapter_model.safetensors")
    for module in ("model.embed_tokens", "lm_head"):
        weight = load_file(base / "model.safetensors")[f"{module}.weight"]
        stored[f"base_model.model.{module}.base_layer.weight"] = weight + 1.0
    save_file(stored, adapter / "adapter_model.safetensors")
    result = write_merged(base, adapter, tmp_path / "merged")
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert [proof.target.kind for proof in result.merged.proofs] == ["lora", "lora"]


def test_bfloat16_dora_and_saved_modules_are_rounded_once(tmp_path: Path, adapter_artifacts: ModuleType) -> None:
    base = llama(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    adapter = adapter_artifacts.random_adapter(
        base, tmp_path / "adapter", use_dora=True, modules_to_save=["lm_head"], target_modules=["q_proj", "down_proj"]
    )
    write_merged(base, adapter, tmp_path / "merged")
    exact = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    expected = exact.merge_and_unload().state_dict()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        wanted = expected[name].bfloat16()
        steps = (tensor.view(torch.int16).int() - wanted.view(torch.int16).int()).abs()
        assert steps.max() <= 1, name
        assert steps.sum() <= max(1, steps.numel() // 200), name


@pytest.mark.parametrize(
    ("precision", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)]
)
def test_a_precision_that_is_asked_for_is_every_float_tensors(
    tmp_path: Path, adapter_artifacts: ModuleType, precision: str, dtype: torch.dtype
) -> None:
    base = llama(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    mixed = {name: value.bfloat16() if "layers.0" in name else value for name, value in weights.items()}
    mixed["model.position"] = torch.arange(5)
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_artifacts.random_adapter(llama(tmp_path / "plain"), tmp_path / "adapter")
    write_merged(base, adapter, tmp_path / "merged", dtype=precision)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == mixed.keys()
    for name, value in mixed.items():
        assert found[name].dtype == (dtype if value.is_floating_point() else value.dtype)
        if "q_proj" not in name and "v_proj" not in name:
            assert torch.equal(found[name], value.to(found[name].dtype))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_a_value_that_the_asked_precision_cannot_hold_is_refused(tmp_path: Path, adapter_artifacts: ModuleType) -> None:
    base = llama(tmp_path / "base")
    adapter = adapter_artifacts.random_adapter(base, tmp_path / "adapter")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight.*F16.*precision"):
        write_merged(base, adapter, tmp_path / "merged", dtype="F16")
    assert not list(tmp_path.glob("merged*"))


def test_a_bloom_is_merged(tmp_path: Path, tiny_model_module: ModuleType, adapter_artifacts: ModuleType) -> None:
    base = tiny_model_module.write_tiny_bloom(tmp_path / "base")
    adapter = adapter_artifacts.random_adapter(
        base, tmp_path / "adapter", target_modules=["query_key_value"], fan_in_fan_out=False
    )
    shutil.rmtree(tmp_path / "merged", ignore_errors=True)
    write_merged(base, adapter, tmp_path / "merged")
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - expected).abs().max() < 1e-5
