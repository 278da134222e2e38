"""Everything that is wrong with a spec, at once: of each problem path, value, reason and the nearest valid fix.

The operator calls check_spec on every FineTuneJob (api/finetunejob.py), each stage check_part at its start on the part
of the spec that it reads (stage.py), and a preview check_spec on the file it is given: one set of checks, before
anything is downloaded. Types, bounds, enumerations and names of fields come from spec_schema.json, which `make
generate` writes from the operator's typed models; what needs several fields is in spec_rules.py. Standard library only,
and no I/O but reading that file.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finetune_trainer.spec_rules import Rule, rules_of

SCHEMA_FILE = "spec_schema.json"
_SHOWN = re.compile(r"\{([A-Za-z.]+)\}")
_LONGEST_VALUE = 200
"""Characters of a wrong value that a message shows."""

_PRODUCTS = (
    ("worldSize", ("numNodes", "procsPerNode")),
    ("worldSize", ("tensorParallelSize", "pipelineParallelSize", "dataParallelSize")),
    ("globalBatchSize", ("microBatchSize", "gradientAccumulationSteps", "dataParallelSize")),
)

_SIZES = tuple(dict.fromkeys(name for total, factors in _PRODUCTS for name in (total, *factors)))
STRATEGIES = ("ddp", "fsdp")

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the field's path from the object's root, its value, and a sentence with the remedy."""

    field: str
    value: Any
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class _BrokenRule(Problem):
    """A problem between values each of which is right by itself, so that other rules still can be judged by them."""


@cache
def spec_schema() -> Schema:
    """The schema of spec: JSON schema's words, `model` for an object's type, `keys` for the pattern of a map's keys."""
    schema: Schema = json.loads(Path(__file__).with_name(SCHEMA_FILE).read_text(encoding="utf-8"))
    return schema


def check_spec(spec: Any) -> tuple[Problem, ...]:
    """Every problem of a whole spec as a user writes it, in the order of its fields; empty when it is valid."""
    if not isinstance(spec, Mapping):
        return (Problem("spec", spec, "spec is required and must be an object"),)
    return tuple(_Walk().check(spec_schema(), spec, "spec"))


def check_part(spec: Mapping[str, Any], cut: tuple[str, ...] = ()) -> tuple[Problem, ...]:
    """Every problem of the part of a spec that a stage reads.

    Sections that are not there are no problem, nor are fields that are missing in the sections named in `cut`. A rule
    across sections counts where all of them are there.
    """
    return tuple(_Walk(part=True, cut=frozenset(f"spec.{name}" for name in cut)).check(spec_schema(), spec, "spec"))


def check_rules(spec: Mapping[str, Any]) -> tuple[Problem, ...]:
    """Every rule across fields that a whole spec breaks, whose types and bounds were checked and defaults filled in."""
    return tuple(_broken_rules(spec_schema(), spec, "spec"))


def check_parallelism(sizes: Mapping[str, Any]) -> tuple[Problem, ...]:
    """Every size of stage.json's `parallelism` that is no count or does not come out even with the others.

    worldSize = numNodes * procsPerNode = tensorParallelSize * pipelineParallelSize * dataParallelSize, and
    globalBatchSize = microBatchSize * gradientAccumulationSteps * dataParallelSize. A product counts where all of its
    sizes are there: prepare gets globalBatchSize only.
    """
    given = {name: sizes[name] for name in _SIZES if name in sizes}
    wrong = {name for name, size in given.items() if isinstance(size, bool) or not isinstance(size, int) or size < 1}
    problems = [
        Problem(f"parallelism.{name}", given[name], f"must be a whole number of at least 1, is {_shown(given[name])}")
        for name in given
        if name in wrong
    ]
    strategy = sizes.get("strategy", "ddp")
    if strategy not in STRATEGIES:
        problems.append(
            Problem("parallelism.strategy", strategy, f"must be {_either(STRATEGIES)}, is {_shown(strategy)}")
        )
    for name, factors in _PRODUCTS:
        if wrong & {name, *factors} or not sizes.keys() >= {name, *factors}:
            continue
        product = math.prod(sizes[factor] for factor in factors)
        if sizes[name] != product:
            shown = " x ".join(f"{factor} {sizes[factor]}" for factor in factors)
            problems.append(
                Problem(f"parallelism.{name}", sizes[name], f"must be {shown}, is {sizes[name]}: use {product}")
            )
    return tuple(problems)


