"""What a LoRA adapter in peft's file layout changes in a base model: pairs of matrices, their scale, and where they go.

Consolidation calls match_adapter to prove that an adapter fits its base, merging to know what to add where. It works
from names and shapes alone, reads no values, and refuses what it does not know rather than leave it out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.model_files import read_json_object
from finetune_trainer.safetensors_stream import some_names

ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_PREFIX = "base_model.model."
"""peft puts this before the base model's own module names."""

OUTPUT_LAYERS = ("lm_head", "embed_out")
"""Last component of the names that causal language models give to their output layer."""

Shape = tuple[int, ...]

_A_SUFFIXES = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on lora_B",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable_token_indices",
    "layer_replication": "layer_replication",
    "target_parameters": "target_parameters",
    "use_qalora": "QA-LoRA",
    "megatron_config": "Megatron layers",
}
"""Fields of adapter_config.json that change what a merge must do; each is refused while it is set."""


@dataclass(frozen=True)
class AdapterTarget:
    """One module that the adapter changes: base += scale * B @ A, transposed where `transposed`.

    A is (rank, inputs) and B is (outputs, rank), under the names `a` and `b` of the adapter's file.
    """

    module: str
    base: str
    a: str
    b: str
    rank: int
    scale: float
    transposed: bool


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter folder; CorruptArtifact when it is missing or no JSON object."""
    return read_json_object(folder / ADAPTER_CONFIG_NAME, "an adapter cannot be read without its rank and scale")


def has_tied_embeddings(model_config: Mapping[str, Any], tensors: Iterable[str]) -> bool:
    """Whether one weight is embedding and output layer: as config.json says, else when no output layer is stored."""
    tied = model_config.get("tie_word_embeddings")
    if isinstance(tied, bool):
        return tied
    return not any(name.endswith(tuple(f"{layer}.weight" for layer in OUTPUT_LAYERS)) for name in tensors)


def match_adapter(
    config: Mapping[str, Any],
    adapter: Mapping[str, Shape],
    base: Mapping[str, Shape],
    *,
    tied_embeddings: bool = False,
) -> list[AdapterTarget]:
    """Every target of the adapter with the base tensor it changes, sorted by module.

    `adapter` and `base` are shapes by tensor name; `tied_embeddings` says that the base's output layer is its input
    embedding. UserError for a kind of adapter that is not supported; CorruptArtifact for a key without its pair, a key
    that is no LoRA matrix, a module that the base lacks, and shapes that do not fit.
    """
    _check_supported(config)
    left = set(adapter)
    targets = []
    for a_name in sorted(adapter):
        suffix = next((suffix for suffix in _A_SUFFIXES if a_name.endswith(suffix)), None)
        if suffix is None:
            continue
        path = a_name[: -len(suffix)]
        b_name = path + _A_SUFFIXES[suffix]
        if b_name not in adapter:
            raise CorruptArtifact(f"the adapter has {a_name!r} without {b_name!r}")
        left -= {a_name, b_name}
        module = path.removeprefix(ADAPTER_PREFIX)
        is_embedding = suffix == ".lora_embedding_A"
        if tied_embeddings and (is_embedding or module.rsplit(".", 1)[-1] in OUTPUT_LAYERS):
            raise UserError(
                "TiedEmbeddings",
                f"the adapter changes {module!r}, whose weight the base model uses as embedding and as output layer "
                "(tie_word_embeddings): leave that module out of targetModules",
            )
        target = AdapterTarget(
            module=module,
            base=_find_base_tensor(module, base),
            a=a_name,
            b=b_name,
            rank=adapter[a_name][0] if adapter[a_name] else 0,
            scale=_scale(config, module),
            transposed=is_embedding or bool(config.get("fan_in_fan_out")),
        )
        _check_shapes(target, config, adapter, base)
        targets.append(target)
    if left:
        raise CorruptArtifact(f"the adapter has keys that are no LoRA pair of a module: {some_names(left)}")
    if not targets:
        raise CorruptArtifact("the adapter has no LoRA matrices at all")
    _check_distinct(targets)
    return targets


def _check_supported(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError("UnsupportedAdapter", f"{ADAPTER_CONFIG_NAME}: peft_type is {kind!r}, only LORA is supported")
    for field, words in _UNSUPPORTED.items():
        if config.get(field):
            raise UserError(
                "UnsupportedAdapter",
                f"{ADAPTER_CONFIG_NAME}: {field} is {config[field]!r}: {words} is not supported, train without it",
            )
    if config.get("bias", "none") != "none":
        raise UserError(
            "UnsupportedAdapter",
            f"{ADAPTER_CONFIG_NAME}: bias is {config['bias']!r}: trained biases are not supported, use bias none",
        )


def _scale(config: Mapping[str, Any], module: str) -> float:
    rank = _rank(config, module)
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise CorruptArtifact(f"{ADAPTER_CONFIG_NAME}: lora_alpha of {module!r} is {alpha!r}, expected a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _rank(config: Mapping[str, Any], module: str) -> int:
    rank = _by_pattern(config.get("rank_pattern") or {}, module, config.get("r"))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise CorruptArtifact(f"{ADAPTER_CONFIG_NAME}: r of {module!r} is {rank!r}, expected a positive integer")
    return rank


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """peft's rule: the first pattern that matches the whole name or its last components, else the default."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _find_base_tensor(module: str, base: Mapping[str, Shape]) -> str:
    """The base tensor of `module`. Checkpoints of a bare model lack the first component (BLOOM's do)."""
    name = f"{module}.weight"
    bare = name.split(".", 1)[1]
    found = [candidate for candidate in (name, bare) if candidate in base]
    if not found:
        raise CorruptArtifact(
            f"the adapter changes {module!r}, and the base model has neither {name!r} nor {bare!r}: "
            "it was trained on another model"
        )
    return found[0]


def _check_shapes(
    target: AdapterTarget, config: Mapping[str, Any], adapter: Mapping[str, Shape], base: Mapping[str, Shape]
) -> None:
    a_shape, b_shape, weight = adapter[target.a], adapter[target.b], base[target.base]
    rank = _rank(config, target.module)
    if len(weight) != 2 or 0 in weight:
        raise UserError(
            "UnsupportedAdapter",
            f"{target.base!r} has shape {list(weight)}: only matrices can be merged, not convolutions",
        )
    outputs, inputs = reversed(weight) if target.transposed else weight
    if a_shape != (rank, inputs) or b_shape != (outputs, rank):
        raise CorruptArtifact(
            f"{target.module!r}: lora_A {list(a_shape)} and lora_B {list(b_shape)} do not fit rank {rank} and the "
            f"base's {target.base!r} {list(weight)}; expected {[rank, inputs]} and {[outputs, rank]}"
        )


def _check_distinct(targets: Iterable[AdapterTarget]) -> None:
    seen: dict[str, str] = {}
    for target in targets:
        if target.base in seen:
            raise CorruptArtifact(f"{seen[target.base]!r} and {target.module!r} both change the base's {target.base!r}")
        seen[target.base] = target.module
