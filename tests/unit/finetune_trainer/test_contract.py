"""The contract: digests are stable where they must be and change where they must, reports always fit."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer import contract
from finetune_trainer.contract import ArtifactRef, ContractError, Report, StageConfig

DIGEST = "sha256:" + "a" * 64
CONFIG = StageConfig(
    stage="train",
    image="localhost/finetune-trainer:abc",
    spec={"training": {"learningRate": 2e-5, "maxSteps": 100}},
    output="finetune/jobs/ns/job/train-0123456789abcdef",
    inputs={"prepare": ArtifactRef("finetune/jobs/ns/job/prepare-0123456789abcdef", DIGEST)},
    parallelism={"worldSize": 2},
    job={"namespace": "ns", "name": "job", "uid": "1"},
)


def changed(**fields: object) -> StageConfig:
    return StageConfig(**{**{name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}, **fields})


def test_stage_config_survives_a_round_trip() -> None:
    assert contract.parse_stage_config(json.loads(contract.canonical_json(CONFIG.as_json()))) == CONFIG


@pytest.mark.parametrize(
    "fields",
    [
        {"attempt": 2},
        {"output": "elsewhere"},
        {"job": {"namespace": "other", "name": "x", "uid": "2"}},
        {"workspace": "/data"},
        {"rendezvous": "host:1"},
        {"secrets": {"model-token": "/x"}},
        {"progress": {"url": "https://x"}},
        {"inputs": {"prepare": ArtifactRef("moved/here", DIGEST)}},
    ],
    ids=lambda fields: f"{next(iter(fields))} does not change the digest",
)
def test_volatile_fields_do_not_name_a_stage(fields: dict[str, object]) -> None:
    assert contract.stage_digest(changed(**fields)) == contract.stage_digest(CONFIG)


@pytest.mark.parametrize(
    "fields",
    [
        {"stage": "merge"},
        {"image": "localhost/finetune-trainer:def"},
        {"spec": {"training": {"learningRate": 2e-5, "maxSteps": 101}}},
        {"parallelism": {"worldSize": 4}},
        {"inputs": {"prepare": ArtifactRef("finetune/jobs/ns/job/prepare-0123456789abcdef", "sha256:" + "b" * 64)}},
        {"inputs": {}},
    ],
    ids=lambda fields: f"{next(iter(fields))} changes the digest",
)
def test_what_a_stage_reads_names_it(fields: dict[str, object]) -> None:
    assert contract.stage_digest(changed(**fields)) != contract.stage_digest(CONFIG)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ([], "must be an object"),
        ({"contractVersion": 99}, "contractVersion 99"),
        ({"contractVersion": 1, "stage": "bake"}, "'bake'"),
        ({"contractVersion": 1, "stage": "train", "image": "x", "spec": []}, "spec must be"),
        (
            {"contractVersion": 1, "stage": "train", "image": "x", "spec": {}, "output": "o", "inputs": {"model": {}}},
            "inputs.model",
        ),
    ],
    ids=["a list", "another version", "an unknown stage", "a spec that is a list", "an input without digest"],
)
def test_a_wrong_stage_config_is_refused_by_field(value: object, word: str) -> None:
    with pytest.raises(ContractError, match=word):
        contract.parse_stage_config(value)


def test_a_missing_stage_config_is_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ContractError, match="nothing.json"):
        contract.load_stage_config(tmp_path / "nothing.json")


@given(
    message=st.text(max_size=9000),
    metrics=st.dictionaries(st.text(max_size=12), st.integers() | st.text(max_size=400), max_size=12),
)
def test_an_encoded_report_fits_and_keeps_what_counts(message: str, metrics: dict[str, object]) -> None:
    report = Report("train", 21, "PeerLost", message, {"train": ArtifactRef("p", DIGEST)}, metrics)
    encoded = contract.encode_report(report)
    assert len(encoded) <= contract.REPORT_MAX_BYTES
    decoded = contract.parse_report(encoded)
    assert (decoded.stage, decoded.exit_code, decoded.reason) == ("train", 21, "PeerLost")
    assert decoded.artifacts == report.artifacts
    assert decoded.message == message or decoded.message.endswith("…")


@pytest.mark.parametrize("text", ["", "OOMKilled", "{}", '{"contractVersion":1,"stage":"train"}', "[1]"])
def test_words_of_others_are_no_report(text: str) -> None:
    with pytest.raises(ContractError):
        contract.parse_report(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_canonical_json_does_not_depend_on_order(value: object) -> None:
    encoded = contract.canonical_json(value)
    assert contract.canonical_json(json.loads(encoded)) == encoded
