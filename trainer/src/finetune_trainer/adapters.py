"""What an adapter in peft's file layout changes in a base model: which tensors, by which of its own, and at what scale.

Consolidation calls match_adapter to prove that an adapter fits its base, merging to know what to add where. It works
from names and shapes alone, reads no values, and refuses what it does not know rather than leave it out: every tensor
of the adapter is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
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
INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
"""Last component of the names that they give to the embedding of tokens."""

Shape = tuple[int, ...]

_LARGEST = 1e9
"""Rank and alpha are below it in any adapter; a number that is not, or is none at all, would make every weight NaN."""

_LORA, _DORA, _STORED, _ADDED = "lora", "dora", "stored", "added"

_A_SUFFIXES = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
_MAGNITUDE_SUFFIXES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
_BIAS_OF_B = ".lora_B.bias"
_WRAPPED = ".base_layer."
"""peft's name for the layer that an adapter is put around; it is in the names of stored embeddings and biases."""
_TRANSPOSED_LAYERS = {
    "gpt2": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
    "decision_transformer": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "imagegpt": ("c_attn", "q_attn", "c_proj", "c_fc"),
}
"""Layers that store (inputs, outputs), by model_type. fan_in_fan_out tells of the last layer that peft adapted only."""
_PREFIXES = {
    "bloom": "transformer.",
    "falcon": "transformer.",
    "gpt2": "transformer.",
    "gpt_neo": "transformer.",
    "gptj": "transformer.",
    "gpt_neox": "gpt_neox.",
}
"""First component of a causal model's names by model_type, "model." for all others; files of bare models lack it."""
_UNSUPPORTED = {
    "trainable_token_indices": "trainable_token_indices",
    "layer_replication": "layer_replication",
    "target_parameters": "target_parameters",
    "use_qalora": "QA-LoRA",
    "megatron_config": "Megatron layers",
}
"""Fields of adapter_config.json that change what a merge must do; each is refused while it is set."""


@dataclass(frozen=True)
class AdapterTarget:
    """One tensor that the adapter changes: `tensor` of the merged model, from the base's `base`, mostly the same name.

    In this order: `stored` of the adapter replaces it; scale * B @ A is added, transposed where `transposed`, with A
    (rank, inputs) and B (outputs, rank) under the names `a` and `b`; scale * `addend` is added; `magnitude` (DoRA)
    gives each output its length.
    """

    module: str
    base: str
    tensor: str
    rank: int = 0
    scale: float = 1.0
    transposed: bool = False
    a: str | None = None
    b: str | None = None
    magnitude: str | None = None
    stored: str | None = None
    addend: str | None = None

    @property
    def kind(self) -> str:
        """lora, dora, stored (the adapter has all its values) or added (a bias)."""
        if self.magnitude is not None:
            return _DORA
        if self.a is not None:
            return _LORA
        return _STORED if self.stored is not None else _ADDED

    @property
    def adapter_tensors(self) -> tuple[str, ...]:
        """The adapter's tensors that are used for it."""
        names = (self.a, self.b, self.magnitude, self.stored, self.addend)
        return tuple(name for name in names if name is not None)

    def as_json(self) -> dict[str, Any]:
        """For a manifest."""
        value: dict[str, Any] = {"module": self.module, "kind": self.kind}
        if self.a is not None or self.addend is not None:
            value |= {"rank": self.rank, "scale": self.scale}
        return value


@dataclass(frozen=True)
class AdapterMatch:
    """The targets, sorted by tensor, and what the merged model is besides.

    `untied` is the base tensor that the base model uses as embedding and as output layer and the merged one does not;
    `output_layer` is then the name of the new tensor. `prefix` stands before every tensor's name in the merged model
    where the base's files leave it out and may not any more. `remarks` are sentences for the user.
    """

    targets: tuple[AdapterTarget, ...]
    untied: str | None = None
    output_layer: str | None = None
    prefix: str = ""
    remarks: tuple[str, ...] = ()


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
    model_config: Mapping[str, Any],
) -> AdapterMatch:
    """Every tensor that the adapter changes, and how.

    `adapter` and `base` are shapes by tensor name, `config` is adapter_config.json, `model_config` the base's
    config.json. UserError for a kind of adapter that is not supported; CorruptArtifact for a key that nothing uses, a
    matrix without its pair, a module that the base lacks, and shapes that do not fit.
    """
    _check_supported(config)
    matching = _Matching(config, adapter, base, model_config)
    matching.match_low_rank()
    matching.match_stored()
    matching.check_complete()
    return matching.result()


