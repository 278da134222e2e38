"""What is wrong with a spec: all of it at once, with path, value, reason and the nearest valid fix."""

from __future__ import annotations

import json
from typing import Any

import pytest
from bad_specs import BAD_SPECS, BadSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from job_specs import job_spec

from finetune_trainer.spec_checks import check_parallelism, check_part, check_spec, spec_schema, with_defaults
from finetune_trainer.spec_rules import RULES, nearest_sizes, rules_of, template_fields


def told(**changes: Any) -> list[str]:
    return [str(problem) for problem in check_spec(job_spec(**changes))]


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.id) for bad in BAD_SPECS if bad.name == "bad"])
def test_a_wrong_spec_has_one_problem_at_its_field(bad: BadSpec) -> None:
    (problem,) = check_spec(job_spec(**bad.change))
    assert problem.field == bad.field
    assert (bad.ours or bad.message) in problem.message


def test_a_spec_with_everything_wrong_is_told_everything_before_anything_is_fetched() -> None:
    assert told(
        model={"source": "meta-llama/Meta-Llama-3-8B"},
        dataset={"format": "alpacca", "maxLength": 8},
        method={"lora": {"targetModules": ["all-linear", "q_proj"], "variant": "dorra"}},
        training={"learningRate": "2e-5", "warmupSteps": 50},
        parallelism={"tensorParallelSize": 3},
        evaluate={"prompts": [{"text": "a", "contxt": "b"}], "maxNewTokens": 1.5},
        acelerator={},
    ) == [
        "spec.model.source: source must be hf://org/name, s3://bucket/prefix or workspace:///path without `..`, is "
        "meta-llama/Meta-Llama-3-8B; did you mean hf://meta-llama/Meta-Llama-3-8B?",
        "spec.dataset.format: must be 'dolly', 'samsum', 'promptCompletion', 'alpaca', 'messages', 'sharegpt', 'text' "
        "or 'template', is 'alpacca'; did you mean 'alpaca'?",
        "spec.dataset.maxLength: must be at least 16, is 8",
        "spec.method.lora.variant: must be 'standard', 'rslora' or 'dora', is 'dorra'; did you mean 'dora'?",
        "spec.method.lora.targetModules: targetModules must be all-linear alone or names of modules, not both",
        "spec.training.learningRate: must be a number, is '2e-5': write it without quotes, and an exponent with a "
        "point, as in 2.0e-5",
        "spec.training.warmupSteps: warmupSteps must be at most maxSteps, 50 is more than 40; use 40 or less",
        "spec.evaluate.prompts[0].contxt: there is no field contxt: did you mean context?",
        "spec.evaluate.maxNewTokens: must be a whole number, is 1.5: use 1 or 2",
        "spec.acelerator: there is no field acelerator: did you mean accelerator?",
        "spec.parallelism: nodes x processesPerNode must be a multiple of tensorParallelSize x pipelineParallelSize, "
        "but 2 x 1 is none of 3 x 1; use tensorParallelSize 2, or accelerator.nodes 3",
    ]


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        pytest.param({"training": {"learning_rate": 1}}, "did you mean learningRate?", id="a field in snake case"),
        pytest.param({"dataset": {"source": "/data/faq"}}, "did you mean workspace:///data/faq", id="a path"),
        pytest.param(
            {"dataset": {"source": "https://huggingface.co/datasets/databricks/databricks-dolly-15k"}},
            "did you mean hf://databricks/databricks-dolly-15k?",
            id="the address of a hub's page",
        ),
        pytest.param({"model": {"source": "hf:/org/name"}}, "did you mean hf://org/name?", id="a slash too few"),
        pytest.param({"training": {"maxSteps": 40.0}}, "use 40", id="a whole number with a point"),
        pytest.param(
            {"accelerator": {"nodes": 3}, "parallelism": {"tensorParallelSize": 2, "pipelineParallelSize": 2}},
            "accelerator.nodes 4",
            id="nodes that do not divide",
        ),
        pytest.param(
            {"method": {"lora": {"targetModules": ["q_proj", "v_proj", "q_proj"]}}},
            "has 'q_proj' twice: name it once",
            id="a name twice",
        ),
        pytest.param(
            {"stages": {"train": {"env": [{"name": "A"}, {"name": "A", "value": "b"}]}}},
            "has 'A' twice",
            id="a variable twice",
        ),
    ],
)
def test_the_nearest_valid_value_is_named(change: dict[str, Any], fix: str) -> None:
    (problem,) = told(**change)
    assert fix in problem


def test_what_is_far_from_every_field_gets_the_list_of_them() -> None:
    (problem,) = told(merge={"quux": 1})
    assert problem == "spec.merge.quux: there is no field quux: fields here are enabled, maxShardSize, precision"


def test_a_wrong_field_hides_no_rule_that_does_not_read_it() -> None:
    fields = [problem.field for problem in check_spec(job_spec(dataset={"maxLength": 1, "template": {}}))]
    assert fields == [
        "spec.dataset.template.prompt",
        "spec.dataset.template.completion",
        "spec.dataset.maxLength",
    ]
    both = told(method={"quantization": "int8"}, parallelism={"strategy": "fsdp"}, training={"maxSteps": 0})
    assert [problem.partition(":")[0] for problem in both] == ["spec.training.maxSteps", "spec.parallelism.strategy"]


@pytest.mark.parametrize("spec", [None, [], "x", 7], ids=["nothing", "a list", "text", "a number"])
def test_a_spec_that_is_no_object_is_one_problem(spec: Any) -> None:
    assert [str(problem) for problem in check_spec(spec)] == ["spec: spec is required and must be an object"]


