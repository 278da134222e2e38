"""Turns the models' JSON schema into the structural OpenAPI v3 that a CRD takes.

Called by crd.py. The rules of rules.py and the defaults, bounds and meanings of spec.py and status.py end up in one
schema; nothing is added here that the models do not say, but the words for defaults and bounds in descriptions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from finetune_operator.api.constants import MAX_JOB_NAME_LENGTH
from finetune_operator.api.model import INT_OR_STRING, Model
from finetune_operator.api.rules import (
    MUTABLE_FIELDS,
    NAME_MESSAGE,
    NAME_PATTERN,
    TransitionRule,
    message_expression,
    transition_rules,
)
from finetune_operator.api.spec import FineTuneJobSpec
from finetune_operator.api.status import FineTuneJobStatus
from finetune_trainer.spec_rules import Rule, rules_of

Schema = dict[str, Any]

_COPIED = (
    "type",
    "format",
    "description",
    "enum",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "pattern",
    "minItems",
    "maxItems",
    "maxProperties",
    "required",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
)


def object_schema() -> Schema:
    """The schema of a whole FineTuneJob."""
    spec = _from_model(FineTuneJobSpec, with_defaults=True)
    for name, field in spec["properties"].items():
        if name not in MUTABLE_FIELDS:
            field["description"] += " Immutable while the job runs."
    status = _from_model(FineTuneJobStatus, with_defaults=False)
    status["description"] = "What is observed. Written by the operator only; derived anew from the job's Jobs and pods."
    return {
        "type": "object",
        "description": "FineTuneJob takes a base model and a dataset to a fine-tuned, merged and evaluated model.",
        "required": ["spec"],
        "x-kubernetes-validations": [
            {
                "rule": f"self.metadata.name.matches('{NAME_PATTERN}')",
                "message": NAME_MESSAGE,
                "fieldPath": ".metadata.name",
            },
            *(_validation(rule) for rule in transition_rules()),
        ],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": MAX_JOB_NAME_LENGTH}},
            },
            "spec": spec,
            "status": status,
        },
    }


def spec_schema() -> Schema:
    """What finetune_trainer.spec_checks holds a spec to: the schema of spec without words and without CEL.

    Each object has its class's name as `model`, by which the rules of spec_rules are found, and each map the pattern of
    its keys as `keys`.
    """
    return _bare(_from_model(FineTuneJobSpec, with_defaults=True, bare=True))


def _bare(schema: Schema) -> Schema:
    """`schema` without what only people and the API server read."""
    left_out = ("description", "format", "anyOf", "x-kubernetes-validations")
    out = {key: value for key, value in schema.items() if key not in left_out}
    for key in ("items", "additionalProperties"):
        if key in out:
            out[key] = _bare(out[key])
    if "properties" in out:
        out["properties"] = {name: _bare(field) for name, field in out["properties"].items()}
    return out


def _from_model(model: type[BaseModel], *, with_defaults: bool, bare: bool = False) -> Schema:
    """The structural schema of a model class, with the rules of every model below it; `bare` as in spec_schema."""
    source = model.model_json_schema(by_alias=True, mode="validation")
    definitions = source.pop("$defs", {})
    classes = {found.__name__: found for found in _models(model)}
    return _Converter(definitions, classes, with_defaults, bare).convert(source, model)


class _Converter:
    """One pass over a JSON schema: references inlined, null forms gone, defaults and bounds told in the description."""

    def __init__(
        self, definitions: Mapping[str, Any], classes: Mapping[str, type[BaseModel]], defaults: bool, bare: bool
    ) -> None:
        self._definitions = definitions
        self._classes = classes
        self._with_defaults = defaults
        self._bare = bare

    def convert(self, node: Mapping[str, Any], model: type[BaseModel] | None = None) -> Schema:
        """The structural form of `node`; `model` is the class that it describes, when it is an object of ours."""
        node, model = self._resolved(node, model)
        out: Schema = {key: node[key] for key in _COPIED if key in node}
        if node.get(INT_OR_STRING):
            out.pop("type", None)
            out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
            out[INT_OR_STRING] = True
        if out.get("type") == "integer":
            out["format"] = "int64"
        for bound, strict in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            if strict in node:
                # OpenAPI 3.0 has the bound and a flag, where JSON schema has a second bound.
                out[bound], out[strict] = node[strict], True
        if "items" in node:
            out["items"] = self.convert(node["items"])
        if "properties" in node:
            out["properties"] = {name: self._field(field) for name, field in node["properties"].items()}
        elif "patternProperties" in node:
            # A CRD has no pattern for the keys of a map; the models check them.
            ((keys, value),) = node["patternProperties"].items()
            out["additionalProperties"] = self.convert(value)
            if self._bare:
                out["keys"] = keys
        if self._bare and model is not None and "properties" in out:
            out["model"] = model.__name__
        if model is not None and issubclass(model, Model) and rules_of(model.__name__):
            out["x-kubernetes-validations"] = [_validation(rule) for rule in rules_of(model.__name__)]
        return out

    def _field(self, node: Mapping[str, Any]) -> Schema:
        """A property: as convert, with its default and with default and bounds in words."""
        out = self.convert(node)
        default = node.get("default")
        if self._with_defaults and default is not None:
            # An object's own fields have their defaults: {} makes the API server fill in those.
            out["default"] = {} if out.get("type") == "object" else default
        if self._with_defaults:
            out["description"] = " ".join([out["description"], *_facts(out, default)])
        return out

    def _resolved(
        self, node: Mapping[str, Any], model: type[BaseModel] | None
    ) -> tuple[Mapping[str, Any], type[BaseModel] | None]:
        """`node` with its reference or its null form replaced by what it stands for; its own words win."""
        if "anyOf" in node:
            real = [choice for choice in node["anyOf"] if choice.get("type") != "null"]
            if len(real) != 1:
                raise ValueError(f"a CRD cannot express a choice between types: {json.dumps(node)}")
            node = {**real[0], **{key: value for key, value in node.items() if key != "anyOf"}}
        if "$ref" in node:
            name = str(node["$ref"]).rpartition("/")[2]
            node = {**self._definitions[name], **{key: value for key, value in node.items() if key != "$ref"}}
            model = self._classes[name]
        return node, model


def _facts(schema: Mapping[str, Any], default: Any) -> Iterator[str]:
    """Default and bounds of a field, as sentences."""
    if default is not None and schema.get("type") != "object" and default != []:
        yield f"Default: {json.dumps(default) if not isinstance(default, str) else default or 'empty'}."
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        below = "exclusiveMaximum" in schema
        if "exclusiveMinimum" in schema:
            yield f"Above {low}, {'below' if below else 'at most'} {high}."
        else:
            yield f"From {low} to {'below ' if below else ''}{high}."
    if "maxItems" in schema:
        yield f"At most {schema['maxItems']} entries."
    if "maxProperties" in schema:
        yield f"At most {schema['maxProperties']} entries."
    if "maxLength" in schema and "enum" not in schema:
        yield f"At most {schema['maxLength']} characters."


def _validation(rule: Rule | TransitionRule) -> Schema:
    out = {"rule": rule.cel, "message": rule.message, "fieldPath": f".{rule.field}"}
    if isinstance(rule, Rule) and (expression := message_expression(rule)):
        out["messageExpression"] = expression
    return out


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """`model` and every model class reachable from its fields."""
    yield model
    for field in model.model_fields.values():
        yield from _models_in(field.annotation)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from _models(annotation)
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)
