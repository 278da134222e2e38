"""LoRA by peft: the config from spec.method, the adapted model, and proof that what trains is what was asked for.

backends/torch.py calls this while it builds a model. It decides names and counts, moves no tensors and trains nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from finetune_trainer.errors import UserError

_ADAPTER = "default"
"""peft's name of the only adapter. It is part of parameter names in memory and in no file."""


def lora_config(method: Mapping[str, Any]) -> LoraConfig:
    """peft's config for spec.method; UserError for a method or variant this release does not train."""
    kind, quantization = method.get("type", "lora"), method.get("quantization", "none")
    if kind != "lora":
        raise UserError("MethodNotAvailable", f"method.type is {kind!r}: this release trains lora only")
    if quantization != "none":
        raise UserError("MethodNotAvailable", f"method.quantization is {quantization!r}: this release has none only")
    lora = method.get("lora") or {}
    variant = lora.get("variant", "standard")
    if variant not in ("standard", "rslora"):
        raise UserError("MethodNotAvailable", f"method.lora.variant is {variant!r}: use standard or rslora")
    rank, targets = lora.get("rank"), lora.get("targetModules")
    if not isinstance(rank, int) or rank < 1:
        raise UserError("InvalidMethod", f"method.lora.rank is {rank!r}: give an integer of at least 1")
    if not isinstance(targets, list) or not targets:
        raise UserError("InvalidMethod", f"method.lora.targetModules is {targets!r}: name at least one module")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=lora.get("alpha", rank),
        lora_dropout=float(lora.get("dropout", 0.0)),
        target_modules=list(targets),
        use_rslora=variant == "rslora",
        bias="none",
    )


def add_adapter(model: Any, method: Mapping[str, Any], seed: int) -> PeftModel:
    """`model` with a new LoRA adapter in float32, started from `seed`; everything else is frozen.

    UserError when one of targetModules names no linear layer of the model, or its output layer where that is the
    embedding, which could not be merged. RuntimeError (a bug) when the number of
    trainable parameters is not what arithmetic gives.
    """
    config = lora_config(method)
    expected = expected_parameters(model, config)
    _check_tied_layer(model, config)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config, adapter_name=_ADAPTER)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    found = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    if found != expected:
        raise RuntimeError(f"the adapter has {found} trainable parameters, rank and shapes give {expected}")
    return adapted


def expected_parameters(model: Any, config: LoraConfig) -> int:
    """rank * (inputs + outputs) over every linear layer that targetModules names; UserError when a name fits none."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    total = 0
    for target in sorted(config.target_modules):
        matched = [module for name, module in linear.items() if name == target or name.endswith(f".{target}")]
        if not matched:
            known = Counter(name.rsplit(".", 1)[-1] for name in linear)
            listed = ", ".join(f"{name} ({count})" for name, count in sorted(known.items()))
            raise UserError(
                "UnknownTargetModule",
                f"method.lora.targetModules: {target!r} names no linear layer of the model, which has {listed}",
            )
        total += sum(config.r * (module.in_features + module.out_features) for module in matched)
    return total


def _check_tied_layer(model: Any, config: LoraConfig) -> None:
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    output = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is output), None)
    if name and any(name == target or name.endswith(f".{target}") for target in config.target_modules):
        raise UserError(
            "TiedEmbeddings",
            f"method.lora.targetModules names {name!r}, whose weight the model also uses as its embedding "
            "(tie_word_embeddings), so the adapter could not be merged: leave it out",
        )


def file_name(parameter: str) -> str:
    """The name that peft gives a parameter in an adapter file: without the adapter's name."""
    return parameter.replace(f".{_ADAPTER}.", ".", 1) if ".lora_" in parameter else parameter


def encode_adapter_config(model: PeftModel, source: str) -> bytes:
    """adapter_config.json as peft writes it, with `source` as the base model and sets in a fixed order."""
    value = model.peft_config[_ADAPTER].to_dict()
    value.update(base_model_name_or_path=source, inference_mode=True)
    plain = {key: sorted(entry) if isinstance(entry, set) else entry for key, entry in value.items()}
    return json.dumps(plain, indent=2, sort_keys=True).encode() + b"\n"
