"""Checks that need more than one field, each written once as CEL for the API server and once as Python.

The generator puts the CEL into the CRD, so a wrong object is refused at `kubectl apply`; parse_job runs the Python
over objects that an older CRD let in. A contract test holds both to the same table of wrong specs. Rules that compare
with the old object (immutability) exist in CEL only: transition_rules().
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from finetune_operator.api.constants import MAX_JOB_NAME_LENGTH
from finetune_operator.api.model import Model
from finetune_operator.api.overrides import Toleration
from finetune_operator.api.problems import Problem
from finetune_operator.api.spec import (
    MAX_PROMPT_CHARACTERS,
    Accelerator,
    BaseModelSource,
    Dataset,
    Evaluate,
    EvaluationPrompt,
    FineTuneJobSpec,
    Lora,
    Method,
    Publish,
    Training,
)

_HUB_NAME = "[A-Za-z0-9][-A-Za-z0-9_.]*"
_SOURCE = f"(hf://{_HUB_NAME}/{_HUB_NAME}|s3://[a-z0-9][-a-z0-9.]+(/[^/].*)?|workspace:///[^/].*)"
_SHOWN = re.compile(r"\{([A-Za-z.]+)\}")
_CLIMBS = r"(^|/)\.\.(/|$)"
_SOURCE_MESSAGE = "source must be hf://org/name, s3://bucket/prefix or workspace:///path without `..`, is {source}"
_SOURCE_CEL = f"self.source.matches(r'^{_SOURCE}$') && !self.source.matches(r'{_CLIMBS}')"


@dataclass(frozen=True)
class Rule:
    """One check of a model: `cel` over self in the schema, `holds` over the parsed model, `field`: what to point at.

    The message may show values: {a.b} stands for field a.b below self, which must be there wherever the rule breaks.
    """

    field: str
    message: str
    cel: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class TransitionRule:
    """A check of an update, of the whole object against the one before."""

    field: str
    message: str
    cel: str


ModelT = TypeVar("ModelT", bound=Model)


def _rule(
    kind: type[ModelT], field: str, message: str, cel: str, holds: Callable[[ModelT], bool]
) -> tuple[type[Model], Rule]:
    """A row of the table; `kind` gives `holds` its type."""
    return kind, Rule(field, message, cel, holds)


def _is_source(source: str) -> bool:
    return re.fullmatch(_SOURCE, source) is not None and re.search(_CLIMBS, source) is None


def _prompt_length(prompt: EvaluationPrompt) -> int:
    return len(prompt.text) + len(prompt.context or "") + len(prompt.expected or "")


def _splits_evenly(spec: FineTuneJobSpec) -> bool:
    world_size = spec.accelerator.nodes * spec.accelerator.processes_per_node
    model_size = spec.parallelism.tensor_parallel_size * spec.parallelism.pipeline_parallel_size
    return spec.accelerator.type != "cpu" or world_size % model_size == 0


_TABLE: tuple[tuple[type[Model], Rule], ...] = (
    _rule(BaseModelSource, "source", _SOURCE_MESSAGE, _SOURCE_CEL, lambda model: _is_source(model.source)),
    _rule(Dataset, "source", _SOURCE_MESSAGE, _SOURCE_CEL, lambda dataset: _is_source(dataset.source)),
    _rule(
        Dataset,
        "files",
        "files must be a glob below the source: no leading `/` and no `..`",
        f"!has(self.files) || (!self.files.startsWith('/') && !self.files.matches(r'{_CLIMBS}'))",
        lambda dataset: (
            dataset.files is None or (not dataset.files.startswith("/") and re.search(_CLIMBS, dataset.files) is None)
        ),
    ),
    _rule(
        Dataset,
        "template",
        "template is required with format template: set template.prompt and template.completion",
        "self.format != 'template' || has(self.template)",
        lambda dataset: dataset.format != "template" or dataset.template is not None,
    ),
    _rule(
        Dataset,
        "template",
        "template is for format template, the format is {format}: remove it, or set format template",
        "self.format == 'template' || !has(self.template)",
        lambda dataset: dataset.format == "template" or dataset.template is None,
    ),
    _rule(
        Lora,
        "targetModules",
        "targetModules must be all-linear alone or names of modules, not both",
        "size(self.targetModules) == 1 || !('all-linear' in self.targetModules)",
        lambda lora: len(lora.target_modules) == 1 or "all-linear" not in lora.target_modules,
    ),
    _rule(
        Method,
        "lora",
        "lora is required with type lora: set lora.rank and lora.targetModules",
        "self.type != 'lora' || has(self.lora)",
        lambda method: method.type != "lora" or method.lora is not None,
    ),
    _rule(
        Method,
        "lora",
        "lora cannot be set with type full: remove it, or set type lora",
        "self.type != 'full' || !has(self.lora)",
        lambda method: method.type != "full" or method.lora is None,
    ),
    _rule(
        Method,
        "quantization",
        "quantization must be none with type full: quantized weights cannot be trained",
        "self.type != 'full' || self.quantization == 'none'",
        lambda method: method.type != "full" or method.quantization == "none",
    ),
    _rule(
        Training,
        "maxSteps",
        "exactly one of maxSteps and epochs must be set",
        "has(self.maxSteps) != has(self.epochs)",
        lambda training: (training.max_steps is None) != (training.epochs is None),
    ),
    _rule(
        Training,
        "warmupSteps",
        "warmupSteps must be at most maxSteps, {warmupSteps} is more than {maxSteps}",
        "!has(self.maxSteps) || self.warmupSteps <= self.maxSteps",
        lambda training: training.max_steps is None or training.warmup_steps <= training.max_steps,
    ),
    _rule(
        Accelerator,
        "instanceType",
        "instanceType is required with type cuda and neuron, such as ml.g5.12xlarge or ml.trn1.32xlarge",
        "self.type == 'cpu' || has(self.instanceType)",
        lambda accelerator: accelerator.type == "cpu" or accelerator.instance_type is not None,
    ),
    _rule(
        Accelerator,
        "processesPerNode",
        "processesPerNode is {processesPerNode}, but is for type cpu: remove it, the instance type decides",
        "self.type == 'cpu' || self.processesPerNode == 1",
        lambda accelerator: accelerator.type == "cpu" or accelerator.processes_per_node == 1,
    ),
    _rule(
        Publish,
        "s3",
        "s3 is required: set publish.s3.uri (an endpoint serves what lies there)",
        "has(self.s3)",
        lambda publish: publish.s3 is not None,
    ),
    _rule(
        Evaluate,
        "prompts",
        f"prompts must have at most {MAX_PROMPT_CHARACTERS} characters in all, with context and expected: they travel "
        "in an annotation; shorten them or remove some",
        "!has(self.prompts) || self.prompts.map(prompt, size(prompt.text) + "
        "(has(prompt.context) ? size(prompt.context) : 0) + "
        f"(has(prompt.expected) ? size(prompt.expected) : 0)).sum() <= {MAX_PROMPT_CHARACTERS}",
        lambda evaluate: sum(map(_prompt_length, evaluate.prompts)) <= MAX_PROMPT_CHARACTERS,
    ),
    _rule(
        Toleration,
        "value",
        "value must be absent with operator Exists",
        "self.operator != 'Exists' || !has(self.value)",
        lambda toleration: toleration.operator != "Exists" or toleration.value is None,
    ),
    _rule(
        Toleration,
        "key",
        "key is required with operator Equal: set it, or use operator Exists",
        "self.operator != 'Equal' || has(self.key)",
        lambda toleration: toleration.operator != "Equal" or toleration.key is not None,
    ),
    _rule(
        FineTuneJobSpec,
        "evaluate.gate",
        "evaluate.gate needs a held-out loss: set dataset.validationPercent to at least 1 and evaluate.enabled to "
        "true, or remove the gate",
        "!has(self.evaluate.gate) || (self.evaluate.enabled && self.dataset.validationPercent > 0)",
        lambda spec: spec.evaluate.gate is None or (spec.evaluate.enabled and spec.dataset.validation_percent > 0),
    ),
    _rule(
        FineTuneJobSpec,
        "evaluate",
        "evaluate has nothing to do: set evaluate.prompts or dataset.validationPercent, or set evaluate.enabled to "
        "false",
        "!self.evaluate.enabled || self.dataset.validationPercent > 0 || size(self.evaluate.prompts) > 0",
        lambda spec: not spec.evaluate.enabled or spec.dataset.validation_percent > 0 or len(spec.evaluate.prompts) > 0,
    ),
    _rule(
        FineTuneJobSpec,
        "parallelism.strategy",
        "parallelism.strategy is fsdp with method.quantization {method.quantization}: quantized weights cannot be "
        "sharded; use ddp, or quantization none",
        "self.parallelism.strategy != 'fsdp' || self.method.quantization == 'none'",
        lambda spec: spec.parallelism.strategy != "fsdp" or spec.method.quantization == "none",
    ),
    _rule(
        FineTuneJobSpec,
        "parallelism.strategy",
        "parallelism.strategy is fsdp, which is for accelerator types cpu and cuda: use ddp with neuron, whose "
        "optimizer is sharded anyway",
        "self.parallelism.strategy != 'fsdp' || self.accelerator.type != 'neuron'",
        lambda spec: spec.parallelism.strategy != "fsdp" or spec.accelerator.type != "neuron",
    ),
    _rule(
        FineTuneJobSpec,
        "parallelism",
        "nodes x processesPerNode must be a multiple of tensorParallelSize x pipelineParallelSize, but "
        "{accelerator.nodes} x {accelerator.processesPerNode} is none of {parallelism.tensorParallelSize} x "
        "{parallelism.pipelineParallelSize}",
        "self.accelerator.type != 'cpu' || self.accelerator.nodes * self.accelerator.processesPerNode % "
        "(self.parallelism.tensorParallelSize * self.parallelism.pipelineParallelSize) == 0",
        _splits_evenly,
    ),
)


def rules_of(kind: type[Model]) -> tuple[Rule, ...]:
    """The rules of a model class, in the order of the table."""
    return tuple(rule for model, rule in _TABLE if model is kind)


def broken_rules(model: Model, path: str) -> Iterator[Problem]:
    """A Problem for each rule that `model` itself breaks; `path` is where it stands, such as spec.training."""
    plain = model.as_json()
    for rule in rules_of(type(model)):
        if not rule.holds(model):
            message = _SHOWN.sub(lambda shown: str(_value_at(plain, shown.group(1))), rule.message)
            yield Problem(f"{path}.{rule.field}", _value_at(plain, rule.field), message)


def message_expression(rule: Rule) -> str | None:
    """CEL that makes the rule's message with its values; None where it shows none."""
    names = _SHOWN.findall(rule.message)
    if not names:
        return None
    # The API server prices format() by its arguments' bounds, and string() of a number as if it had none.
    template = _SHOWN.sub("%s", rule.message.replace("%", "%%"))
    return f"{json.dumps(template, ensure_ascii=False)}.format([{', '.join(f'self.{name}' for name in names)}])"