@dataclass
class _Matching:
    config: Mapping[str, Any]
    adapter: Mapping[str, Shape]
    base: Mapping[str, Shape]
    model_config: Mapping[str, Any]
    targets: dict[str, AdapterTarget] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    untied: str | None = None
    output_layer: str | None = None
    bare_prefix: str = ""

    def __post_init__(self) -> None:
        self.left = set(self.adapter)
        self.tied = has_tied_embeddings(self.model_config, self.base)

    def match_low_rank(self) -> None:
        for a_name in sorted(self.adapter):
            suffix = next((suffix for suffix in _A_SUFFIXES if a_name.endswith(suffix)), None)
            if suffix is None:
                continue
            path = a_name[: -len(suffix)]
            b_name = path + _A_SUFFIXES[suffix]
            if b_name not in self.adapter:
                raise CorruptArtifact(f"the adapter has {a_name!r} without {b_name!r}")
            module = path.removeprefix(ADAPTER_PREFIX)
            is_embedding = suffix == ".lora_embedding_A"
            base, tensor = self._find(module, "weight")
            target = AdapterTarget(
                module=module,
                base=base,
                tensor=tensor,
                rank=_rank(self.config, module),
                scale=_scale(self.config, module),
                transposed=is_embedding or self._is_transposed(module),
                a=a_name,
                b=b_name,
                magnitude=self._magnitude(path),
            )
            self._check_shapes(target)
            self._add(target)
            self._match_bias_of_b(path, module)

    def match_stored(self) -> None:
        """Keys that hold a base tensor's new values: modules_to_save, trained biases, stored embeddings."""
        for name in sorted(self.left):
            plain = name.removeprefix(ADAPTER_PREFIX)
            wrapped = _WRAPPED in plain
            module, _, part = plain.replace(_WRAPPED, ".").rpartition(".")
            if not module or ".lora_" in name or not self._may_be_stored(module, part, wrapped):
                continue
            base, tensor = self._find(module, part)
            if self.adapter[name] != self.base[base]:
                raise UserError(
                    "AdapterDoesNotFit",
                    f"the adapter stores {plain!r} with shape {list(self.adapter[name])}, the base model's {base!r} "
                    f"has {list(self.base[base])}: where the vocabulary was extended, save the base model with its "
                    "extended embeddings and merge into that",
                )
            known = self.targets.get(tensor)
            if known is not None and known.stored is None and known.addend is None:
                # An adapted embedding whose base layer peft stored too.
                self.left.discard(name)
                self.targets[tensor] = replace(known, stored=name)
            else:
                self._add(AdapterTarget(module=module, base=base, tensor=tensor, stored=name))

    def check_complete(self) -> None:
        if self.left:
            raise CorruptArtifact(
                "the adapter has keys that are no LoRA pair of a module and that neither modules_to_save nor bias "
                f"explains: {some_names(self.left)}"
            )
        if not self.targets:
            raise CorruptArtifact("the adapter has no LoRA matrices and no stored modules at all")
        without = [
            module
            for module in self.config.get("modules_to_save") or ()
            if not any(_is_within(target.module, module) for target in self.targets.values() if target.stored)
        ]
        if without:
            raise CorruptArtifact(
                f"{ADAPTER_CONFIG_NAME}: modules_to_save names {some_names(without)}, and the adapter has no weights "
                "of it"
            )

    def result(self) -> AdapterMatch:
        remarks = []
        if self.untied is not None:
            remarks.append(
                f"the base model uses {self.untied!r} as embedding and as output layer (tie_word_embeddings), and the "
                f"adapter changes one of them: the merged model has {self.output_layer!r} of its own, and its "
                "config.json says so"
            )
        lora_only = self.config.get("bias") == "lora_only"
        trained = [target for target in self.targets.values() if target.a and self._bias_of(target.module) in self.base]
        if lora_only and trained and not any(target.tensor.endswith(".bias") for target in self.targets.values()):
            remarks.append(
                f"{ADAPTER_CONFIG_NAME} says bias lora_only and the adapter's file has none, as peft 0.17 writes it: "
                "the base model's biases stay, as with peft"
            )
        prefix = self.bare_prefix if self.untied is not None else ""
        targets = sorted(self.targets.values(), key=lambda target: target.tensor)
        return AdapterMatch(tuple(targets), self.untied, self.output_layer, prefix, tuple(remarks))

    def _add(self, target: AdapterTarget) -> None:
        known = self.targets.get(target.tensor)
        if known is not None:
            raise CorruptArtifact(f"{known.module!r} and {target.module!r} both change the base's {target.tensor!r}")
        self.left.difference_update(target.adapter_tensors)
        self.targets[target.tensor] = target

    def _find(self, module: str, part: str) -> tuple[str, str]:
        """The base tensor of a module's part, and its name in the merged model."""
        name = f"{module}.{part}"
        found = self._find_base_tensor(name)
        if self.tied and part == "weight":
            if _last(module) in OUTPUT_LAYERS:
                shared = found or self._tied_embedding(module)
                self._untie(shared, found or name)
                return shared, found or name
            if found is not None and self._is_token_embedding(module, found):
                self._untie(found, self.output_layer or self._default_output_layer())
        if found is None:
            raise CorruptArtifact(
                f"the adapter changes {module!r}, and the base model has no tensor {name!r} (nor that without its "
                "first component): it was trained on another model"
            )
        return found, found

    def _untie(self, shared: str, output_layer: str) -> None:
        self.untied, self.output_layer = shared, output_layer

    def _is_token_embedding(self, module: str, name: str) -> bool:
        return _last(module) in INPUT_EMBEDDINGS or self.base[name][:1] == (self.model_config.get("vocab_size"),)

    def _default_output_layer(self) -> str:
        stored = [name for name in self.base if _last(name.removesuffix(".weight")) in OUTPUT_LAYERS]
        kind = "embed_out" if self.model_config.get("model_type") == "gpt_neox" else "lm_head"
        return stored[0] if stored else f"{kind}.weight"

    def _tied_embedding(self, module: str) -> str:
        """The base tensor that a tied output layer uses."""
        names = [
            name
            for name, shape in self.base.items()
            if name.endswith(".weight") and _last(name.removesuffix(".weight")) in INPUT_EMBEDDINGS and len(shape) == 2
        ]
        if len(names) != 1:
            raise UserError(
                "TiedEmbeddings",
                f"the adapter changes {module!r}, whose weight the base model shares with its embedding "
                f"(tie_word_embeddings), and which tensor that is cannot be told ({some_names(names) or 'none fits'}): "
                "leave that module out of the adapter",
            )
        prefix = _PREFIXES.get(str(self.model_config.get("model_type")), "model.")
        if not names[0].startswith(prefix):
            self.bare_prefix = prefix
        return names[0]

    def _find_base_tensor(self, name: str) -> str | None:
        """Checkpoints of a bare model lack the first component (BLOOM's do)."""
        if name in self.base:
            return name
        prefix, _, bare = name.partition(".")
        if bare in self.base:
            self.bare_prefix = f"{prefix}."
            return bare
        return None

    def _bias_of(self, module: str) -> str:
        return self._find_base_tensor(f"{module}.bias") or ""

    def _magnitude(self, path: str) -> str | None:
        name = next((path + suffix for suffix in _MAGNITUDE_SUFFIXES if path + suffix in self.adapter), None)
        if name is None and self.config.get("use_dora"):
            raise CorruptArtifact(
                f"{ADAPTER_CONFIG_NAME} says use_dora, and the adapter has no {path}{_MAGNITUDE_SUFFIXES[0]}"
            )
        return name

    def _match_bias_of_b(self, path: str, module: str) -> None:
        name = path + _BIAS_OF_B
        if name not in self.adapter:
            return
        bias = self._bias_of(module)
        if not bias:
            raise UserError(
                "UnsupportedAdapter",
                f"the adapter has {name!r} (lora_bias), and the base model's {module!r} has no bias to add it to",
            )
        if self.adapter[name] != self.base[bias]:
            raise CorruptArtifact(f"{name!r} {list(self.adapter[name])} does not fit {bias!r} {list(self.base[bias])}")
        scale = _scale(self.config, module)
        self._add(AdapterTarget(module, bias, bias, rank=_rank(self.config, module), scale=scale, addend=name))

    def _may_be_stored(self, module: str, part: str, wrapped: bool) -> bool:
        if any(_is_within(module, saved) for saved in self.config.get("modules_to_save") or ()):
            return True
        if part == "bias" and self.config.get("bias", "none") in ("all", "lora_only"):
            return True
        return part == "weight" and (wrapped or _last(module) in (*INPUT_EMBEDDINGS, *OUTPUT_LAYERS))

    def _is_transposed(self, module: str) -> bool:
        layers = _TRANSPOSED_LAYERS.get(str(self.model_config.get("model_type")))
        return bool(self.config.get("fan_in_fan_out")) if layers is None else _last(module) in layers

    def _check_shapes(self, target: AdapterTarget) -> None:
        assert target.a is not None
        assert target.b is not None
        a_shape, b_shape, weight = self.adapter[target.a], self.adapter[target.b], self.base[target.base]
        if len(weight) != 2 or 0 in weight:
            raise UserError(
                "UnsupportedAdapter",
                f"{target.base!r} has shape {list(weight)}: only matrices can be merged, not convolutions",
            )
        outputs, inputs = reversed(weight) if target.transposed else weight
        if a_shape != (target.rank, inputs) or b_shape != (outputs, target.rank):
            raise CorruptArtifact(
                f"{target.module!r}: lora_A {list(a_shape)} and lora_B {list(b_shape)} do not fit rank {target.rank} "
                f"and the base's {target.base!r} {list(weight)}; expected {[target.rank, inputs]} and "
                f"{[outputs, target.rank]}"
            )
        if target.magnitude is not None and self.adapter[target.magnitude] != (outputs,):
            raise CorruptArtifact(
                f"{target.magnitude!r} has shape {list(self.adapter[target.magnitude])}, expected {[outputs]}"
            )


