"""The CRD on a real API server: accepted as structural, defaults, refusals, `kubectl explain` and columns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kube
import pytest
import yaml
from bad_specs import BAD_SPECS, BadSpec
from builders import job_manifest
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from finetune_operator.api import constants
from finetune_operator.api.finetunejob import parse_spec

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))


def answer_to(namespace: str, manifest: dict[str, Any], *flags: str) -> str:
    """What the API server says to a `kubectl create`, refusals included."""
    return kube.kubectl("create", "-n", namespace, "-f", "-", *flags, stdin=json.dumps(manifest), check=False)


def test_the_crd_is_established_and_structural(crd: None) -> None:
    conditions = {each["type"]: each["status"] for each in kube.get("crd", constants.CRD_NAME)["status"]["conditions"]}
    assert conditions == {"NamesAccepted": "True", "Established": "True"}


def test_defaults_are_filled_in_as_the_models_fill_them_in(namespace: str) -> None:
    manifest = job_manifest(evaluate=None, stages={"train": {"resources": {"limits": {"cpu": 2}}}})
    created = json.loads(answer_to(namespace, manifest, "--dry-run=server", "-o", "json"))
    assert created["spec"]["training"]["precision"] == "bf16"
    assert created["spec"]["evaluate"] == {
        "enabled": True,
        "prompts": [],
        "doSample": False,
        "temperature": 0.6,
        "topP": 0.9,
        "maxNewTokens": 256,
        "seed": 42,
    }
    ours = parse_spec(manifest["spec"])
    assert parse_spec(created["spec"]) == ours
    ours_as_sent = ours.as_json()
    # Maps and numbers keep the user's form on the API server; all else is the same to the byte.
    ours_as_sent["stages"]["train"] |= created["spec"]["stages"]["train"]
    ours_as_sent["stages"]["train"].pop("nodeSelector")
    assert created["spec"] == ours_as_sent


@pytest.fixture(scope="module")
def api(crd: None) -> Iterator[client.CustomObjectsApi]:
    """For the table of wrong specs: a kubectl for each would take most of the suite's time."""
    with config.new_client_from_config() as connection:
        yield client.CustomObjectsApi(connection)


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.id) for bad in BAD_SPECS])
def test_a_wrong_spec_is_refused_with_its_field_and_a_remedy(api: client.CustomObjectsApi, bad: BadSpec) -> None:
    with pytest.raises(ApiException) as caught:
        api.create_namespaced_custom_object(
            constants.GROUP,
            constants.VERSION,
            "default",
            constants.PLURAL,
            job_manifest(name=bad.name, **bad.change),
            dry_run="All",
            field_validation="Strict",
        )
    told = json.loads(caught.value.body)
    if told["reason"] == "BadRequest":  # a field that does not exist is found before any validation
        assert f'unknown field "{bad.field}"' in told["message"]
    else:
        messages = [cause["message"] for cause in told["details"]["causes"] if cause.get("field") == bad.field]
        assert any(bad.message in message for message in messages), told["message"]


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in EXAMPLES])
def test_an_example_is_accepted(crd: None, path: Path) -> None:
    jobs = [document for document in yaml.safe_load_all(path.read_text()) if document["kind"] == "FineTuneJob"]
    for job in jobs:
        assert "created (server dry run)" in answer_to("default", job, "--dry-run=server")


def test_explain_reads_well(crd: None) -> None:
    def explain() -> str:
        """kubectl's answer, empty until the API server has published the schema."""
        said = kube.kubectl("explain", "ftj.spec.training", check=False)
        return said if "FIELDS:" in said else ""

    text = kube.eventually(explain, deadline=60, reason="the API server's publication of the schema")
    words = " ".join(text.split())
    assert "The optimisation: length, learning rate, batch, checkpoints. Immutable while the job runs." in words
    assert "learningRate <number> -required- Largest learning rate of AdamW." in words
    assert "precision <string> enum: bf16, fp32 Number format of the model's arithmetic. Default: bf16." in words
    assert "Length of the training, in steps. Exactly one of maxSteps and epochs is set. From 1 to 10000000." in words


STATUS = {
    "phase": "Training",
    "stage": "2/5 train",
    "progress": "62%",
    "eta": "1h20m",
    "reason": "Running",
    "restarts": 1,
    "training": {
        "step": 25,
        "totalSteps": 40,
        "loss": 1.25,
        "lastCheckpoint": {"step": 20, "time": "2026-01-02T03:04:05Z"},
    },
}


def columns(namespace: str, *flags: str) -> dict[str, str]:
    """Column -> cell, as `kubectl get ftj` prints the namespace's one job."""
    head, line = kube.kubectl("get", "ftj", "-n", namespace, *flags).splitlines()
    found = list(re.finditer(r"\S+", head))
    names, starts = [word.group() for word in found], [word.start() for word in found]
    cells = [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
    return dict(zip(names, cells, strict=True))


def test_columns_tell_how_the_job_stands(namespace: str) -> None:
    assert "created" in answer_to(namespace, job_manifest())
    patch = json.dumps({"status": STATUS})
    kube.kubectl("patch", "ftj", "tiny", "-n", namespace, "--subresource=status", "--type=merge", "-p", patch)
    told = columns(namespace)
    del told["AGE"]
    assert told == {
        "NAME": "tiny",
        "PHASE": "Training",
        "STAGE": "2/5 train",
        "PROGRESS": "62%",
        "ETA": "1h20m",
        "RESTARTS": "1",
        "REASON": "Running",
    }
    wide = columns(namespace, "-o", "wide")
    assert wide.pop("CHECKPOINT").endswith(("d", "y", "h"))
    more = {name: cell for name, cell in wide.items() if name not in {*told, "AGE"}}
    assert more == {
        "MODEL": "workspace:///models/tiny-llama",
        "METHOD": "lora",
        "QUEUE": "",
        "NODES": "2",
        "LOSS": "1.25",
        "STEP": "25",
    }


def test_the_status_is_written_through_its_subresource_only(namespace: str) -> None:
    assert "created" in answer_to(namespace, {**job_manifest(), "status": STATUS})
    assert "status" not in kube.get("ftj", "tiny", "-n", namespace)


def test_the_kind_is_found_by_its_category_and_short_name(crd: None) -> None:
    """By discovery, as `kubectl get ml` finds it; that would go on to ask for everybody's kinds of the category."""
    group = ("--api-group", constants.GROUP, "--cached=false")
    listed = kube.kubectl("api-resources", "--categories=ml", *group, "-o", "name")
    assert listed.split() == [constants.CRD_NAME]
    line = next(line for line in kube.kubectl("api-resources", *group).splitlines() if constants.PLURAL in line)
    assert line.split() == [constants.PLURAL, "ftj", constants.API_VERSION, "true", constants.KIND]
