"""The text of docs/api.md: every field of the CRD's schema as a table, and the closed lists of words.

Called by crd.py with the CRD that it made, so that the page cannot differ from what `kubectl explain` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune_operator.api import constants

_HEAD = f"""<!-- Generated from operator/src/finetune_operator/api by `make generate`; edit there. -->
# {constants.KIND} reference

`apiVersion: {constants.API_VERSION}`, `kind: {constants.KIND}`, short name `{constants.SHORT_NAME}`, category
`{constants.CATEGORY}`. The same texts are in `kubectl explain {constants.SHORT_NAME}.spec`.
"""


def markdown(definition: Mapping[str, Any]) -> str:
    """The page for a CustomResourceDefinition."""
    version = definition["spec"]["versions"][0]
    schema = version["schema"]["openAPIV3Schema"]
    return "\n".join(
        [
            _HEAD,
            *_section("spec", schema["properties"]["spec"]),
            "## Checks across fields",
            "",
            "The API server refuses an object that breaks one of these, and the operator checks them again.",
            "",
            *sorted({f"- {rule['message']}." for rule in _rules(schema)}),
            "",
            *_section("status", schema["properties"]["status"]),
            "## Columns",
            "",
            "`-o wide` adds those marked so.",
            "",
            "| column | field | meaning |",
            "|---|---|---|",
            *(
                f"| {column['name'].upper()}{' (wide)' if column.get('priority') else ''} | `{column['jsonPath'][1:]}` "
                f"| {column['description']} |"
                for column in version["additionalPrinterColumns"]
            ),
            "",
            *_words("Conditions", constants.ConditionType),
            *_words("Phases", constants.Phase),
            *_words("States of a stage", constants.StageState),
            *_words("Reasons", constants.Reason),
            *_words("Events", constants.EventReason),
        ]
    )


def _section(path: str, schema: Mapping[str, Any]) -> Iterator[str]:
    """The table of an object's fields, then those of the objects in it, depth first."""
    yield f"## {path}"
    yield ""
    yield schema["description"]
    yield ""
    yield "| field | type | meaning |"
    yield "|---|---|---|"
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        mark = " (required)" if name in required else ""
        yield f"| `{name}`{mark} | {_type(field)} | {_cell(field['description'])} |"
    yield ""
    seen: dict[str, str] = {}
    for name, field in schema["properties"].items():
        inner = field.get("items", field)
        if "properties" not in inner:
            continue
        below = f"{path}.{name}[]" if inner is not field else f"{path}.{name}"
        same = seen.get(repr(inner["properties"]))
        if same is not None:
            # spec.stages has one form for every stage.
            yield f"## {below}\n\nAs {same}.\n"
            continue
        seen[repr(inner["properties"])] = below
        yield from _section(below, {**inner, "description": field["description"]})


def _type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("x-kubernetes-int-or-string"):
        return "quantity"
    if schema["type"] == "array":
        return f"list of {_type(schema['items'])}"
    if "additionalProperties" in schema:
        return f"map to {_type(schema['additionalProperties'])}"
    if schema.get("format") == "date-time":
        return "time"
    return str(schema["type"])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _rules(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from schema.get("x-kubernetes-validations", ())
    for inner in schema.get("properties", {}).values():
        yield from _rules(inner)
    if "items" in schema:
        yield from _rules(schema["items"])


def _words(title: str, words: type[constants.Word]) -> Iterator[str]:
    yield f"## {title}"
    yield ""
    yield "| word | meaning |"
    yield "|---|---|"
    for word in words:
        yield f"| `{word.value}` | {word.meaning} |"
    yield ""
