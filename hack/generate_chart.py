#!/usr/bin/env python3
"""Makes what follows from the chart's values.yaml and from crds/: values.schema.json, the README's table, files/crds.

`make generate` runs it; with --check it changes nothing and fails where a file is not what it would write. A value's
description is the comment above its key. `# @schema` in that comment gives the type that the default does not show:
a JSON schema, or the name of one in SHAPES. A value without a comment, and an empty list or map without `@schema`, is
an error: values.yaml has to say what everything is.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts" / "finetune-operator"
TABLE_START = "<!-- values: made by hack/generate_chart.py from values.yaml -->\n"
TABLE_END = "<!-- end of values -->\n"

STRINGS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITIES: dict[str, Any] = {"type": "object", "additionalProperties": {"type": ["string", "integer", "number"]}}
RESOURCES: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"requests": QUANTITIES, "limits": QUANTITIES},
}
TOLERATIONS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "key": {"type": "string"},
            "operator": {"enum": ["Exists", "Equal"]},
            "value": {"type": "string"},
            "effect": {"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
            "tolerationSeconds": {"type": "integer"},
        },
    },
}
ENV: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["name", "value"],
        "properties": {"name": {"type": "string", "minLength": 1}, "value": {"type": "string"}},
    },
}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 1}
AMOUNT: dict[str, Any] = {"type": "number", "minimum": 0}
INSTANCE_TYPES: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "accelerator": {"enum": ["cpu", "cuda", "neuron"]},
            "devices": {"type": "integer", "minimum": 0},
            "coresPerDevice": COUNT,
            "efa": {"type": "integer", "minimum": 0},
            "vcpus": COUNT,
            "memoryGib": {"type": "number", "minimum": 0.5},
            "deviceMemoryGib": AMOUNT,
            "bf16TflopsPerDevice": AMOUNT,
            "pricePerHour": AMOUNT,
        },
    },
}
_SIZES = ("hiddenSize", "layers", "heads", "kvHeads", "intermediateSize", "vocabSize", "parameters")
MODELS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "additionalProperties": False,
        "required": list(_SIZES),
        "properties": {
            **dict.fromkeys(_SIZES, COUNT),
            "tied": {"type": "boolean"},
            "biased": {"type": "boolean"},
            "modelType": {"type": "string", "pattern": "^[a-z0-9_-]+$"},
            "headDim": COUNT,
        },
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "strings": STRINGS,
    "resources": RESOURCES,
    "tolerations": TOLERATIONS,
    "instanceTypes": INSTANCE_TYPES,
    "models": MODELS,
    "seconds": {"type": "number", "exclusiveMinimum": 0, "maximum": 2592000},
    "names": {"type": "array", "uniqueItems": True, "items": {"type": "string", "minLength": 1, "maxLength": 253}},
    "affinity": {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: {"type": "object"} for name in ("nodeAffinity", "podAffinity", "podAntiAffinity")},
    },
    "stage": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "resources": RESOURCES,
            "nodeSelector": STRINGS,
            "tolerations": TOLERATIONS,
            "env": ENV,
            "image": {"type": "string", "minLength": 1},
            "terminationGracePeriodSeconds": {"type": "integer", "minimum": 0},
        },
    },
}


@dataclass(frozen=True)
class Value:
    """One leaf of values.yaml: dotted path, default, description and JSON schema."""

    path: str
    default: Any
    description: str
    schema: dict[str, Any]


def comment_above(lines: list[str], line: int) -> tuple[str, str]:
    """(description, what follows `@schema`) of the comment lines directly above line number `line` (from 0)."""
    block: list[str] = []
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        block.insert(0, lines[line].lstrip().removeprefix("#").strip())
    schema = [text.removeprefix("@schema").strip() for text in block if text.startswith("@schema")]
    return " ".join(text for text in block if not text.startswith("@schema")), " ".join(schema)


def schema_of(path: str, default: Any, declared: str) -> dict[str, Any]:
    """The JSON schema of one leaf; SystemExit when neither its default nor `@schema` tells."""
    if declared:
        return dict(SHAPES[declared]) if declared in SHAPES else dict(json.loads(declared))
    for kind, name in ((bool, "boolean"), (int, "integer"), (str, "string")):
        if isinstance(default, kind):
            return {"type": name}
    raise SystemExit(f"values.yaml: {path}: the default {default!r} does not show the type; add a `# @schema` line")


def read_values(text: str) -> tuple[list[Value], dict[str, Any]]:
    """Every leaf of values.yaml in order, and the JSON schema of the whole."""
    lines = text.splitlines()
    leaves: list[Value] = []

    def walk(node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
        properties: dict[str, Any] = {}
        for key_node, value_node in node.value:
            path = f"{prefix}{key_node.value}"
            description, declared = comment_above(lines, key_node.start_mark.line)
            if isinstance(value_node, yaml.MappingNode) and value_node.value and not declared:
                properties[key_node.value] = walk(value_node, f"{path}.")
                continue
            if not description:
                raise SystemExit(f"values.yaml: {path} has no comment above it; say what it is")
            default = yaml.safe_load(yaml.serialize(value_node))
            schema = {"description": description, **schema_of(path, default, declared)}
            leaves.append(Value(path, default, description, schema))
            properties[key_node.value] = schema
        return {
            "type": "object",
            "additionalProperties": False,
            "required": sorted(properties),
            "properties": properties,
        }

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise SystemExit("values.yaml is no map of values")
    schema = walk(root, "")
    # Helm itself adds `global` where this chart is another one's dependency.
    schema["properties"]["global"] = {"type": "object"}
    return leaves, {"$schema": "http://json-schema.org/draft-07/schema#", **schema}


def table(leaves: list[Value]) -> str:
    """The README's Markdown table of all values."""
    rows = ["| value | default | meaning |", "|---|---|---|"]
    for leaf in leaves:
        description = leaf.description.replace("|", "\\|")
        rows.append(f"| `{leaf.path}` | `{json.dumps(leaf.default, ensure_ascii=False)}` | {description} |")
    return "\n".join(rows) + "\n"


def outputs() -> dict[Path, str]:
    """Every file this script makes, with what belongs in it. Reads values.yaml, README.md and crds/."""
    leaves, schema = read_values((CHART / "values.yaml").read_text(encoding="utf-8"))
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition(TABLE_START)
    _, _, after = rest.partition(TABLE_END)
    wanted = {
        CHART / "values.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
        CHART / "README.md": f"{before}{TABLE_START}{table(leaves)}{TABLE_END}{after}",
    }
    for crd in sorted((ROOT / "crds").glob("*.yaml")):
        wanted[CHART / "files" / "crds" / crd.name] = crd.read_text(encoding="utf-8")
    return wanted


def differences(wanted: dict[Path, str]) -> list[Path]:
    """Files that are missing, are not as wanted, or lie in files/crds with no counterpart in crds/."""
    wrong = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    return wrong + [path for path in sorted((CHART / "files" / "crds").glob("*")) if path not in wanted]


def main(arguments: list[str]) -> int:
    """Write what differs, or with --check name it and return 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a file is not up to date")
    options = parser.parse_args(arguments)
    wanted = outputs()
    wrong = differences(wanted)
    if options.check:
        for path in wrong:
            print(f"{path.relative_to(ROOT)} does not follow from its source; run `make generate`", file=sys.stderr)
        return 1 if wrong else 0
    for path in wrong:
        if path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
        else:
            path.unlink()
        print(f"generate: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
