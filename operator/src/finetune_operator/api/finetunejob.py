"""FineTuneJob as a typed value: parse_job makes it from an object of the API server, or says everything that is wrong.

Called by the handlers with what a watch delivers. The API server has checked the object against the CRD already; the
same checks run here for objects that an older CRD let in, and for manifests that never saw an API server. No I/O, no
clock.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from finetune_operator.api.constants import API_VERSION, KIND, MAX_JOB_NAME_LENGTH
from finetune_operator.api.features import unavailable_features
from finetune_operator.api.model import Model
from finetune_operator.api.problems import Problem, SpecError
from finetune_operator.api.rules import NAME_MESSAGE, NAME_PATTERN, broken_rules
from finetune_operator.api.spec import FineTuneJobSpec
from finetune_operator.api.status import FineTuneJobStatus

__all__ = [
    "FineTuneJob",
    "FineTuneJobSpec",
    "FineTuneJobStatus",
    "Problem",
    "SpecError",
    "parse_job",
    "parse_spec",
    "parse_status",
    "unavailable_features",
]


class FineTuneJob(BaseModel):
    """One FineTuneJob: who it is, what it wishes, and what was last observed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    namespace: str
    uid: str
    generation: int
    creation_timestamp: datetime | None
    deletion_timestamp: datetime | None
    """Set from the moment on at which somebody asked for the object's deletion."""
    spec: FineTuneJobSpec
    status: FineTuneJobStatus


def parse_job(body: Mapping[str, Any]) -> FineTuneJob:
    """The FineTuneJob in `body`, defaults filled in.

    SpecError carries every problem of name and spec at once, each with the field's path, its value and a remedy.
    """
    metadata = body.get("metadata") or {}
    problems = list(_identity_problems(body, metadata))
    spec: FineTuneJobSpec | None = None
    try:
        spec = parse_spec(body.get("spec"))
    except SpecError as error:
        problems.extend(error.problems)
    if spec is None or problems:
        raise SpecError(problems)
    return FineTuneJob(
        name=metadata["name"],
        namespace=metadata.get("namespace") or "default",
        uid=metadata.get("uid") or "",
        generation=metadata.get("generation") or 0,
        creation_timestamp=metadata.get("creationTimestamp"),
        deletion_timestamp=metadata.get("deletionTimestamp"),
        spec=spec,
        status=parse_status(body.get("status")),
    )


def parse_spec(value: Any) -> FineTuneJobSpec:
    """The spec in `value`; SpecError with every problem, rules across fields too where the fields themselves parse."""
    if not isinstance(value, Mapping):
        raise SpecError([Problem("spec", value, "spec is required and must be an object")])
    plain = json.loads(_as_json_text(value))
    problems: list[Problem] = []
    try:
        spec = FineTuneJobSpec.model_validate_json(_as_json_text(plain))
    except ValidationError as error:
        problems.extend(_explain(detail, plain) for detail in error.errors(include_url=False))
    else:
        problems.extend(problem for model, path in _walk(spec, "spec") for problem in broken_rules(model, path))
        if not problems:
            return spec
    if not any(problem.field == "spec" for problem in problems):
        known = {(problem.field, problem.message) for problem in problems}
        problems.extend(p for p in _rules_of_parts(FineTuneJobSpec, plain, "spec") if (p.field, p.message) not in known)
    raise SpecError(problems)


def parse_status(value: Any) -> FineTuneJobStatus:
    """The status in `value`; an empty one where there is none or another release wrote what this one cannot read.

    Nothing is lost by that: a status is only ever derived again, from the job's children.
    """
    if not isinstance(value, Mapping):
        return FineTuneJobStatus()
    try:
        return FineTuneJobStatus.model_validate_json(_as_json_text(value))
    except ValidationError:
        return FineTuneJobStatus()


def _as_json_text(value: Any) -> str:
    """JSON of an object that may hold read-only mappings of a framework; JSON is what the models parse strictly."""
    return json.dumps(value, default=dict)


def _identity_problems(body: Mapping[str, Any], metadata: Mapping[str, Any]) -> Iterator[Problem]:
    for field, expected in (("apiVersion", API_VERSION), ("kind", KIND)):
        if field in body and body[field] != expected:
            yield Problem(field, body[field], f"must be {expected}, is {body[field]!r}")
    name = metadata.get("name")
    if not isinstance(name, str) or len(name) > MAX_JOB_NAME_LENGTH or re.fullmatch(NAME_PATTERN, name) is None:
        yield Problem("metadata.name", name, NAME_MESSAGE)