def with_defaults(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a valid spec with every default filled in, as the API server fills them in."""
    filled: dict[str, Any] = _filled(spec_schema(), spec)
    return filled


@dataclass(frozen=True)
class _Walk:
    """One pass over a value and its schema. `part`: only some sections are there, those in `cut` without all fields."""

    part: bool = False
    cut: frozenset[str] = frozenset()

    def check(self, schema: Schema, value: Any, path: str) -> Iterator[Problem]:
        """The problems of `value` and of all below it."""
        if "properties" in schema:
            yield from self._check_object(schema, value, path)
        elif schema.get("type") == "object":
            yield from self._check_map(schema, value, path)
        elif schema.get("type") == "array":
            yield from self._check_list(schema, value, path)
        else:
            yield from _check_scalar(schema, value, path)

    def _check_object(self, schema: Schema, value: Any, path: str) -> Iterator[Problem]:
        if not isinstance(value, Mapping):
            yield Problem(path, value, f"must be an object, is {_shown(value)}")
            return
        fields, required = schema["properties"], schema.get("required", ())
        wrong: list[str] = []
        for name, field in fields.items():
            below = f"{path}.{name}"
            if value.get(name) is not None:  # null is absence, as it is for the API server
                for problem in self.check(field, value[name], below):
                    if not isinstance(problem, _BrokenRule):
                        wrong.append(problem.field)
                    yield problem
            elif name in required:
                wrong.append(below)
                if not (self.part and path == "spec") and path not in self.cut:
                    yield Problem(below, None, f"{name} is required: set {below}")
        for name, entry in value.items():
            if name not in fields:
                yield Problem(f"{path}.{name}", entry, f"there is no field {name}: {_near_field(str(name), fields)}")
        filled = _filled(schema, value)
        for rule in rules_of(schema["model"]):
            read = [f"{path}.{name}" for name in rule.reads]
            if any(_within(one, other) or _within(other, one) for one in read for other in wrong):
                continue  # nothing can be said of values that are wrong themselves
            if self.part and path == "spec" and any(name.partition(".")[0] not in value for name in rule.reads):
                continue
            if not rule.holds(filled):
                yield _broken(rule, filled, path)

    def _check_map(self, schema: Schema, value: Any, path: str) -> Iterator[Problem]:
        if not isinstance(value, Mapping):
            yield Problem(path, value, f"must be a map, is {_shown(value)}")
            return
        if len(value) > schema.get("maxProperties", math.inf):
            yield Problem(path, value, f"must have at most {schema['maxProperties']} entries, has {len(value)}")
        for name, entry in value.items():
            if not _fits(schema["keys"], str(name)):
                yield Problem(f"{path}.{name}", name, f"must match {schema['keys']}, is {_shown(name)}")
            yield from self.check(schema["additionalProperties"], entry, f"{path}.{name}")

    def _check_list(self, schema: Schema, value: Any, path: str) -> Iterator[Problem]:
        if not isinstance(value, (list, tuple)):
            yield Problem(path, value, f"must be a list, is {_shown(value)}")
            return
        if len(value) < schema.get("minItems", 0):
            yield Problem(path, value, f"must have at least {schema['minItems']} entries, has {len(value)}")
        if len(value) > schema.get("maxItems", math.inf):
            yield Problem(path, value, f"must have at most {schema['maxItems']} entries, has {len(value)}")
        for place, entry in enumerate(value):
            yield from self.check(schema["items"], entry, f"{path}[{place}]")
        keys = [_key(schema, entry) for entry in value]
        twice = [key for place, key in enumerate(keys) if key is not None and key in keys[:place]]
        if twice:
            yield Problem(path, value, f"has {_shown(twice[0])} twice: name it once")


def _key(schema: Schema, entry: Any) -> Any:
    """What tells an entry of a list from all others; None where entries may be equal."""
    kind = schema.get("x-kubernetes-list-type")
    if kind == "map" and isinstance(entry, Mapping):
        return ", ".join(str(entry.get(name)) for name in schema["x-kubernetes-list-map-keys"])
    return entry if kind == "set" else None


def _check_scalar(schema: Schema, value: Any, path: str) -> Iterator[Problem]:
    if schema.get("x-kubernetes-int-or-string") and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if "enum" in schema:
        if value not in schema["enum"] or not isinstance(value, str):
            near = difflib.get_close_matches(str(value), schema["enum"], n=1)
            remedy = f"; did you mean {near[0]!r}?" if near else ""
            yield Problem(path, value, f"must be {_either(schema['enum'])}, is {_shown(value)}{remedy}")
        return
    kind = schema.get("type", "string")
    if kind in ("integer", "number"):
        yield from _check_number(schema, value, path, whole=kind == "integer")
    elif kind == "boolean":
        if not isinstance(value, bool):
            yield Problem(path, value, f"must be true or false, is {_shown(value)}")
    elif not isinstance(value, str):
        yield Problem(path, value, f"must be text, is {_shown(value)}")
    elif len(value) < schema.get("minLength", 0):
        yield Problem(path, value, f"must have at least {schema['minLength']} characters, has {len(value)}")
    elif len(value) > schema.get("maxLength", math.inf):
        yield Problem(path, value, f"must have at most {schema['maxLength']} characters, has {len(value)}")
    elif "pattern" in schema and not _fits(schema["pattern"], value):
        yield Problem(path, value, f"must match {schema['pattern']}, is {_shown(value)}")


def _broken_rules(schema: Schema, value: Any, path: str) -> Iterator[Problem]:
    if "properties" in schema:
        for name in _may_break(schema["model"]):
            if name in value:
                yield from _broken_rules(schema["properties"][name], value[name], f"{path}.{name}")
        for rule in rules_of(schema["model"]):
            if not rule.holds(value):
                yield _broken(rule, value, path)
    elif "items" in schema:
        for place, entry in enumerate(value):
            yield from _broken_rules(schema["items"], entry, f"{path}[{place}]")


@cache
def _may_break(model: str) -> tuple[str, ...]:
    """The fields of a type below which a rule is, so that the others need not be walked."""
    return tuple(name for name, field in _object_schemas()[model]["properties"].items() if _has_rules(field))


@cache
def _object_schemas() -> Mapping[str, Schema]:
    """Every object's schema by its type."""
    found: dict[str, Schema] = {}
    left = [spec_schema()]
    while left:
        schema = left.pop()
        if "model" in schema:
            found[schema["model"]] = schema
        left.extend([*schema.get("properties", {}).values(), *filter(None, [schema.get("items")])])
    return found


def _has_rules(schema: Schema) -> bool:
    below = [*schema.get("properties", {}).values(), *filter(None, [schema.get("items")])]
    return bool("model" in schema and rules_of(schema["model"])) or any(map(_has_rules, below))


def _check_number(schema: Schema, value: Any, path: str, *, whole: bool) -> Iterator[Problem]:
    words = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        quoted = ": write it without quotes, and an exponent with a point, as in 2.0e-5" if _is_number(value) else ""
        yield Problem(path, value, f"must be {words}, is {_shown(value)}{quoted}")
        return
    if not math.isfinite(value):
        yield Problem(path, value, f"must be {words}, is {value}")
        return
    if whole and isinstance(value, float):
        near = " or ".join(str(number) for number in sorted({math.floor(value), math.ceil(value)}))
        yield Problem(path, value, f"must be a whole number, is {value}: use {near}")
        return
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and schema.get("exclusiveMinimum") and value <= low:
        yield Problem(path, value, f"must be more than {low}, is {value}")
    elif low is not None and value < low:
        yield Problem(path, value, f"must be at least {low}, is {value}")
    elif high is not None and schema.get("exclusiveMaximum") and value >= high:
        yield Problem(path, value, f"must be less than {high}, is {value}")
    elif high is not None and value > high:
        yield Problem(path, value, f"must be at most {high}, is {value}")


def _broken(rule: Rule, value: Mapping[str, Any], path: str) -> Problem:
    """The Problem of a rule that does not hold."""
    message = _SHOWN.sub(lambda shown: str(value_at(value, shown.group(1))), rule.message)
    fix = rule.fix(value)
    return _BrokenRule(f"{path}.{rule.field}", value_at(value, rule.field), f"{message}; {fix}" if fix else message)


def value_at(plain: Any, path: str) -> Any:
    """The value at a.b of a JSON object; None where it has none."""
    for name in path.split("."):
        plain = plain.get(name) if isinstance(plain, Mapping) else None
    return plain


def _filled(schema: Schema, value: Any) -> Any:
    """`value` with its schema's defaults, null taken for absence; what does not fit the schema stays as it is."""
    if "properties" in schema and isinstance(value, Mapping):
        out = {name: entry for name, entry in value.items() if entry is not None}
        for name, field in schema["properties"].items():
            if name not in out and "default" in field:
                out[name] = field["default"]
            if name in out:
                out[name] = _filled(field, out[name])
        return out
    if schema.get("type") == "array" and isinstance(value, (list, tuple)):
        return [_filled(schema["items"], entry) for entry in value]
    return value


def _within(path: str, other: str) -> bool:
    """True when `path` is `other` or lies below it."""
    return path == other or path.startswith((f"{other}.", f"{other}["))


def _near_field(name: str, fields: Mapping[str, Any]) -> str:
    # A name that differs in case or underscores alone is the field, however the two compare letter by letter.
    plain = {field.lower(): field for field in fields}
    near = plain.get(name.replace("_", "").replace("-", "").lower())
    close = [near] if near else difflib.get_close_matches(name, fields, n=1)
    return f"did you mean {close[0]}?" if close else f"fields here are {', '.join(fields)}"


def _fits(pattern: str, text: str) -> bool:
    """re.search as RE2 means it: `$` is the end of the text, not the end of its last line."""
    return re.search(re.sub(r"(?<!\\)\$$", r"\\Z", pattern), text) is not None


def _either(choices: Sequence[str]) -> str:
    quoted = [repr(choice) for choice in choices]
    return f"{', '.join(quoted[:-1])} or {quoted[-1]}" if len(quoted) > 1 else quoted[0]


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, str)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"
