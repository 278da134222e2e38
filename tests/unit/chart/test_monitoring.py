"""ServiceMonitor, alerts and dashboard: what they name, the operator's own registry has, with the labels they use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from finetune_operator.api.constants import Phase, Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.core.measures import Measure, Observation
from finetune_operator.metrics import Metrics, Sources

ALL = ("serviceMonitor", "rules", "dashboard")
SWITCHES = tuple(part for name in ALL for part in ("--set", f"metrics.{name}.enabled=true"))
SCRAPED = {"namespace", "job", "pod"}
"""Labels that Prometheus itself puts on every series of a pod."""
PROMQL_WORDS = {"by", "and", "unless", "or", "on", "le"}
FUNCTIONS = {"sum", "max", "rate", "increase", "absent", "histogram_quantile"}
VALUES = {"phase": {str(phase) for phase in Phase}, "cause": {str(reason) for reason in Reason}}
"""Labels whose values are a closed list."""


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """Labels by name of each series of the operator's /metrics, once everything has happened that is counted."""
    sources = Sources(
        is_leader=lambda: True,
        statuses=lambda: [FineTuneJobStatus()],
        watch_ages=lambda: {"Job": 1.0},
        now=lambda: datetime(2026, 1, 1, tzinfo=timezone.utc),
    )
    metrics = Metrics(sources, "1.0.0")
    labels = {Measure.STAGE_SECONDS: ("train", "Succeeded"), Measure.RESTARTS: ("NodeFault",)}
    metrics.observe(Observation(measure, 1, labels.get(measure, ())) for measure in Measure)
    metrics.reconciled(0.1, ValueError())
    metrics.requested("GET", 200, 0.1)
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def rules_of(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (manifest,) = [m for m in manifests if m["kind"] == "PrometheusRule"]
    (group,) = manifest["spec"]["groups"]
    return list(group["rules"])


def dashboard_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    (manifest,) = [m for m in manifests if m["metadata"]["name"] == "finetune-operator-dashboard"]
    (text,) = manifest["data"].values()
    return dict(json.loads(text))


@pytest.fixture
def expressions(render: Any) -> list[str]:
    """PromQL of every alert and every panel."""
    manifests = render(*SWITCHES)
    panels = dashboard_of(manifests)["panels"]
    return [rule["expr"] for rule in rules_of(manifests)] + [
        target["expr"] for panel in panels for target in panel.get("targets", [])
    ]


def selectors(expression: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(metric, value by label) of each selector."""
    for name, inside in re.findall(r"(\w+)\{([^}]*)\}", expression):
        yield name, dict(re.findall(r'(\w+)(?:=~|!~|!=|=)"([^"]*)"', inside))


def test_every_metric_named_is_one_of_the_operator(expressions: list[str], series: dict[str, set[str]]) -> None:
    named = {name for expression in expressions for name, _ in selectors(expression)}
    assert len(named) > 10
    assert named - set(series) == set()


def test_every_figure_of_the_operator_is_on_the_dashboard(render: Any, series: dict[str, set[str]]) -> None:
    panels = dashboard_of(render(*SWITCHES))["panels"]
    shown = {
        re.sub(r"_(bucket|count|sum)$", "", name)
        for panel in panels
        for target in panel.get("targets", [])
        for name, _ in selectors(target["expr"])
    }
    ours = {re.sub(r"_(bucket|count|sum)$", "", name) for name in series if name.startswith("finetune_")}
    assert ours - shown == {"finetune_build_info"}


def test_every_label_is_one_of_its_metric(expressions: list[str], series: dict[str, set[str]]) -> None:
    for expression in expressions:
        used = {label for _, labels in selectors(expression) for label in labels}
        used |= {label.strip() for inside in re.findall(r"by \(([^)]*)\)", expression) for label in inside.split(",")}
        known = SCRAPED.union(*(series[name] for name, _ in selectors(expression)))
        assert used - known == set(), expression


def test_every_value_of_a_closed_list_exists(expressions: list[str]) -> None:
    asked = [
        (label, value)
        for expression in expressions
        for _, labels in selectors(expression)
        for label, text in labels.items()
        if label in VALUES
        for value in text.split("|")
    ]
    assert {label for label, _ in asked} == set(VALUES)
    assert [(label, value) for label, value in asked if value not in VALUES[label]] == []


def test_expressions_are_whole(expressions: list[str]) -> None:
    """Brackets match, and beside selectors there are only known functions, words, numbers and durations."""
    for expression in expressions:
        left = expression
        while (shorter := re.sub(r"\([^(){}\[\]]*\)|\{[^(){}\[\]]*\}|\[[^(){}\[\]]*\]", "", left)) != left:
            left = shorter
        assert not re.search(r"[(){}\[\]]", left), expression
        bare = re.sub(r"\w+\{[^}]*\}", "", expression)
        bare = re.sub(r"\[(\d+(s|m|h)|\$__rate_interval|\$__range)\]", "", bare)
        bare = re.sub(r"by \([^)]*\)", "by", bare)
        assert set(re.findall(r"[A-Za-z_]\w*", bare)) - PROMQL_WORDS - FUNCTIONS == set(), expression


def test_counters_are_never_shown_bare(expressions: list[str]) -> None:
    """A counter's value means nothing, since it starts anew with each pod; only its growth does."""
    for expression in expressions:
        for name in re.findall(r"(\w+_(?:total|count|bucket))\{", expression):
            growths = re.findall(rf"(?:rate|increase)\({name}\{{", expression)
            assert len(growths) == len(re.findall(rf"\b{name}\{{", expression)), expression


def test_alerts_look_at_this_release_alone(render: Any) -> None:
    manifests = render(*SWITCHES, "--set", "fullnameOverride=ours")
    (service,) = [m for m in manifests if m["kind"] == "Service" and m["metadata"]["name"].endswith("-metrics")]
    own = {"namespace": "finetune-system", "job": service["metadata"]["name"]}
    for rule in rules_of(manifests):
        for _, labels in selectors(rule["expr"]):
            assert own.items() <= labels.items()


def test_alerts_say_what_and_how_bad(render: Any) -> None:
    rules = rules_of(render(*SWITCHES))
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description"}
        templated = re.findall(r"\$labels\.(\w+)", rule["annotations"]["description"])
        kept = {label.strip() for inside in re.findall(r"by \(([^)]*)\)", rule["expr"]) for label in inside.split(",")}
        assert set(templated) <= kept


def test_thresholds_are_the_values_given(render: Any) -> None:
    arguments = ("--set", "metrics.rules.queueWaitSeconds=1234", "--set", "metrics.rules.checkpointAgeSeconds=5678")
    rules = {rule["alert"]: rule for rule in rules_of(render(*SWITCHES, *arguments))}
    assert rules["FineTuneQueueStuck"]["for"] == "1234s"
    assert "[1234s]" in rules["FineTuneQueueStuck"]["expr"]
    assert rules["FineTuneJobsWaitLongForQuota"]["expr"].endswith("> 1234")
    assert rules["FineTuneCheckpointTooOld"]["expr"].endswith("> 5678")


def test_the_service_monitor_finds_the_metrics_service(render: Any) -> None:
    manifests = render(
        *SWITCHES, "--set", "metrics.serviceMonitor.labels.release=kps,metrics.serviceMonitor.interval=15s"
    )
    (monitor,) = [m for m in manifests if m["kind"] == "ServiceMonitor"]
    wanted = monitor["spec"]["selector"]["matchLabels"]
    found = [m for m in manifests if m["kind"] == "Service" and wanted.items() <= m["metadata"]["labels"].items()]
    assert [service["metadata"]["name"] for service in found] == ["finetune-operator-metrics"]
    assert monitor["spec"]["endpoints"] == [{"port": "metrics", "path": "/metrics", "interval": "15s"}]
    assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in found[0]["spec"]["ports"]}
    assert monitor["metadata"]["labels"]["release"] == "kps"


def test_labels_that_select_rules_and_dashboard_arrive(render: Any) -> None:
    manifests = render(
        *SWITCHES, "--set", "metrics.rules.labels.release=kps", "--set", "metrics.dashboard.labels.team=ml"
    )
    (rule,) = [m for m in manifests if m["kind"] == "PrometheusRule"]
    assert rule["metadata"]["labels"]["release"] == "kps"
    (dashboard,) = [m for m in manifests if m["metadata"]["name"] == "finetune-operator-dashboard"]
    assert dashboard["metadata"]["labels"].items() >= {"grafana_dashboard": "1", "team": "ml"}.items()


def test_the_dashboards_panels_are_told_apart_and_do_not_overlap(render: Any) -> None:
    panels = dashboard_of(render(*SWITCHES))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["datasource"]["uid"] == "${datasource}"