def _check_supported(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError("UnsupportedAdapter", f"{ADAPTER_CONFIG_NAME}: peft_type is {kind!r}, only LORA is supported")
    for field_name, words in _UNSUPPORTED.items():
        if config.get(field_name):
            raise UserError(
                "UnsupportedAdapter",
                f"{ADAPTER_CONFIG_NAME}: {field_name} is {config[field_name]!r}: {words} is not supported, "
                "train without it",
            )
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise UserError(
            "UnsupportedAdapter", f"{ADAPTER_CONFIG_NAME}: bias is {bias!r}, expected none, all or lora_only"
        )
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise CorruptArtifact(f"{ADAPTER_CONFIG_NAME}: modules_to_save is {saved!r}, expected a list of names")
    for field_name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field_name) or {}
        if not isinstance(patterns, dict):
            raise CorruptArtifact(f"{ADAPTER_CONFIG_NAME}: {field_name} is {patterns!r}, expected an object")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise CorruptArtifact(
                    f"{ADAPTER_CONFIG_NAME}: {field_name} has {pattern!r}, which is no pattern: {error}"
                ) from error


def _scale(config: Mapping[str, Any], module: str) -> float:
    rank = _rank(config, module)
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < _LARGEST:
        raise CorruptArtifact(f"{ADAPTER_CONFIG_NAME}: lora_alpha of {module!r} is {alpha!r}, expected a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _rank(config: Mapping[str, Any], module: str) -> int:
    rank = _by_pattern(config.get("rank_pattern") or {}, module, config.get("r"))
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank < _LARGEST:
        raise CorruptArtifact(f"{ADAPTER_CONFIG_NAME}: r of {module!r} is {rank!r}, expected a positive integer")
    return rank


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """peft's rule: the first pattern that matches the whole name or its last components, else the default."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _last(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def _is_within(module: str, name: str) -> bool:
    """Whether `name` is the module or one above it, by whole components: peft's rule for modules_to_save."""
    parts, wanted = module.split("."), name.split(".")
    return any(parts[at : at + len(wanted)] == wanted for at in range(len(parts) - len(wanted) + 1))
