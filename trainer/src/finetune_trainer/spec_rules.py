"""The checks of a spec that need more than one field, each once as CEL and once as Python over the plain JSON.

spec_checks.py runs the Python, in the operator, in a stage and in a preview; the operator's api/schema.py puts the CEL
into the resource definition, so that the API server refuses the same at `kubectl apply`. A contract test holds all of
them to one table of wrong specs. Standard library only: neither the types of the operator nor any library of the
trainer is known here.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from finetune_trainer.evaluation_gate import THRESHOLDS

_LOSS_THRESHOLDS = tuple(name for name, threshold in THRESHOLDS.items() if threshold.needs_loss)
_ANSWER_THRESHOLDS = tuple(name for name, threshold in THRESHOLDS.items() if not threshold.needs_loss)

Object = Mapping[str, Any]
"""A JSON object of the spec, defaults filled in."""

MAX_PROMPT_CHARACTERS = 32768
"""Of all of evaluate.prompts. stage.json is an annotation, and Kubernetes takes 256 KiB of them; a character has up to
6 bytes there."""

CONTEXT_FORMATS = ("dolly", "alpaca", "messages", "sharegpt", "template")
"""Formats whose prompt has a place for a context beside the question."""

ALL_LINEAR = "all-linear"

MAX_SPLIT = 64
"""Largest size that spec.parallelism takes."""

NEURON_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block in the model types that train on Trainium: what all-linear stands for there."""

NEURON_TARGETS = (*NEURON_LINEAR, "embed_tokens", "lm_head")
"""Modules that can have an adapter on Trainium: the vendor has a LoRA layer for each (optimum-neuron 0.4.5,
peft/tuners/lora/layer.py) and fuses some, so that a path into one block would name a layer that is not there."""

FLASH_TOKENS = 2048
"""On Neuron the flash attention kernel takes rows of a multiple of so many tokens; shorter rows do without it."""

_HUB_NAME = "[A-Za-z0-9][-A-Za-z0-9_.]*"
_SOURCE = f"(hf://{_HUB_NAME}/{_HUB_NAME}|s3://[a-z0-9][-a-z0-9.]+(/[^/].*)?|workspace:///[^/].*)"
_CLIMBS = r"(^|/)\.\.(/|$)"
_SOURCE_MESSAGE = "source must be hf://org/name, s3://bucket/prefix or workspace:///path without `..`, is {source}"
_SOURCE_CEL = f"self.source.matches(r'^{_SOURCE}$') && !self.source.matches(r'{_CLIMBS}')"

_NO_CONTENTS = "!has(self.publish) || !has(self.publish.s3) || !has(self.publish.s3.contents)"
_PLACE = r"\{[^{}.!:\[\]]+\}"
_TEMPLATE = rf"^([^{{}}]|\{{\{{|\}}\}}|{_PLACE})*$"
_FILLED = rf"(^|[^{{])(\{{\{{)*{_PLACE}"


@dataclass(frozen=True)
class Rule:
    """One check of an object: `kind` is the object's type in spec_schema.json, `field` what to point at below it.

    `cel` holds over self, `holds` over the plain object with its defaults. The message may show values: {a.b} stands
    for field a.b, which must be there wherever the rule breaks. `fix` names the nearest valid value where arithmetic or
    the value itself gives one; "" where nothing is near.
    """

    kind: str
    field: str
    message: str
    cel: str
    holds: Callable[[Object], bool]
    fix: Callable[[Object], str] = lambda _: ""

    @property
    def reads(self) -> frozenset[str]:
        """Paths below the object that the rule looks at."""
        return _paths_read(self.cel)


@cache
def _paths_read(cel: str) -> frozenset[str]:
    # The last name is a function's where a parenthesis follows it.
    return frozenset(re.findall(r"self\.(\w+(?:\.\w+(?![\w(]))*)", cel))


def template_fields(text: str) -> tuple[str, ...]:
    """The names of the fields that a template's text stands for, in order; ValueError says what is no such text."""
    if re.fullmatch(_TEMPLATE[1:-1], text, re.DOTALL) is None:
        raise ValueError("a field stands in braces by its name alone, as {question}, and a brace itself is doubled")
    return tuple(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)


