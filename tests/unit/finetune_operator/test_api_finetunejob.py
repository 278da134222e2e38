"""parse_job: what it accepts, what it refuses, and that it says everything at once."""

from __future__ import annotations

import copy
from datetime import datetime, timezone
from types import MappingProxyType
from typing import Any

import pytest
from bad_specs import BAD_SPECS, BadSpec
from builders import job_body, make_job
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator.api.finetunejob import (
    FineTuneJobStatus,
    SpecError,
    parse_job,
    parse_spec,
    unavailable_features,
)
from finetune_operator.api.spec import FineTuneJobSpec
from finetune_operator.core.settings import FEATURES
from finetune_trainer.spec_checks import check_rules, check_spec, with_defaults


def problems_of(body: Any) -> list[tuple[str, str]]:
    with pytest.raises(SpecError) as caught:
        parse_job(body)
    return [(problem.field, problem.message) for problem in caught.value.problems]


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.id) for bad in BAD_SPECS])
def test_a_wrong_spec_is_refused_with_field_and_remedy(bad: BadSpec) -> None:
    found = problems_of(job_body(name=bad.name, **bad.change))
    assert [field for field, _ in found] == [bad.field]
    assert (bad.ours or bad.message) in found[0][1]


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.id) for bad in BAD_SPECS if bad.name == "bad"])
def test_the_trainer_tells_the_same_problems(bad: BadSpec) -> None:
    body = job_body(**bad.change)
    with pytest.raises(SpecError) as caught:
        parse_job(body)
    assert check_spec(body["spec"]) == caught.value.problems


def test_all_problems_are_told_at_once() -> None:
    body = job_body(
        name="Bad",
        method={"type": "lorra"},
        training={"maxSteps": 0, "learningRate": "2e-5", "colour": "red"},
        dataset={"source": "../x"},
        evaluate={"prompts": [{"text": "a"}, {"context": "b"}]},
        stages={"train": {"tolerations": [{"value": "x"}]}},
    )
    assert {field for field, _ in problems_of(body)} == {
        "metadata.name",
        "spec.method.type",
        "spec.training.maxSteps",
        "spec.training.learningRate",
        "spec.training.colour",
        "spec.dataset.source",
        "spec.evaluate.prompts[1].text",
        "spec.stages.train.tolerations[0].key",
    }


def test_the_error_reads_as_one_line() -> None:
    with pytest.raises(SpecError) as caught:
        parse_job(job_body(training={"maxSteps": 0}, accelerator={"nodes": 2000}))
    assert str(caught.value) == (
        "spec.training.maxSteps: must be at least 1, is 0; spec.accelerator.nodes: must be at most 1024, is 2000"
    )


@pytest.mark.parametrize("spec", [None, [], "x"], ids=["an absent spec", "a list", "text"])
def test_a_spec_that_is_no_object_is_refused(spec: Any) -> None:
    assert problems_of({**job_body(), "spec": spec}) == [("spec", "spec is required and must be an object")]


def test_a_section_that_is_no_object_is_refused() -> None:
    assert problems_of(job_body(training=7)) == [("spec.training", "must be an object, is 7")]


def test_an_object_of_another_kind_is_refused() -> None:
    assert problems_of({**job_body(), "kind": "Job"}) == [("kind", "must be FineTuneJob, is 'Job'")]


def test_defaults_are_filled_in() -> None:
    spec = make_job(evaluate=None, dataset={"maxLength": None, "validationPercent": None}).spec
    assert (spec.dataset.max_length, spec.dataset.packing, spec.dataset.validation_percent) == (2048, "bestFit", 2)
    assert (spec.merge.enabled, spec.evaluate.enabled, spec.retry_policy.max_retries) == (True, True, 3)
    assert spec.compile is None
    assert spec.stages.of("train").env == ()


def test_a_job_carries_its_identity_and_times() -> None:
    job = make_job(metadata={"deletionTimestamp": "2026-01-03T00:00:00Z"}, generation=7)
    assert (job.name, job.namespace, job.generation) == ("tiny", "team-a", 7)
    assert job.creation_timestamp == datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    assert job.deletion_timestamp == datetime(2026, 1, 3, tzinfo=timezone.utc)


def test_parsing_reads_the_read_only_mappings_of_a_framework_and_changes_nothing() -> None:
    body = job_body()
    before = copy.deepcopy(body)
    frozen = MappingProxyType({**body, "spec": MappingProxyType(body["spec"])})
    assert parse_job(frozen) == parse_job(body)
    assert body == before


def test_a_status_of_another_release_counts_as_none() -> None:
    assert make_job(status={"stages": "all of them"}).status == FineTuneJobStatus()
    assert make_job(status={"phase": "Training", "mood": "good"}).status == FineTuneJobStatus(phase="Training")