def _value_at(plain: Any, path: str) -> Any:
    """The value at a.b of a JSON object; None where it has none."""
    for name in path.split("."):
        plain = plain.get(name) if isinstance(plain, dict) else None
    return plain


NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
NAME_MESSAGE = (
    f"metadata.name must be at most {MAX_JOB_NAME_LENGTH} lower-case letters, digits and `-`, beginning with a letter: "
    "it names Jobs, Services and labels"
)

MUTABLE_FIELDS = frozenset({"suspend", "retryPolicy", "activeDeadlineSeconds", "ttlSecondsAfterFinished", "dryRun"})
"""Fields of the spec that no stage reads. All others, later ones too, are immutable while the job runs."""


def _immutable(name: str, *, always_there: bool) -> TransitionRule:
    """The field keeps its value unless the job was suspended before the update, has ended, or was only planned.

    A dry run has a plan in its status, and a start time as long as a stage runs all the same.
    """
    new, old = f"self.spec.{name}", f"oldSelf.spec.{name}"
    same = f"{new} == {old}" if always_there else f"has({new}) == has({old}) && (!has({new}) || {new} == {old})"
    return TransitionRule(
        field=f"spec.{name}",
        message=f"spec.{name} is immutable while the job runs: set spec.suspend to true first, then change it",
        cel=f"({same}) || oldSelf.spec.suspend || (has(oldSelf.status) && (has(oldSelf.status.completionTime) || "
        "(has(oldSelf.status.plan) && !has(oldSelf.status.startTime))))",
    )


def transition_rules() -> tuple[TransitionRule, ...]:
    """The checks of an update: one for each immutable field, in the spec's order."""
    fields = ((field.alias or name, field) for name, field in FineTuneJobSpec.model_fields.items())
    return tuple(
        _immutable(name, always_there=field.is_required() or field.default is not None)
        for name, field in fields
        if name not in MUTABLE_FIELDS
    )
