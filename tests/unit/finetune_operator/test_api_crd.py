"""The generated files: up to date, complete, and within what a CRD may say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.api import constants
from finetune_operator.api.crd import custom_resource_definition, generated_files, main
from finetune_operator.api.finetunejob import parse_job, parse_spec
from finetune_operator.api.model import INT_OR_STRING
from finetune_operator.api.rules import MUTABLE_FIELDS

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
GENERATED = generated_files()
SCHEMA = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def nodes(schema: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema below `schema` with its path."""
    yield path, schema
    for name, field in schema.get("properties", {}).items():
        yield from nodes(field, f"{path}.{name}" if path else name)
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")
    if "additionalProperties" in schema:
        yield from nodes(schema["additionalProperties"], f"{path}{{}}")


ALL = [(path, node) for path, node in nodes(SCHEMA) if path.startswith(("spec", "status"))]


@pytest.mark.parametrize("name", sorted(GENERATED))
def test_a_generated_file_is_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == GENERATED[name], "run `make generate`"


def test_the_generator_writes_below_the_folder_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 0
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == set(GENERATED)
    assert len(capsys.readouterr().out.splitlines()) == len(written)


def test_every_field_has_a_description() -> None:
    missing = [path for path, node in ALL if not path.endswith(("[]", "{}")) and len(node.get("description", "")) < 8]
    assert missing == []


def test_every_string_list_and_map_has_a_bound() -> None:
    unbounded = []
    for path, node in ALL:
        kind = node.get("type")
        bounded = {
            "string": "maxLength" in node or "enum" in node or node.get("format") == "date-time",
            "array": "maxItems" in node,
            "object": "properties" in node or "maxProperties" in node,
        }.get(kind, INT_OR_STRING not in node or "maxLength" in node)
        if not bounded:
            unbounded.append(path)
    assert unbounded == []


def test_nothing_is_left_that_a_structural_schema_forbids() -> None:
    allowed_choice = [{"type": "integer"}, {"type": "string"}]
    for path, node in ALL:
        assert not {"$ref", "$defs", "title", "const", "propertyNames", "oneOf", "allOf"} & set(node), path
        assert node.get("anyOf", allowed_choice) == allowed_choice, path
        assert isinstance(node.get("exclusiveMinimum", True), bool), path
        assert node.get("additionalProperties") is not False, path
        assert "type" in node or INT_OR_STRING in node, path


def test_what_has_a_default_says_so_and_is_not_required() -> None:
    for path, node in ALL:
        for name, field in node.get("properties", {}).items():
            if "default" in field:
                assert name not in node.get("required", ()), f"{path}.{name}"
                if field["type"] not in ("object", "array"):
                    assert "Default: " in field["description"], f"{path}.{name}"


def test_the_models_and_the_schema_have_the_same_defaults() -> None:
    """Filling in the schema's defaults, as the API server does, gives what the models fill in."""

    def filled(schema: Mapping[str, Any], value: Any) -> Any:
        if not isinstance(value, dict) or "properties" not in schema:
            return value
        out = dict(value)
        for name, field in schema["properties"].items():
            if name not in out and "default" in field:
                out[name] = field["default"]
            if name in out:
                out[name] = filled(field, out[name])
        return out

    minimal: dict[str, Any] = {
        "model": {"source": "hf://a/b"},
        "dataset": {"source": "hf://a/b", "format": "dolly"},
        "method": {"lora": {"rank": 1, "targetModules": ["q_proj"]}},
        "training": {"maxSteps": 1, "learningRate": 0.1},
        "accelerator": {"type": "cpu"},
        "workspace": {"claimName": "a"},
    }
    assert filled(SCHEMA["properties"]["spec"], minimal) == parse_spec(minimal).as_json()


def test_every_field_of_the_spec_is_immutable_while_the_job_runs_but_those_no_stage_reads() -> None:
    guarded = {
        rule.get("fieldPath", "") for rule in SCHEMA["x-kubernetes-validations"] if "immutable" in rule["message"]
    }
    assert guarded == {
        f".spec.{name}" for name in SCHEMA["properties"]["spec"]["properties"] if name not in MUTABLE_FIELDS
    }
    assert set(SCHEMA["properties"]["spec"]["properties"]) >= MUTABLE_FIELDS


def test_every_check_points_at_a_field_that_exists() -> None:
    def field_at(schema: Mapping[str, Any], path: str) -> Mapping[str, Any]:
        for name in path.removeprefix(".").split("."):
            schema = schema["properties"][name]
        return schema

    for _, node in nodes(SCHEMA):
        for rule in node.get("x-kubernetes-validations", ()):
            if "fieldPath" in rule:
                assert "type" in field_at(node, rule["fieldPath"])


def test_columns_read_fields_that_exist() -> None:
    paths = {f".{path}" for path, _ in nodes(SCHEMA)} | {".metadata.creationTimestamp"}
    columns = custom_resource_definition()["spec"]["versions"][0]["additionalPrinterColumns"]
    assert {column["jsonPath"] for column in columns} <= paths
    assert [column["name"].upper() for column in columns if "priority" not in column] == [
        "PHASE",
        "STAGE",
        "PROGRESS",
        "ETA",
        "RESTARTS",
        "REASON",
        "AGE",
    ]


@pytest.mark.parametrize(
    "words",
    [
        constants.Phase,
        constants.StageState,
        constants.ConditionType,
        constants.Reason,
        constants.EventReason,
    ],
)
def test_every_word_is_camel_case_with_a_meaning_and_in_the_reference(words: type[constants.Word]) -> None:
    page = GENERATED["docs/api.md"]
    for word in words:
        assert word.value.isalpha(), word
        assert word.value[0].isupper(), word
        assert f"| `{word.value}` | {word.meaning} |" in page
        assert word.meaning.endswith("."), word


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in EXAMPLES])
def test_an_example_is_a_valid_job(path: Path) -> None:
    jobs = [document for document in yaml.safe_load_all(path.read_text()) if document["kind"] == constants.KIND]
    assert jobs, f"{path.name} has no {constants.KIND}"
    for job in jobs:
        parse_job(job)