def _walk(model: Model, path: str) -> Iterator[tuple[Model, str]]:
    """`model` and every model below it with its path; list entries as path[0]."""
    yield model, path
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        below = f"{path}.{field.alias or name}"
        if isinstance(value, Model):
            yield from _walk(value, below)
        elif isinstance(value, tuple):
            for position, entry in enumerate(value):
                if isinstance(entry, Model):
                    yield from _walk(entry, f"{below}[{position}]")


def _rules_of_parts(kind: type[Model], value: Any, path: str) -> Iterator[Problem]:
    """The broken rules of those parts of a spec that parse by themselves, where the whole does not."""
    if not isinstance(value, Mapping):
        return
    try:
        parsed = kind.model_validate_json(_as_json_text(value))
    except ValidationError:
        for name, field in kind.model_fields.items():
            alias = field.alias or name
            part = _model_in(field.annotation)
            if part is None or alias not in value:
                continue
            entries = value[alias]
            if isinstance(entries, list):
                for position, entry in enumerate(entries):
                    yield from _rules_of_parts(part, entry, f"{path}.{alias}[{position}]")
            else:
                yield from _rules_of_parts(part, entries, f"{path}.{alias}")
    else:
        for model, below in _walk(parsed, path):
            yield from broken_rules(model, below)


def _model_in(annotation: Any) -> type[Model] | None:
    """The model class inside X, X | None, tuple[X, ...] or an annotated form of these."""
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return annotation
    if get_origin(annotation) in (Union, UnionType, tuple) or hasattr(annotation, "__metadata__"):
        return next((model for model in map(_model_in, get_args(annotation)) if model is not None), None)
    return None


def _path(location: tuple[int | str, ...]) -> str:
    path = "spec"
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the object at `location` in the spec; empty where it is no model."""
    kind: type[Model] | None = FineTuneJobSpec
    for part in location:
        if kind is None:
            return []
        if isinstance(part, int):
            continue
        fields = {field.alias or name: field for name, field in kind.model_fields.items()}
        kind = _model_in(fields[part].annotation) if part in fields else None
    return [field.alias or name for name, field in kind.model_fields.items()] if kind is not None else []


_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a map",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


def _explain(detail: ErrorDetails, spec: Any) -> Problem:
    """A Problem in the words of the API for one error of the model library."""
    location = detail["loc"]
    # Keys of a map are reported under a "[key]" element that no user wrote.
    location = tuple(part for part in location if part != "[key]")
    path, name = _path(location), str(location[-1]) if location else "spec"
    given, context, kind = detail["input"], detail.get("ctx") or {}, detail["type"]
    if kind == "missing":
        return Problem(path, None, f"{name} is required: set {path}")
    if kind == "extra_forbidden":
        fields = _fields_at(location[:-1])
        close = difflib.get_close_matches(name, fields, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"fields here are {', '.join(fields)}"
        return Problem(path, given, f"there is no field {name}: {remedy}")
    if kind == "literal_error":
        close = difflib.get_close_matches(str(given), re.findall(r"'([^']*)'", str(context["expected"])), n=1)
        remedy = f"; did you mean {close[0]!r}?" if close else ""
        return Problem(path, given, f"must be {context['expected']}, is {given!r}{remedy}")
    if kind in _KINDS:
        number = kind in ("int_type", "float_type") and isinstance(given, str)
        remedy = ": write it without quotes, and an exponent with a point, as in 2.0e-5" if number else ""
        return Problem(path, given, f"must be {_KINDS[kind]}, is {given!r}{remedy}")
    bounds = {
        "greater_than": ("gt", "more than"),
        "greater_than_equal": ("ge", "at least"),
        "less_than": ("lt", "less than"),
        "less_than_equal": ("le", "at most"),
    }
    if kind in bounds:
        key, words = bounds[kind]
        return Problem(path, given, f"must be {words} {context[key]}, is {given!r}")
    if kind in ("string_too_long", "too_long"):
        unit = "characters" if kind == "string_too_long" else "entries"
        return Problem(path, given, f"must have at most {context['max_length']} {unit}, has {len(given)}")
    if kind in ("string_too_short", "too_short"):
        unit = "characters" if kind == "string_too_short" else "entries"
        return Problem(path, given, f"must have at least {context['min_length']} {unit}, has {len(given)}")
    if kind == "string_pattern_mismatch":
        return Problem(path, given, f"must match {context['pattern']}, is {given!r}")
    return Problem(path, given, f"{detail['msg']}, is {given!r}")
