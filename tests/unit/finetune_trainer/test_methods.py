"""Methods: what trains of a model, how much of it, how the frozen rest is held, and the config that peft reads back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from finetune_trainer.errors import UserError
from finetune_trainer.methods import (
    deterministic,
    encode_adapter_config,
    file_name,
    find_trainables,
    load_trainable_model,
    parse_method,
    trainable_parameters,
)

CPU = torch.device("cpu")
FULL = {"type": "full", "quantization": "none"}


def lora(quantization: str = "none", **changes: Any) -> dict[str, Any]:
    settings = {"rank": 4, "alpha": 8, "dropout": 0.05, "targetModules": ["all-linear"], "variant": "standard"}
    return {"type": "lora", "quantization": quantization, "lora": {**settings, **changes}}


@pytest.fixture(scope="module")
def models(
    tiny_model: Path, tiny_model_module: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A folder with a model of two layers for each family: separate, fused and transposed linear layers."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    gpt2 = GPT2Config(
        vocab_size=tiny_model_module.write_tiny_tokenizer(folder / "gpt2"), n_embd=32, n_layer=2, n_head=4
    )
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    return {
        "llama": tiny_model,
        "bloom": tiny_model_module.write_tiny_bloom(folder / "bloom"),
        "gpt2": folder / "gpt2",
    }


Load = Callable[..., Any]


@pytest.fixture
def load(models: dict[str, Path]) -> Load:
    def load(method: Mapping[str, Any], family: str = "llama", precision: str = "fp32", seed: int = 1) -> Any:
        return load_trainable_model(models[family], method, precision=precision, seed=seed, device=CPU)

    return load


@cache
def llama_8b() -> Any:
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128256,
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
            )
        )


@cache
def bloomz_7b1() -> Any:
    with torch.device("meta"):
        return BloomForCausalLM(BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32))


# Inputs + outputs of a layer's linear modules: q and o, k and v (8 of 32 heads), gate, up and down.
_LLAMA_LINEAR = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
_LLAMA_OUTPUTS = 2 * 4096 + 2 * 1024 + 2 * 14336 + 4096


@pytest.mark.parametrize(
    ("build", "method", "expected"),
    [
        pytest.param(llama_8b, lora(rank=16, targetModules=["q_proj", "v_proj"]), 6_815_744, id="Llama 3 8B, q and v"),
        pytest.param(bloomz_7b1, lora(rank=8, targetModules=["query_key_value"]), 3_932_160, id="BLOOMZ-7B1, fused"),
        pytest.param(llama_8b, lora(rank=16), 32 * 16 * _LLAMA_LINEAR, id="Llama 3 8B, all-linear"),
        pytest.param(
            llama_8b,
            lora(rank=16, variant="dora"),
            32 * (16 * _LLAMA_LINEAR + _LLAMA_OUTPUTS),
            id="Llama 3 8B, DoRA: a magnitude for each output more",
        ),
        pytest.param(llama_8b, lora(rank=16, variant="rslora"), 32 * 16 * _LLAMA_LINEAR, id="Llama 3 8B, rsLoRA"),
        pytest.param(
            llama_8b,
            lora(rank=16, targetModules=["q_proj", "v_proj"], modulesToSave=["lm_head", "embed_tokens", "norm"]),
            6_815_744 + 2 * 128256 * 4096 + 4096,
            id="Llama 3 8B, saved modules whole",
        ),
        pytest.param(llama_8b, lora("nf4", rank=16), 32 * 16 * _LLAMA_LINEAR, id="Llama 3 8B, all-linear on nf4"),
        pytest.param(llama_8b, FULL, 8_030_261_248, id="Llama 3 8B, full"),
        pytest.param(bloomz_7b1, FULL, 7_069_016_064, id="BLOOMZ-7B1, full: the tied embedding once"),
    ],
)
def test_the_number_of_trainable_parameters_is_what_arithmetic_gives(
    build: Callable[[], Any], method: dict[str, Any], expected: int
) -> None:
    assert find_trainables(build(), parse_method(method)).parameters == expected


def losses(model: Any, *, bf16: bool = False, steps: int = 5) -> list[float]:
    """The loss of each of a few AdamW steps on one batch."""
    tokens = torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.01, fused=True)
    found = []
    model.train()
    for step in range(steps):
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize(
    ("method", "family", "precision"),
    [
        pytest.param(lora(), "gpt2", "bf16", id="LoRA on GPT-2"),
        pytest.param(lora(variant="rslora"), "bloom", "fp32", id="rsLoRA on BLOOM"),
        pytest.param(lora(variant="dora"), "gpt2", "bf16", id="DoRA on GPT-2"),
        pytest.param(lora("int8"), "bloom", "bf16", id="int8 BLOOM"),
        pytest.param(lora("int8", variant="dora"), "gpt2", "fp32", id="DoRA on int8 GPT-2"),
        pytest.param(lora("nf4"), "llama", "fp32", id="nf4 Llama"),
        pytest.param(lora("nf4", variant="dora"), "bloom", "bf16", id="DoRA on nf4 BLOOM"),
        pytest.param(FULL, "bloom", "bf16", id="full BLOOM"),
        pytest.param(FULL, "gpt2", "bf16", id="full GPT-2"),
    ],
)
def test_the_loss_falls_what_trains_is_float32_and_the_rest_stays(
    load: Load, method: dict[str, Any], family: str, precision: str
) -> None:
    model = load(method, family, precision)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    found = losses(model, bf16=precision == "bf16")
    assert found[-1] < found[0] - 0.005
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_training_on_a_quantized_base_is_the_same_again_with_dropout(load: Load, kind: str) -> None:
    assert losses(load(lora(kind))) == losses(load(lora(kind)))


def test_saved_modules_train_beside_the_adapter_in_both_precisions(load: Load) -> None:
    method = lora(modulesToSave=["lm_head", "embed_tokens", "norm"])
    for precision in ("fp32", "bf16"):
        found = losses(load(method, precision=precision), bf16=precision == "bf16")
        assert found[-1] < found[0] - 1


def test_an_adapter_starts_from_the_seed(load: Load) -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in trainable_parameters(load(lora(), seed=seed)).items()}

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("method", "family"),
    [
        pytest.param(lora(), "llama", id="LoRA"),
        pytest.param(
            lora(variant="dora", modulesToSave=["lm_head", "embed_tokens", "norm"]), "llama", id="DoRA, saved"
        ),
        pytest.param(lora("nf4", variant="dora"), "gpt2", id="DoRA on transposed nf4"),
        pytest.param(lora("int8", modulesToSave=["ln_f"]), "bloom", id="int8, saved"),
    ],
)
def test_names_in_files_are_those_of_peft(load: Load, method: dict[str, Any], family: str) -> None:
    model = load(method, family)
    mine = trainable_parameters(model)
    assert mine.keys() == get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    assert list(mine) == sorted(mine)


def test_without_an_adapter_names_are_the_models_own_and_there_is_no_config(load: Load) -> None:
    model = load(FULL, "bloom")
    names = trainable_parameters(model)
    assert "transformer.word_embeddings.weight" in names
    assert "lm_head.weight" not in names  # tied: once
    assert encode_adapter_config(model, "example/tiny") is None
    assert file_name("model.default.weight") == "model.default.weight"


def test_peft_reads_the_config_back(load: Load, tmp_path: Path) -> None:
    encoded = encode_adapter_config(load(lora(variant="rslora", targetModules=["v_proj", "q_proj"])), "example/tiny")
    assert encoded is not None
    (tmp_path / "adapter_config.json").write_bytes(encoded)
    read = LoraConfig.from_pretrained(str(tmp_path))
    assert (read.r, read.lora_alpha, read.target_modules) == (4, 8, {"q_proj", "v_proj"})
    assert (read.base_model_name_or_path, read.inference_mode, read.use_rslora) == ("example/tiny", True, True)
    assert json.loads(encoded)["target_modules"] == ["q_proj", "v_proj"]


def test_the_config_says_dora_saved_modules_by_full_name_and_transposed_layers(load: Load) -> None:
    def config(method: dict[str, Any], family: str) -> dict[str, Any]:
        encoded = encode_adapter_config(load(method, family), "example/tiny")
        assert encoded is not None
        value: dict[str, Any] = json.loads(encoded)
        return value

    dora = config(lora(variant="dora", modulesToSave=["norm"]), "llama")
    assert (dora["use_dora"], dora["modules_to_save"], dora["fan_in_fan_out"]) == (True, ["model.norm"], False)
    assert config(lora("nf4"), "gpt2")["fan_in_fan_out"] is True


@pytest.mark.parametrize(("kind", "dtype"), [("int8", torch.int8), ("nf4", torch.uint8)])
def test_linear_layers_are_quantized_but_for_the_output_and_saved_modules(
    load: Load, kind: str, dtype: torch.dtype
) -> None:
    model = load(lora(kind, targetModules=["q_proj"], modulesToSave=["down_proj"]), precision="bf16")
    held = {name: p.dtype for name, p in model.named_parameters() if not p.requires_grad}
    quantized = {name.split(".")[-3 if "base_layer" in name else -2] for name, kept in held.items() if kept == dtype}
    assert quantized == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert {kept for name, kept in held.items() if kept != dtype} == {torch.bfloat16}
    for name in ("lm_head", "model.embed_tokens", "model.norm"):
        assert held[f"base_model.model.{name}.weight"] == torch.bfloat16


@pytest.mark.parametrize(("kind", "family"), [("int8", "gpt2"), ("nf4", "llama")])
def test_a_quantized_base_answers_nearly_as_before_and_training_goes_on_after_a_comparison(
    load: Load, kind: str, family: str
) -> None:
    tokens = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(1))
    plain, quantized = load(lora(), family), load(lora(kind), family)
    with torch.no_grad(), deterministic(plain), deterministic(quantized):
        expected, found = plain(input_ids=tokens).logits, quantized(input_ids=tokens).logits
        alone = quantized(input_ids=tokens[:1]).logits
    assert 0 < float((found - expected).abs().max()) < 0.2 * float(expected.abs().max())
    assert float((alone - found[:1]).abs().max()) < 1e-5
    found_losses = losses(quantized)
    assert found_losses[-1] < found_losses[0] - 0.005
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in quantized.modules())


def test_everything_that_is_wrong_with_a_method_is_said_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse_method(lora("fp4", rank=0, variant="vera"))
    assert caught.value.reason == "InvalidSpec"
    for words in ("spec.method.quantization: must be", "spec.method.lora.rank: must be", "spec.method.lora.variant: "):
        assert words in caught.value.message


@pytest.mark.parametrize(
    ("method", "family", "reason", "words"),
    [
        pytest.param(
            lora(targetModules=["q_proj", "query_key_value"]),
            "llama",
            "UnknownTargetModule",
            "'query_key_value' names no linear layer of the model, which has down_proj (2), gate_proj (2)",
            id="a target that the model lacks",
        ),
        pytest.param(
            lora(modulesToSave=["score"]),
            "llama",
            "UnknownModuleToSave",
            "'score' names no module with weights of the model, which has down_proj (2), embed_tokens (1)",
            id="a module to save that the model lacks",
        ),
        pytest.param(
            lora(targetModules=["c_attn", "lm_head"]),
            "gpt2",
            "TiedEmbeddings",
            "targetModules names 'lm_head', whose weight the model also uses as 'transformer.wte'",
            id="an output layer that is the embedding",
        ),
        pytest.param(
            lora(modulesToSave=["word_embeddings"]),
            "bloom",
            "TiedEmbeddings",
            "modulesToSave names 'transformer.word_embeddings', whose weight the model also uses as 'lm_head'",
            id="an embedding that is the output layer",
        ),
        pytest.param(
            lora(targetModules=["q_proj", "up_proj"], modulesToSave=["mlp"]),
            "llama",
            "InvalidMethod",
            "'up_proj' is trained as a whole by method.lora.modulesToSave",
            id="a target inside a saved module",
        ),
        pytest.param(
            lora(modulesToSave=["model", "embed_tokens"]),
            "llama",
            "InvalidMethod",
            "names 'model.embed_tokens' and 'model', which contains it",
            id="a saved module inside another",
        ),
    ],
)
def test_names_that_do_not_fit_the_model_are_refused_before_its_weights_are_read(
    load: Load, method: dict[str, Any], family: str, reason: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.methods.load_causal_model", None)
    with pytest.raises(UserError) as caught:
        load(method, family)
    assert caught.value.reason == reason
    assert words in caught.value.message


def test_targets_that_store_their_weights_in_both_orders_are_refused() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, tie_word_embeddings=False))
    with pytest.raises(UserError, match="names lm_head, which store their weights as .outputs, inputs."):
        find_trainables(model, parse_method(lora(targetModules=["c_attn", "lm_head"])))
