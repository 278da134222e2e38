"""values.yaml is the one source: schema, README and templates agree with it, and what it lacks is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


def test_generated_files_follow_from_their_sources() -> None:
    command = [sys.executable, "hack/generate_chart.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def leaves(schema: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of the values in a schema that have a description, which containers of values have not."""
    found = []
    for name, child in schema["properties"].items():
        path = f"{prefix}{name}"
        if "description" in child:
            found.append(path)
        elif "properties" in child:
            found += leaves(child, f"{path}.")
    return found


def test_every_value_is_used_by_a_template(chart: Path) -> None:
    templates = "".join(path.read_text() for path in sorted((chart / "templates").glob("*")))
    templates = templates.replace("index $root.Values.images $name", ".Values.images.operator .Values.images.trainer")
    schema = json.loads((chart / "values.schema.json").read_text())
    # Read as a whole: `images`, and what goes into the operator's file as it is.
    whole = r"^(images\.\w+|stages|leaderElection|nodes|hang|logs|retry|featureGates)\..*"
    paths = {re.sub(whole, r"\1", path) for path in leaves(schema)}
    unused = [path for path in sorted(paths) if not re.search(rf"\.Values\.{re.escape(path)}\b", templates)]
    assert unused == []


def test_every_object_in_the_schema_is_closed(chart: Path) -> None:
    schema = json.loads((chart / "values.schema.json").read_text())
    # What Kubernetes types itself and what Helm adds; free maps name the type of their values instead of their keys.
    free = {"global", "nodeAffinity", "podAffinity", "podAntiAffinity"}
    open_objects = []

    def walk(name: str, node: Any) -> None:
        if isinstance(node, dict):
            is_object = node.get("type") == "object"
            closed = node.get("additionalProperties") is False or isinstance(node.get("additionalProperties"), dict)
            if is_object and not closed and name not in free:
                open_objects.append(name)
            for key, child in node.items():
                walk(key, child)

    walk("values", schema)
    assert open_objects == []


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        pytest.param("replicas=2", "replicas", id="a value that does not exist"),
        pytest.param("replicaCount=0", "replicaCount", id="no pod"),
        pytest.param("nodes.watch=sometimes", "watch", id="neither auto nor true nor false"),
        pytest.param("retry.firstSeconds=0", "firstSeconds", id="no wait at all"),
        pytest.param("featureGates.TPU=true", "TPU", id="a gate that does not exist"),
        pytest.param("instanceTypes.x.cpus=4", "cpus", id="a misspelt key of an instance type"),
        pytest.param("models.x.layers=4", "heads", id="a model without its heads"),
        pytest.param("currency=dollars", "currency", id="no currency"),
        pytest.param("networkPolicy.apiServerPorts=[]", "apiServerPorts", id="no port for the API server"),
        pytest.param("logs.tailLines=0", "tailLines", id="a switch hidden in a number"),
        pytest.param("images.operator.repo=x", "repo", id="a misspelt key inside another"),
        pytest.param("stages.train.limits.cpu=1", "limits", id="a key that a stage does not have"),
        pytest.param("stages.deploy.env.A=b", "deploy", id="a stage that does not exist"),
        pytest.param("logLevel=loud", "logLevel", id="a word that is not in the list"),
        pytest.param("progress.port=80", "port", id="a port that needs privileges"),
        pytest.param("crds.install=yes", "install", id="a string in place of a boolean"),
        pytest.param("tolerations[0].efect=NoExecute", "efect", id="a misspelt key of a toleration"),
        pytest.param("fullnameOverride=Not_A_Name", "fullnameOverride", id="a name that Kubernetes refuses"),
    ],
)
def test_schema_refuses(helm_template: Any, argument: str, named: str) -> None:
    done = helm_template("--set", argument)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr
    assert named in done.stderr


def test_values_may_come_from_a_parent_chart(render: Any) -> None:
    assert render("--set", "global.region=eu")