def nearest_sizes(sizes: Iterable[int], wanted: int) -> tuple[int, ...]:
    """The largest of `sizes` below `wanted` and the smallest above, those of them that there are."""
    sizes = list(sizes)
    below = max((size for size in sizes if size < wanted), default=None)
    above = min((size for size in sizes if size > wanted), default=None)
    return tuple(size for size in (below, above) if size is not None)


def _is_source(value: Object) -> bool:
    source = value["source"]
    return re.fullmatch(_SOURCE, source) is not None and re.search(_CLIMBS, source) is None


def _near_source(value: Object) -> str:
    source = str(value["source"])
    without = re.sub(r"^(https?://(www\.)?huggingface\.co/(datasets/)?|hf:/*|huggingface:/*)", "", source).strip("/")
    if re.fullmatch(f"{_HUB_NAME}/{_HUB_NAME}", without) and not source.startswith(("/", ".")):
        return f"did you mean hf://{without}?"
    if source.startswith("/") and re.search(_CLIMBS, source) is None:
        return f"did you mean workspace://{source}, a folder of the workspace volume?"
    return ""


def _is_below(path: Any) -> bool:
    return path is None or (not path.startswith("/") and re.search(_CLIMBS, path) is None)


def _is_template(text: str) -> bool:
    try:
        template_fields(text)
    except ValueError:
        return False
    return True


def _prompt_characters(evaluate: Object) -> int:
    prompts = evaluate.get("prompts") or ()
    return sum(len(prompt.get(name) or "") for prompt in prompts for name in ("text", "context", "expected"))


def _processes(spec: Object) -> int:
    return int(spec["accelerator"]["nodes"] * spec["accelerator"]["processesPerNode"])


def _model_size(spec: Object) -> int:
    return int(spec["parallelism"]["tensorParallelSize"] * spec["parallelism"]["pipelineParallelSize"])


def _near_split(spec: Object) -> str:
    processes, pipeline = _processes(spec), spec["parallelism"]["pipelineParallelSize"]
    sizes = [size for size in range(1, MAX_SPLIT + 1) if processes % (size * pipeline) == 0]
    near = nearest_sizes(sizes, spec["parallelism"]["tensorParallelSize"])
    choices = [f"tensorParallelSize {' or '.join(map(str, near))}"] if near else []
    per_node, model_size = spec["accelerator"]["processesPerNode"], _model_size(spec)
    nodes = [count for count in range(1, 1025) if count * per_node % model_size == 0]
    if near := nearest_sizes(nodes, spec["accelerator"]["nodes"]):
        choices.append(f"accelerator.nodes {' or '.join(map(str, near))}")
    return f"use {', or '.join(choices)}" if choices else ""


def _saved_twice(lora: Object) -> list[str]:
    return [name for name in lora.get("modulesToSave") or () if name in (*lora["targetModules"], ALL_LINEAR)]


def _prompts_with_context(spec: Object) -> list[int]:
    prompts = spec["evaluate"].get("prompts") or ()
    return [place for place, prompt in enumerate(prompts) if prompt.get("context") is not None]


def _published(spec: Object) -> str | None:
    """publish.s3.contents, None where it is not set."""
    contents = ((spec.get("publish") or {}).get("s3") or {}).get("contents")
    return None if contents is None else str(contents)


def _has_any(value: Object | None, names: Iterable[str]) -> bool:
    return value is not None and any(value.get(name) is not None for name in names)


def _variant(spec: Object) -> str:
    return str((spec["method"].get("lora") or {}).get("variant", "standard"))


def _on_neuron(spec: Object) -> bool:
    return bool(spec["accelerator"]["type"] == "neuron")


def _targets(spec: Object) -> list[str]:
    return list((spec["method"].get("lora") or {}).get("targetModules") or ())


def _foreign_targets(spec: Object) -> list[str]:
    return [name for name in _targets(spec) if name not in (ALL_LINEAR, *NEURON_TARGETS)]


def _has_half_of_the_mlp(spec: Object) -> bool:
    return ("gate_proj" in _targets(spec)) != ("up_proj" in _targets(spec))


def _is_kept_apart(spec: Object) -> bool:
    return bool(spec["dataset"]["maxLength"] <= FLASH_TOKENS and spec["parallelism"]["pipelineParallelSize"] == 1)


def _near_length(spec: Object) -> str:
    low = spec["dataset"]["maxLength"] // FLASH_TOKENS * FLASH_TOKENS
    return f"use {low} or {low + FLASH_TOKENS}"


