"""What training costs by arithmetic, what devices can do, and what a process took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig

from finetune_trainer.throughput import ModelSize, Speed, model_size, peak_flops, peak_host_memory

LLAMA_3_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
EMBEDDING = 128256 * 4096
PARAMETERS = 8_030_261_248
NORMS = (2 * 32 + 1) * 4096


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """Llama 3 8B without its numbers. Tests share it and leave it as it is."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**LLAMA_3_8B))


def adapted(model: Any, **changes: Any) -> Any:
    config = peft.LoraConfig(**{"r": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes})
    with torch.device("meta"):
        return peft.get_peft_model(model, config)


def test_full_training_takes_six_operations_a_weight_and_token(llama: LlamaForCausalLM) -> None:
    size = model_size(llama)
    weights = PARAMETERS - EMBEDDING - NORMS
    assert size == ModelSize(weights, weights, 32 * 4096)
    assert size.training_flops(1000, 0) == 6 * weights * 1000
    # one document of 8,192 tokens: PaLM's 12 L H Q T a token
    assert size.training_flops(8192, 8192**2) == (6 * weights + 12 * 32 * 4096 * 8192) * 8192


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{**LLAMA_3_8B, "num_hidden_layers": 2}))
    base = model_size(model)
    size = model_size(adapted(model))
    assert base is not None
    trainable = 6_815_744 // 16  # of 32 layers, here of 2
    assert size == ModelSize(base.weights + trainable, trainable, base.attention_width)
    assert size.training_flops(10, 0) == pytest.approx(10 * (4 * base.weights + 6 * trainable))


def test_a_module_that_is_trained_in_full_beside_the_adapter_counts_once() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{**LLAMA_3_8B, "num_hidden_layers": 2}))
    base = model_size(model)
    size = model_size(adapted(model, modules_to_save=["lm_head", "embed_tokens"]))
    assert base is not None
    trainable = 6_815_744 // 16
    assert size == ModelSize(base.weights + trainable, trainable + EMBEDDING, base.attention_width)


def test_layers_of_another_make_count_too() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=32, n_embd=8, n_layer=3, n_head=2))
    weights = 3 * (8 * 24 + 8 * 8 + 2 * 8 * 32) + 100 * 8
    assert model_size(model) == ModelSize(weights, weights, 3 * 8)


def test_a_mixture_of_experts_has_no_figure_rather_than_a_wrong_one(llama: LlamaForCausalLM) -> None:
    class Mixture(torch.nn.Module):
        config = MixtralConfig()

    assert model_size(Mixture()) is None


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A10G", "bf16", 70e12),
        ("trn1", "bf16", 190e12),
        ("trn2", "bf16", 667e12),
        ("NVIDIA GeForce GTX 1060", "bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_a_devices_peak_is_its_makers_or_unknown(device: str, precision: str, expected: float | None) -> None:
    assert peak_flops(device, precision) == expected


def test_what_is_not_known_is_left_out() -> None:
    speed = Speed(2.0, 1234.56, 0.5, 0.0123456789, None, 1024, None)
    assert speed.as_json() == {
        "seconds": 2.0,
        "tokensPerSecond": 1234.6,
        "stepSeconds": 0.5,
        "dataWaitSeconds": 0.012346,
        "hostMemoryBytes": 1024,
    }


def test_the_highest_memory_of_this_process_is_read_from_the_kernel(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmPeak:\t  900 kB\nVmHWM:\t  123 kB\n")
    assert peak_host_memory(status) == 123 * 1024
    assert peak_host_memory(tmp_path / "missing") is None
    assert (peak_host_memory() or 0) > 1 << 20
