"""The chart's README: its manifests fit what the operator makes, its values what the chart takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.api import constants
from finetune_trainer import contract


@pytest.fixture
def blocks(chart: Path) -> dict[str, Any]:
    """The README's YAML by the first word of the comment that it begins with."""
    text = (chart / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"```yaml\n(# (\w+).*?)```", text, flags=re.DOTALL)
    return {name: yaml.safe_load(block) for block, name in found}


def test_the_policy_for_stage_pods_names_their_label_and_the_operators_pods(
    chart: Path, blocks: dict[str, Any], render: Any
) -> None:
    stages = {"matchLabels": {constants.LABEL_MANAGED_BY: constants.MANAGED_BY}}
    spec = blocks["stages"]["spec"]
    assert spec["podSelector"] == stages
    assert spec["ingress"] == [{"from": [{"podSelector": stages}]}]
    assert {"to": [{"podSelector": stages}]} in spec["egress"]
    (operator,) = [rule for rule in spec["egress"] if "namespaceSelector" in rule.get("to", [{}])[0]]
    deployment = next(m for m in render() if m["kind"] == "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert operator["to"][0]["podSelector"]["matchLabels"].items() <= labels.items()
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    served = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert operator["ports"] == [{"port": served["progress"], "protocol": "TCP"}]
    assert f"port {contract.RENDEZVOUS_PORT}" in (chart / "README.md").read_text(encoding="utf-8")


def test_the_example_values_are_taken(blocks: dict[str, Any], render: Any, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(blocks["values"]))
    config_map = next(m for m in render("-f", str(values)) if m["kind"] == "ConfigMap")
    config = yaml.safe_load(config_map["data"]["config.yaml"])
    assert {name: config[name] for name in blocks["values"]} == blocks["values"]


def test_the_roles_that_people_are_bound_to_exist(chart: Path, render: Any) -> None:
    named = set(re.findall(r"--clusterrole=([\w-]+)", (chart / "README.md").read_text(encoding="utf-8")))
    assert named
    assert named <= {m["metadata"]["name"] for m in render() if m["kind"] == "ClusterRole"}