RULES: tuple[Rule, ...] = (
    Rule("BaseModelSource", "source", _SOURCE_MESSAGE, _SOURCE_CEL, _is_source, _near_source),
    Rule("Dataset", "source", _SOURCE_MESSAGE, _SOURCE_CEL, _is_source, _near_source),
    Rule(
        "Dataset",
        "files",
        "files must be a glob below the source: no leading `/` and no `..`",
        f"!has(self.files) || (!self.files.startsWith('/') && !self.files.matches(r'{_CLIMBS}'))",
        lambda dataset: _is_below(dataset.get("files")),
    ),
    Rule(
        "Dataset",
        "template",
        "template is required with format template: set template.prompt and template.completion",
        "self.format != 'template' || has(self.template)",
        lambda dataset: dataset["format"] != "template" or dataset.get("template") is not None,
    ),
    Rule(
        "Dataset",
        "template",
        "template is for format template, the format is {format}: remove it, or set format template",
        "self.format == 'template' || !has(self.template)",
        lambda dataset: dataset["format"] == "template" or dataset.get("template") is None,
    ),
    *(
        Rule(
            "RecordTemplate",
            field,
            f"{field} must have each field of the record in single braces by its name alone, and a brace of its own "
            "doubled",
            f"self.{field}.matches(r'{_TEMPLATE}')",
            lambda template, field=field: _is_template(template[field]),  # type: ignore[misc]
        )
        for field in ("prompt", "completion")
    ),
    Rule(
        "RecordTemplate",
        "completion",
        "completion must have a field of the record in braces: without one every answer is the same",
        f"!self.completion.matches(r'{_TEMPLATE}') || self.completion.matches(r'{_FILLED}')",
        lambda template: not _is_template(template["completion"]) or bool(template_fields(template["completion"])),
    ),
    Rule(
        "Lora",
        "targetModules",
        "targetModules must be all-linear alone or names of modules, not both",
        "size(self.targetModules) == 1 || !('all-linear' in self.targetModules)",
        lambda lora: len(lora["targetModules"]) == 1 or ALL_LINEAR not in lora["targetModules"],
    ),
    Rule(
        "Lora",
        "modulesToSave",
        "modulesToSave must name no module of targetModules, and not all-linear: a module is trained as a whole or has "
        "an adapter",
        "!has(self.modulesToSave) || !self.modulesToSave.exists(name, name == 'all-linear' || name in "
        "self.targetModules)",
        lambda lora: not _saved_twice(lora),
        lambda lora: f"remove {', '.join(_saved_twice(lora))} from one of them",
    ),
    Rule(
        "Method",
        "lora",
        "lora is required with type lora: set lora.rank and lora.targetModules",
        "self.type != 'lora' || has(self.lora)",
        lambda method: method["type"] != "lora" or method.get("lora") is not None,
    ),
    Rule(
        "Method",
        "lora",
        "lora cannot be set with type full: remove it, or set type lora",
        "self.type != 'full' || !has(self.lora)",
        lambda method: method["type"] != "full" or method.get("lora") is None,
    ),
    Rule(
        "Method",
        "quantization",
        "quantization must be none with type full: quantized weights cannot be trained",
        "self.type != 'full' || self.quantization == 'none'",
        lambda method: method["type"] != "full" or method["quantization"] == "none",
    ),
    Rule(
        "Training",
        "maxSteps",
        "exactly one of maxSteps and epochs must be set",
        "has(self.maxSteps) != has(self.epochs)",
        lambda training: (training.get("maxSteps") is None) != (training.get("epochs") is None),
    ),
    Rule(
        "Training",
        "warmupSteps",
        "warmupSteps must be at most maxSteps, {warmupSteps} is more than {maxSteps}",
        "!has(self.maxSteps) || self.warmupSteps <= self.maxSteps",
        lambda training: training.get("maxSteps") is None or training["warmupSteps"] <= training["maxSteps"],
        lambda training: f"use {training['maxSteps']} or less",
    ),
    Rule(
        "Accelerator",
        "instanceType",
        "instanceType is required with type cuda and neuron, such as ml.g5.12xlarge or ml.trn1.32xlarge",
        "self.type == 'cpu' || has(self.instanceType)",
        lambda accelerator: accelerator["type"] == "cpu" or accelerator.get("instanceType") is not None,
    ),
    Rule(
        "Accelerator",
        "processesPerNode",
        "processesPerNode is {processesPerNode}, but is for type cpu: remove it, the instance type decides",
        "self.type == 'cpu' || self.processesPerNode == 1",
        lambda accelerator: accelerator["type"] == "cpu" or accelerator["processesPerNode"] == 1,
    ),
    Rule(
        "Publish",
        "s3",
        "s3 is required: set publish.s3.uri (an endpoint serves what lies there)",
        "has(self.s3)",
        lambda publish: publish.get("s3") is not None,
    ),
    Rule(
        "Evaluate",
        "prompts",
        f"prompts must have at most {MAX_PROMPT_CHARACTERS} characters in all, with context and expected: they travel "
        "in an annotation; shorten them or remove some",
        "!has(self.prompts) || self.prompts.map(prompt, size(prompt.text) + "
        "(has(prompt.context) ? size(prompt.context) : 0) + "
        f"(has(prompt.expected) ? size(prompt.expected) : 0)).sum() <= {MAX_PROMPT_CHARACTERS}",
        lambda evaluate: _prompt_characters(evaluate) <= MAX_PROMPT_CHARACTERS,
        lambda evaluate: f"remove {_prompt_characters(evaluate) - MAX_PROMPT_CHARACTERS} characters",
    ),
    Rule(
        "Toleration",
        "value",
        "value must be absent with operator Exists",
        "self.operator != 'Exists' || !has(self.value)",
        lambda toleration: toleration["operator"] != "Exists" or toleration.get("value") is None,
    ),
    Rule(
        "Toleration",
        "key",
        "key is required with operator Equal: set it, or use operator Exists",
        "self.operator != 'Equal' || has(self.key)",
        lambda toleration: toleration["operator"] != "Equal" or toleration.get("key") is not None,
    ),
    Rule(
        "Evaluate",
        "gate",
        f"gate has no threshold: set one of {', '.join(THRESHOLDS)}, or remove the gate",
        f"!has(self.gate) || {' || '.join(f'has(self.gate.{name})' for name in THRESHOLDS)}",
        lambda evaluate: evaluate.get("gate") is None or _has_any(evaluate["gate"], THRESHOLDS),
    ),
    Rule(
        "FineTuneJobSpec",
        "evaluate.gate",
        f"evaluate.gate needs a held-out loss ({', '.join(_LOSS_THRESHOLDS)}): set dataset.validationPercent to at "
        "least 1 and evaluate.enabled to true, or remove the threshold",
        "!has(self.evaluate.gate) || "
        f"!({' || '.join(f'has(self.evaluate.gate.{name})' for name in _LOSS_THRESHOLDS)}) || "
        "(self.evaluate.enabled && self.dataset.validationPercent > 0)",
        lambda spec: (
            not _has_any(spec["evaluate"].get("gate"), _LOSS_THRESHOLDS)
            or (spec["evaluate"]["enabled"] and spec["dataset"]["validationPercent"] > 0)
        ),
    ),
    Rule(
        "FineTuneJobSpec",
        "evaluate.gate",
        f"evaluate.gate needs answers to compare with ({', '.join(_ANSWER_THRESHOLDS)}): give at least one of "
        "evaluate.prompts an expected answer and set evaluate.enabled to true, or remove the threshold",
        "!has(self.evaluate.gate) || "
        f"!({' || '.join(f'has(self.evaluate.gate.{name})' for name in _ANSWER_THRESHOLDS)}) || "
        "(self.evaluate.enabled && self.evaluate.prompts.exists(prompt, has(prompt.expected)))",
        lambda spec: (
            not _has_any(spec["evaluate"].get("gate"), _ANSWER_THRESHOLDS)
            or (
                spec["evaluate"]["enabled"]
                and any(prompt.get("expected") is not None for prompt in spec["evaluate"].get("prompts") or ())
            )
        ),
    ),
    Rule(
        "FineTuneJobSpec",
        "training.evaluateEverySteps",
        "training.evaluateEverySteps needs held-out records: set dataset.validationPercent to at least 1, or remove it",
        "!has(self.training.evaluateEverySteps) || self.dataset.validationPercent > 0",
        lambda spec: spec["training"].get("evaluateEverySteps") is None or spec["dataset"]["validationPercent"] > 0,
    ),
    Rule(
        "FineTuneJobSpec",
        "evaluate",
        "evaluate has nothing to do: set evaluate.prompts or dataset.validationPercent, or set evaluate.enabled to "
        "false",
        "!self.evaluate.enabled || self.dataset.validationPercent > 0 || size(self.evaluate.prompts) > 0",
        lambda spec: (
            not spec["evaluate"]["enabled"]
            or spec["dataset"]["validationPercent"] > 0
            or len(spec["evaluate"].get("prompts") or ()) > 0
        ),
    ),
    Rule(
        "FineTuneJobSpec",
        "evaluate.prompts",
        "evaluate.prompts has a context, and dataset.format {dataset.format} has no place for one: put it into the "
        "text, or use one of dolly, alpaca, messages, sharegpt, template",
        f"self.dataset.format in [{', '.join(map(repr, CONTEXT_FORMATS))}] || "
        "!self.evaluate.prompts.exists(prompt, has(prompt.context))",
        lambda spec: spec["dataset"]["format"] in CONTEXT_FORMATS or not _prompts_with_context(spec),
        lambda spec: f"it is in prompts {', '.join(map(str, _prompts_with_context(spec)))}",
    ),
    Rule(
        "FineTuneJobSpec",
        "publish.s3.contents",
        "publish.s3.contents is {publish.s3.contents}, and the job makes no whole model: set merge.enabled to true, or "
        "contents to adapter",
        f"{_NO_CONTENTS} || self.publish.s3.contents == 'adapter' || self.method.type == 'full' || self.merge.enabled",
        lambda spec: (
            _published(spec) not in ("model", "both") or spec["method"]["type"] == "full" or spec["merge"]["enabled"]
        ),
    ),
    Rule(
        "FineTuneJobSpec",
        "publish.s3.contents",
        "publish.s3.contents is {publish.s3.contents}, and method.type full leaves no adapter: set contents to model",
        f"{_NO_CONTENTS} || self.publish.s3.contents == 'model' || self.method.type != 'full'",
        lambda spec: _published(spec) not in ("adapter", "both") or spec["method"]["type"] != "full",
    ),
    Rule(
        "FineTuneJobSpec",
        "parallelism.strategy",
        "parallelism.strategy is fsdp with method.quantization {method.quantization}: quantized weights cannot be "
        "sharded; use ddp, or quantization none",
        "self.parallelism.strategy != 'fsdp' || self.method.quantization == 'none'",
        lambda spec: spec["parallelism"]["strategy"] != "fsdp" or spec["method"]["quantization"] == "none",
    ),
    Rule(
        "FineTuneJobSpec",
        "parallelism.strategy",
        "parallelism.strategy is fsdp, which is for accelerator types cpu and cuda: use ddp with neuron, whose "
        "optimizer is sharded anyway",
        "self.parallelism.strategy != 'fsdp' || self.accelerator.type != 'neuron'",
        lambda spec: spec["parallelism"]["strategy"] != "fsdp" or spec["accelerator"]["type"] != "neuron",
    ),
    Rule(
        "FineTuneJobSpec",
        "method.quantization",
        "method.quantization is {method.quantization}, which is for accelerator types cpu and cuda: bitsandbytes has "
        "no kernels for Trainium; use none",
        "self.accelerator.type != 'neuron' || self.method.quantization == 'none'",
        lambda spec: spec["accelerator"]["type"] != "neuron" or spec["method"]["quantization"] == "none",
    ),
    Rule(
        "FineTuneJobSpec",
        "method.lora.variant",
        "method.lora.variant is dora, which is for accelerator types cpu and cuda: on Trainium its magnitudes can be "
        "neither trained with shared key and value heads nor merged; use standard or rslora",
        "self.accelerator.type != 'neuron' || !has(self.method.lora) || self.method.lora.variant != 'dora'",
        lambda spec: spec["accelerator"]["type"] != "neuron" or _variant(spec) != "dora",
    ),
    Rule(
        "FineTuneJobSpec",
        "method.lora.modulesToSave",
        "method.lora.modulesToSave is for accelerator types cpu and cuda: the vendor's adapters on Trainium know "
        "low-rank matrices only, and its checkpoints would keep whole modules without a word on how they are split; "
        "remove it, or use method.type full",
        "self.accelerator.type != 'neuron' || !has(self.method.lora) || !has(self.method.lora.modulesToSave) || "
        "size(self.method.lora.modulesToSave) == 0",
        lambda spec: not _on_neuron(spec) or not (spec["method"].get("lora") or {}).get("modulesToSave"),
    ),
    Rule(
        "FineTuneJobSpec",
        "method.lora.targetModules",
        f"method.lora.targetModules must be all-linear or some of {', '.join(NEURON_TARGETS)} with accelerator type "
        "neuron, by these names alone: of other modules the vendor has no adapter, and a path into one block names a "
        "layer that it fuses with its neighbours",
        "self.accelerator.type != 'neuron' || !has(self.method.lora) || self.method.lora.targetModules.all(name, name "
        f"in [{', '.join(map(repr, (ALL_LINEAR, *NEURON_TARGETS)))}])",
        lambda spec: not _on_neuron(spec) or not _foreign_targets(spec),
        lambda spec: f"remove {', '.join(_foreign_targets(spec))}",
    ),
    Rule(
        "FineTuneJobSpec",
        "method.lora.targetModules",
        "method.lora.targetModules must have both of gate_proj and up_proj or none with accelerator type neuron, where "
        "they are one layer",
        "self.accelerator.type != 'neuron' || !has(self.method.lora) || ('gate_proj' in "
        "self.method.lora.targetModules) == ('up_proj' in self.method.lora.targetModules)",
        lambda spec: not _on_neuron(spec) or not _has_half_of_the_mlp(spec),
        lambda spec: f"add {'up_proj' if 'gate_proj' in _targets(spec) else 'gate_proj'}",
    ),
    Rule(
        "FineTuneJobSpec",
        "training.precision",
        "training.precision is {training.precision}, and with accelerator type neuron it must be bf16: the compiler "
        "casts float32 matrix products to bf16 by itself, and the optimizer keeps float32 copies of bf16 weights; use "
        "bf16",
        "self.accelerator.type != 'neuron' || self.training.precision == 'bf16'",
        lambda spec: not _on_neuron(spec) or spec["training"]["precision"] == "bf16",
    ),
    Rule(
        "FineTuneJobSpec",
        "dataset.maxLength",
        f"dataset.maxLength above {FLASH_TOKENS} must be a multiple of {FLASH_TOKENS} with accelerator type neuron, "
        "where the flash attention kernel takes no other length, is {dataset.maxLength}",
        f"self.accelerator.type != 'neuron' || self.dataset.maxLength <= {FLASH_TOKENS} || "
        f"self.dataset.maxLength % {FLASH_TOKENS} == 0",
        lambda spec: (
            not _on_neuron(spec)
            or spec["dataset"]["maxLength"] <= FLASH_TOKENS
            or spec["dataset"]["maxLength"] % FLASH_TOKENS == 0
        ),
        _near_length,
    ),
    Rule(
        "FineTuneJobSpec",
        "dataset.packing",
        "dataset.packing is bestFit, and with accelerator type neuron records of one row are kept apart by a mask that "
        f"neither flash attention (maxLength above {FLASH_TOKENS}) nor pipeline stages take; maxLength is "
        "{dataset.maxLength} and pipelineParallelSize {parallelism.pipelineParallelSize}: use none (a record a row), "
        "or wrapped, in whose rows records then see what stands before them",
        "self.accelerator.type != 'neuron' || self.dataset.packing != 'bestFit' || (self.dataset.maxLength <= "
        f"{FLASH_TOKENS} && self.parallelism.pipelineParallelSize == 1)",
        lambda spec: not _on_neuron(spec) or spec["dataset"]["packing"] != "bestFit" or _is_kept_apart(spec),
    ),
    Rule(
        "FineTuneJobSpec",
        "parallelism",
        "nodes x processesPerNode must be a multiple of tensorParallelSize x pipelineParallelSize, but "
        "{accelerator.nodes} x {accelerator.processesPerNode} is none of {parallelism.tensorParallelSize} x "
        "{parallelism.pipelineParallelSize}",
        "self.accelerator.type != 'cpu' || self.accelerator.nodes * self.accelerator.processesPerNode % "
        "(self.parallelism.tensorParallelSize * self.parallelism.pipelineParallelSize) == 0",
        lambda spec: spec["accelerator"]["type"] != "cpu" or _processes(spec) % _model_size(spec) == 0,
        _near_split,
    ),
)
"""Every rule; those of one kind in the order in which their problems are told."""


@cache
def rules_of(kind: str) -> tuple[Rule, ...]:
    """The rules of a type, in the order of the table."""
    return tuple(rule for rule in RULES if rule.kind == kind)