def test_null_is_absence() -> None:
    spec = job_spec(dataset={"maxLength": 256})
    spec["dataset"]["maxLength"] = spec["merge"] = None
    assert check_spec(spec) == ()
    assert with_defaults(spec)["dataset"]["maxLength"] == 2048
    assert with_defaults(spec)["merge"] == {"enabled": True, "maxShardSize": "5GB", "precision": "base"}


def test_a_stage_reads_a_part_and_has_everything_wrong_with_it_told() -> None:
    part = {
        "model": {"source": "hf://a"},
        "dataset": {"source": "hf://a/b", "format": "template", "maxLength": 0},
        "training": {"maxSteps": 1, "epochs": 1},
    }
    assert [problem.field for problem in check_part(part, cut=("training",))] == [
        "spec.model.source",
        "spec.dataset.maxLength",
        "spec.dataset.template",
        "spec.training.maxSteps",
    ]
    whole = [problem.field for problem in check_part(part)]
    assert "spec.training.learningRate" in whole


def test_rules_across_sections_count_where_a_stage_has_all_of_them() -> None:
    method = {"type": "lora", "quantization": "int8", "lora": {"rank": 1, "targetModules": ["q_proj"]}}
    assert check_part({"method": method}) == ()
    both = check_part({"method": method, "parallelism": {"strategy": "fsdp"}})
    assert [problem.field for problem in both] == ["spec.parallelism.strategy"]


SIZES = {
    "numNodes": 2,
    "procsPerNode": 2,
    "worldSize": 4,
    "tensorParallelSize": 1,
    "pipelineParallelSize": 1,
    "dataParallelSize": 4,
    "microBatchSize": 3,
    "gradientAccumulationSteps": 2,
    "globalBatchSize": 24,
}


def test_sizes_that_come_out_even_are_no_problem() -> None:
    assert check_parallelism(SIZES) == check_parallelism({"globalBatchSize": 24}) == check_parallelism({}) == ()
    assert check_parallelism({**SIZES, "strategy": "fsdp"}) == ()


def test_sizes_that_do_not_come_out_even_are_told_with_all_their_factors() -> None:
    wrong = {**SIZES, "numNodes": 3, "globalBatchSize": 25}
    assert [str(problem) for problem in check_parallelism(wrong)] == [
        "parallelism.worldSize: must be numNodes 3 x procsPerNode 2, is 4: use 6",
        "parallelism.globalBatchSize: must be microBatchSize 3 x gradientAccumulationSteps 2 x dataParallelSize 4, is "
        "25: use 24",
    ]
    (problem,) = check_parallelism({**SIZES, "strategy": "zero"})
    assert str(problem) == "parallelism.strategy: must be 'ddp' or 'fsdp', is 'zero'"
    (problem,) = check_parallelism({**SIZES, "microBatchSize": "3"})
    assert str(problem) == "parallelism.microBatchSize: must be a whole number of at least 1, is '3'"


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("Question: {question}\nAnswer: ", ("question",)),
        ("{a}{b} {a}", ("a", "b", "a")),
        ('{{"q": "{the question}"}}', ("the question",)),
        ("no field", ()),
        ("{{{a}}}", ("a",)),
    ],
)
def test_a_template_stands_for_its_fields(text: str, fields: tuple[str, ...]) -> None:
    assert template_fields(text) == fields


@pytest.mark.parametrize("text", ["{", "}", "{}", "{a", "a}", "{a}}", "{{a}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}"])
def test_what_is_no_template_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="by its name alone"):
        template_fields(text)


@settings(deadline=None)
@given(st.text(alphabet="{}ab!:.[] \n", max_size=12))
def test_a_template_is_what_formatting_by_name_takes(text: str) -> None:
    try:
        fields = template_fields(text)
    except ValueError:
        return
    assert text.format(**dict.fromkeys(fields, "x")) is not None


@given(st.sets(st.integers(1, 64), min_size=1), st.integers(1, 64))
def test_the_nearest_sizes_are_the_next_below_and_above(sizes: set[int], wanted: int) -> None:
    near = nearest_sizes(sizes, wanted)
    assert set(near) <= sizes - {wanted}
    for size in sizes - {wanted}:
        assert any(min(wanted, size) <= found <= max(wanted, size) for found in near)


def test_every_rule_is_of_a_type_of_the_schema_and_reads_fields_of_it() -> None:
    found: dict[str, Any] = {}

    def collect(schema: Any) -> None:
        if "model" in schema:
            found[schema["model"]] = schema
        for below in (*schema.get("properties", {}).values(), *filter(None, [schema.get("items")])):
            collect(below)

    collect(spec_schema())
    for rule in RULES:
        assert rule in rules_of(rule.kind)
        for path in (rule.field, *rule.reads):
            schema = found[rule.kind]
            for name in path.split("."):
                schema = schema["properties"][name]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PATHS = [
    (section, name)
    for section, schema in spec_schema()["properties"].items()
    for name in (None, *schema.get("properties", {}))
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PATHS), JSON)
def test_any_json_in_any_field_gives_problems_and_never_an_error(path: tuple[str, str | None], value: Any) -> None:
    spec = json.loads(json.dumps(job_spec()))
    section, name = path
    if name is None:
        spec[section] = value
    else:
        spec.setdefault(section, {})[name] = value
    for problem in (*check_spec(spec), *check_part(spec)):
        assert problem.field.startswith("spec")
        assert problem.message