def test_a_quantity_may_be_a_number() -> None:
    resources = make_job(stages={"train": {"resources": {"limits": {"cpu": 2}}}}).spec.stages.of("train").resources
    assert resources is not None
    assert resources.limits == {"cpu": "2"}


def test_overrides_of_a_stage_that_does_not_exist_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(KeyError):
        make_job().spec.stages.of("deploy")


AVAILABLE: dict[str, dict[str, Any]] = {
    "the plain job": {},
    "suspend, deadline, TTL and retries": {
        "suspend": True,
        "activeDeadlineSeconds": 60,
        "ttlSecondsAfterFinished": 0,
        "retryPolicy": {"maxRetries": 0},
    },
    "a gate": {"evaluate": {"gate": {"maxLossRatioToBase": 0.9}}},
    "rank-stabilised LoRA without packing": {"method": {"lora": {"variant": "rslora"}}, "dataset": {"packing": "none"}},
    "DoRA on every linear layer, and a module saved whole": {
        "method": {"lora": {"variant": "dora", "targetModules": ["all-linear"], "modulesToSave": ["lm_head"]}}
    },
    "an int8 base": {"method": {"quantization": "int8"}},
    "full training, written in bf16": {"method": {"type": "full", "lora": None}, "merge": {"precision": "bf16"}},
    "conversations": {"dataset": {"format": "messages"}},
    "compilation turned off": {"compile": {"enabled": False}},
    "neither merge nor evaluate": {"merge": {"enabled": False}, "evaluate": {"enabled": False}},
    "a queue": {"queue": {"name": "research"}},
    "a dry run": {"dryRun": True},
}


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in AVAILABLE.items()])
def test_what_this_release_does_is_available(change: dict[str, Any]) -> None:
    assert unavailable_features(make_job(**change).spec) == ()


UNAVAILABLE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Trainium": (
        {
            "accelerator": {"type": "neuron", "instanceType": "ml.trn1.32xlarge"},
            "parallelism": {"tensorParallelSize": 8},
        },
        ["spec.parallelism.tensorParallelSize", "spec.accelerator.type"],
    ),
    "a GPU": ({"accelerator": {"type": "cuda", "instanceType": "ml.g5.12xlarge"}}, ["spec.accelerator.type"]),
    "pipeline parallelism": ({"parallelism": {"pipelineParallelSize": 2}}, ["spec.parallelism.pipelineParallelSize"]),
    "compilation": ({"compile": {}}, ["spec.compile.enabled"]),
    "publishing": ({"publish": {"s3": {"uri": "s3://bucket/a"}}}, ["spec.publish"]),
}


@pytest.mark.parametrize(("change", "fields"), [pytest.param(*case, id=name) for name, case in UNAVAILABLE.items()])
def test_what_a_later_release_does_is_named(change: dict[str, Any], fields: list[str]) -> None:
    problems = unavailable_features(make_job(**change).spec)
    assert [problem.field for problem in problems] == fields
    assert all("is not available in this release; " in problem.message for problem in problems)


TRAINIUM = {
    "dataset": {"packing": "none"},
    "accelerator": {"type": "neuron", "instanceType": "ml.trn1.32xlarge"},
    "parallelism": {"tensorParallelSize": 8, "pipelineParallelSize": 2},
    "compile": {},
}
GPU = {"accelerator": {"type": "cuda", "instanceType": "ml.g5.12xlarge"}}
PUBLISH = {"publish": {"s3": {"uri": "s3://bucket/a"}}}


@pytest.mark.parametrize(
    ("gate", "change"), [("Neuron", TRAINIUM), ("Cuda", GPU), ("Publish", PUBLISH)], ids=["Neuron", "Cuda", "Publish"]
)
def test_each_gate_opens_what_is_its_own_and_nothing_else(gate: str, change: dict[str, Any]) -> None:
    spec = make_job(**change).spec
    others = dict.fromkeys(FEATURES, True) | {gate: False}
    assert unavailable_features(spec, {gate: True}) == ()
    assert unavailable_features(spec, others) == unavailable_features(spec) != ()


def test_a_gate_opens_no_tensor_parallelism_on_cpus() -> None:
    spec = make_job(parallelism={"tensorParallelSize": 2}).spec
    fields = [problem.field for problem in unavailable_features(spec, dict.fromkeys(FEATURES, True))]
    assert fields == ["spec.parallelism.tensorParallelSize"]


def test_the_gate_of_publishing_opens_no_endpoint() -> None:
    publish = {**PUBLISH["publish"], "sageMakerEndpoint": {"instanceType": "ml.g5.4xlarge"}}
    (problem,) = unavailable_features(make_job(publish=publish).spec, {"Publish": True})
    assert (problem.field, problem.value) == ("spec.publish.sageMakerEndpoint", "ml.g5.4xlarge")


def test_a_queue_is_refused_where_the_installation_serves_none() -> None:
    (problem,) = unavailable_features(make_job(queue={"name": "research"}).spec, queue_enabled=False)
    assert (problem.field, problem.value) == ("spec.queue", "research")
    assert "is not available in this installation; remove it" in problem.message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param({}, "stages.compile.image and stages.train.image", id="no image of its own"),
        pytest.param(
            {"stages": {"compile": {"image": "a/b:1"}}}, "name an image for it in stages.train.image", id="one of two"
        ),
    ],
)
def test_a_neuron_job_is_refused_where_no_image_can_use_its_devices(change: dict[str, Any], told: str) -> None:
    spec = make_job(**TRAINIUM, **change).spec
    (problem,) = unavailable_features(spec, {"Neuron": True}, lacks_image=("compile", "train"))
    assert (problem.field, problem.value) == ("spec.accelerator.type", "neuron")
    assert "have the chart's images.neuron set" in problem.message
    assert problem.message.endswith(told)


def test_a_neuron_job_that_names_its_own_images_needs_none_of_the_installation() -> None:
    spec = make_job(**TRAINIUM, stages={name: {"image": "a/b:1"} for name in ("compile", "train")}).spec
    assert unavailable_features(spec, {"Neuron": True}, lacks_image=("compile", "train")) == ()


def test_prompts_may_have_as_many_characters_as_the_annotation_holds() -> None:
    prompt = {"text": "ä" * 8192, "context": "b" * 16384, "expected": "c" * 8192}
    assert len(make_job(evaluate={"prompts": [prompt]}).spec.evaluate.prompts) == 1


SECTIONS = st.fixed_dictionaries(
    {},
    optional={
        "suspend": st.booleans(),
        "dryRun": st.booleans(),
        "model": st.fixed_dictionaries(
            {"source": st.sampled_from(["hf://org/name", "s3://bucket/prefix", "workspace:///a b/c"])},
            optional={"tokenSecretRef": st.just({"name": "hub", "key": "token"}), "trustRemoteCode": st.booleans()},
        ),
        "dataset": st.fixed_dictionaries(
            {},
            optional={
                "maxLength": st.integers(16, 131072),
                "packing": st.sampled_from(["bestFit", "none", "wrapped"]),
                "lossOn": st.sampled_from(["completion", "all"]),
                "files": st.sampled_from(["*.jsonl", "data/**/*.json"]),
                "configuration": st.text(st.characters(codec="utf-8"), min_size=1, max_size=128),
            },
        ),
        "training": st.one_of(
            st.fixed_dictionaries({"maxSteps": st.integers(4, 10_000_000)}),
            st.fixed_dictionaries({"maxSteps": st.none(), "epochs": st.floats(0, 1000, exclude_min=True)}),
        ).flatmap(
            lambda length: st.fixed_dictionaries(
                {},
                optional={
                    "learningRate": st.floats(0, 1, exclude_min=True),
                    "seed": st.integers(0, 2**31 - 1),
                    "precision": st.sampled_from(["bf16", "fp32"]),
                },
            ).map(lambda rest: {**length, **rest})
        ),
        "compile": st.one_of(st.none(), st.just({}), st.just({"enabled": False})),
        "activeDeadlineSeconds": st.one_of(st.none(), st.integers(1, 31_536_000)),
        "evaluate": st.fixed_dictionaries(
            {},
            optional={
                "prompts": st.lists(
                    st.fixed_dictionaries({"text": st.text(st.characters(codec="utf-8"), min_size=1)}), max_size=3
                ),
                "gate": st.fixed_dictionaries(
                    {"maxLossRatioToBase": st.floats(0, 100, exclude_min=True)},
                    optional={"maxLoss": st.floats(0, 1000, exclude_min=True), "maxPerplexity": st.floats(1, 1e9)},
                ),
                "doSample": st.booleans(),
                "temperature": st.floats(0, 10, exclude_min=True),
                "topP": st.floats(0, 1, exclude_min=True),
            },
        ),
        "stages": st.dictionaries(
            st.sampled_from(["prepare", "train", "merge"]),
            st.fixed_dictionaries(
                {},
                optional={
                    "image": st.just("registry.example/a/b:1"),
                    "nodeSelector": st.dictionaries(st.sampled_from(["a", "example.com/b"]), st.just("x")),
                    "resources": st.just({"limits": {"cpu": 1, "memory": "1.5Gi"}}),
                    "env": st.just([{"name": "A"}, {"name": "B", "value": "b"}]),
                },
            ),
        ),
    },
)


@settings(max_examples=150, deadline=None)
@given(SECTIONS)
def test_parsing_what_was_dumped_gives_the_same_spec(changes: dict[str, Any]) -> None:
    spec = make_job(**changes).spec
    assert parse_spec(spec.as_json()) == spec
    assert with_defaults(spec.as_json()) == spec.as_json()
    assert check_spec(spec.as_json()) == check_rules(spec.as_json()) == ()
    assert FineTuneJobSpec.model_validate_json(spec.model_dump_json(by_alias=True)) == spec
