"""What a Node says, when that is a fault, and which nodes the next attempt keeps off."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.api.constants import Reason
from finetune_operator.core.nodes import (
    ANNOTATION_FAULT_DETAILS,
    LABEL_DEEP_CHECK,
    LABEL_FAULT_REASONS,
    LABEL_FAULT_TYPES,
    LABEL_HEALTH,
    LABEL_INSTANCE_TYPE,
    MAX_WORDS,
    TAINT_HEALTH,
    Avoidance,
    FaultDetails,
    NodeState,
    find_fault,
    held_back,
    node_affinity,
    nodes_to_avoid,
    parse_node,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
NAME = "hyperpod-i-0a1b2c3d4e5f60718"


def raw_node(
    *,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    ready: str = "True",
    **spec: Any,
) -> dict[str, Any]:
    """A Trainium node of HyperPod as the API server gives it."""
    return {
        "metadata": {
            "name": NAME,
            "labels": {LABEL_INSTANCE_TYPE: "ml.trn1.32xlarge", **(labels or {})},
            "annotations": dict(annotations or {}),
        },
        "spec": spec,
        "status": {
            "allocatable": {
                "cpu": "127610m",
                "memory": "510986148Ki",
                "hugepages-2Mi": "0",
                "aws.amazon.com/neuron": "16",
                "vpc.amazonaws.com/efa": "8",
                "example.com/half": "500m",
            },
            "conditions": [
                {"type": "MemoryPressure", "status": "False"},
                {"type": "Ready", "status": ready, "lastTransitionTime": "2026-01-02T03:00:00Z", "message": "words."},
            ],
        },
    }


def details(*entries: Any) -> dict[str, str]:
    return {ANNOTATION_FAULT_DETAILS: json.dumps(list(entries))}


def entry(timestamp: str, reason: str) -> dict[str, str]:
    return {"timestamp": timestamp, "type": "NeuronError", "reason": reason, "message": f"nd3: {reason}"}


def test_everything_that_decisions_need_is_read() -> None:
    raw = raw_node(
        labels={LABEL_HEALTH: "UnschedulablePendingReboot", LABEL_DEEP_CHECK: "Passed"},
        annotations=details(entry("2026-01-02T03:00:00Z", "SRAM_ECC")),
        unschedulable=True,
        taints=[
            {"key": "aws.amazon.com/neuron", "effect": "NoSchedule"},
            {"key": TAINT_HEALTH, "value": "Unschedulable", "effect": "NoSchedule"},
        ],
    )
    raw["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:00Z"
    assert parse_node(raw) == NodeState(
        name=NAME,
        health="UnschedulablePendingReboot",
        deep_check="Passed",
        health_taint="Unschedulable:NoSchedule",
        fault=FaultDetails("NeuronError", "SRAM_ECC", "nd3: SRAM_ECC", "2026-01-02T03:00:00Z"),
        ready="True",
        ready_since=datetime(2026, 1, 2, 3, 0, tzinfo=timezone.utc),
        ready_message="words.",
        unschedulable=True,
        deleting=True,
        instance_type="ml.trn1.32xlarge",
        cpu="127610m",
        memory="510986148Ki",
        devices={"aws.amazon.com/neuron": 16, "vpc.amazonaws.com/efa": 8},
    )


def test_a_node_that_says_nothing_yet_has_no_fault() -> None:
    node = parse_node({"metadata": {"name": "new"}})
    assert node == NodeState(name="new")
    assert find_fault(node) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(
            json.dumps([entry("2026-01-02T03:00:00Z", "old"), entry("2026-01-02T04:00:00Z", "new")]),
            "new",
            id="the newest of several faults is taken",
        ),
        pytest.param(
            json.dumps([entry("2026-01-02T04:00:00+00:00", "new"), entry("2026-01-02T03:00:00Z", "old")]),
            "new",
            id="the newest is taken where the array begins with it",
        ),
        pytest.param(
            json.dumps([entry("yesterday", "first"), entry("", "last")]),
            "last",
            id="the last is taken where timestamps say nothing",
        ),
        pytest.param(
            json.dumps([entry("2026-01-02T03:00:00", "naive"), entry("2026-01-02T02:00:00Z", "aware")]),
            "naive",
            id="a timestamp without a zone is UTC",
        ),
        pytest.param(
            json.dumps(entry("2026-01-02T03:00:00Z", "one")), "one", id="an object instead of an array is read"
        ),
        pytest.param(
            json.dumps(["text", 3, None, entry("", "real")]), "real", id="strangers in the array are passed over"
        ),
        pytest.param(json.dumps([{"reason": 7, "type": None}]), "7", id="a number instead of text becomes text"),
        pytest.param("[{", "of-label", id="broken JSON leaves the labels"),
        pytest.param("[]", "of-label", id="an empty array leaves the labels"),
        pytest.param('"text"', "of-label", id="another kind of JSON leaves the labels"),
        pytest.param("[" * 200_000, "of-label", id="JSON of bottomless depth leaves the labels"),
    ],
)
def test_fault_details_are_read_whatever_is_written_there(text: str, reason: str) -> None:
    labels = {LABEL_FAULT_TYPES: "type-of-label", LABEL_FAULT_REASONS: "of-label"}
    node = parse_node(raw_node(labels=labels, annotations={ANNOTATION_FAULT_DETAILS: text}))
    assert node.fault.reason == reason


@given(st.text(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_no_annotation_breaks_the_parser(text: str) -> None:
    node = parse_node(raw_node(annotations={ANNOTATION_FAULT_DETAILS: text}))
    assert find_fault(node) is None


def test_what_other_software_writes_is_cut_to_one_bounded_line() -> None:
    long = {"timestamp": "t" * 999, "type": "a\nb", "reason": "r" * 999, "message": "m " * 9999}
    fault = parse_node(raw_node(annotations=details(long))).fault
    assert fault.type == "a b"
    assert (len(fault.message), fault.message[-1]) == (MAX_WORDS, "…")
    assert len(fault.words()) < 3 * MAX_WORDS


FAULTS = [
    pytest.param(
        {"health": "UnschedulablePendingReplacement"},
        (Reason.NODE_FAULT, False),
        ["HyperPod labelled the node UnschedulablePendingReplacement.", "batch-replace-cluster-nodes", "checkpoint"],
        id="a node that waits for its replacement is faulty, and its pods get their grace",
    ),
    pytest.param(
        {"health": "UnschedulablePendingReboot"},
        (Reason.NODE_FAULT, False),
        ["UnschedulablePendingReboot", "batch-reboot-cluster-nodes"],
        id="a node that waits for its reboot is faulty",
    ),
    pytest.param(
        {"health": "Unschedulable"},
        (Reason.NODE_FAULT, False),
        ["labelled the node Unschedulable.", "is checking the node"],
        id="a deep check takes the node away as well",
    ),
    pytest.param(
        {"health": "UnschedulableForAnotherReason"},
        (Reason.NODE_FAULT, False),
        ["UnschedulableForAnotherReason", "kubectl describe node"],
        id="an unschedulable state of a later HyperPod is a fault too",
    ),
    pytest.param(
        {
            "health": "UnschedulablePendingReboot",
            "fault": FaultDetails("NeuronError", "SRAM_ECC", "nd3 failed", "2026-01-02T03:00:00Z"),
        },
        (Reason.NODE_FAULT, False),
        ["(NeuronError/SRAM_ECC at 2026-01-02T03:00:00Z: nd3 failed)"],
        id="HyperPod's own words are the evidence",
    ),
    pytest.param(
        {"health": "UnschedulablePendingReboot", "ready": "Unknown"},
        (Reason.NODE_FAULT, True),
        ["UnschedulablePendingReboot and its kubelet does not answer"],
        id="a faulty node that fell silent is dead, and HyperPod's word explains it",
    ),
    pytest.param(
        {"health": "Schedulable", "health_taint": "Unschedulable:NoSchedule"},
        (Reason.NODE_FAULT, False),
        ["tainted the node sagemaker.amazonaws.com/node-health-status=Unschedulable:NoSchedule"],
        id="the taint alone is a fault, for label and taint are not written at once",
    ),
    pytest.param(
        {"ready": "Unknown", "ready_since": NOW, "ready_message": "Kubelet stopped posting node status."},
        (Reason.NODE_LOST, True),
        ["the node does not answer since 2026-01-02T03:04:05Z (Kubelet stopped posting node status)."],
        id="a kubelet that does not answer makes the node lost, and its pods need force",
    ),
    pytest.param(
        {"ready": "False", "ready_message": "container runtime is down"},
        (Reason.NODE_LOST, False),
        ["the node is not ready (container runtime is down)."],
        id="a node that says itself that it is not ready is lost, and can still end its pods",
    ),
    pytest.param(
        {"deleting": True, "ready": "True"},
        (Reason.NODE_LOST, False),
        ["is being deleted"],
        id="a node whose deletion was asked for is lost, and its pods get their grace",
    ),
]


@pytest.mark.parametrize(("state", "expected", "words"), FAULTS)
def test_a_fault_has_its_reason_evidence_and_remedy(
    state: Mapping[str, Any], expected: tuple[Reason, bool], words: list[str]
) -> None:
    fault = find_fault(NodeState(name=NAME, **{"ready": "True", **state}))
    assert fault is not None
    assert (fault.reason, fault.is_dead) == expected
    assert [word for word in words if word not in fault.message] == []
    assert fault.message.endswith(".")


@pytest.mark.parametrize("node", [None, NodeState(NAME, health="Schedulable", ready="True")])
def test_a_deleted_node_is_lost_and_dead_whatever_was_known_of_it(node: NodeState | None) -> None:
    fault = find_fault(node, deleted=True)
    assert fault is not None
    assert (fault.reason, fault.is_dead) == (Reason.NODE_LOST, True)


@pytest.mark.parametrize(
    "node",
    [
        pytest.param(None, id="a node that was never seen"),
        pytest.param(NodeState(NAME, ready="True"), id="a node without HyperPod's labels"),
        pytest.param(NodeState(NAME, health="Schedulable", ready="True"), id="a healthy node"),
        pytest.param(
            NodeState(NAME, health="Schedulable", deep_check="Failed", ready="True"), id="a failed deep check"
        ),
        pytest.param(NodeState(NAME, ready="True", unschedulable=True), id="a cordoned node"),
        pytest.param(
            NodeState(NAME, health="Schedulable", ready="True", fault=FaultDetails("XID", "79", "gone", "2025")),
            id="a node that recovered and still carries the details of its fault",
        ),
    ],
)
def test_what_is_no_fault(node: NodeState | None) -> None:
    assert find_fault(node) is None


def test_a_healthy_value_of_the_taint_is_none() -> None:
    assert parse_node(raw_node(taints=[{"key": TAINT_HEALTH, "value": "Schedulable"}])).health_taint == ""


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        pytest.param([NodeState("a"), NodeState("b", ready="Unknown")], "", id="none, whatever Kubernetes says"),
        pytest.param([NodeState("a", health="Schedulable")], "", id="none of a healthy cluster"),
        pytest.param(
            [NodeState("b", health="UnschedulablePendingReboot"), NodeState("a", health="Schedulable")],
            "keeps pods off node b (UnschedulablePendingReboot); ",
            id="one with its label",
        ),
        pytest.param(
            [NodeState("a", health="Schedulable", health_taint="Unschedulable:NoSchedule")],
            "keeps pods off node a (tainted Unschedulable:NoSchedule); ",
            id="one that is only tainted",
        ),
        pytest.param(
            [NodeState(name, health="Unschedulable") for name in "edcba"],
            "keeps pods off nodes a (Unschedulable), b (Unschedulable), c (Unschedulable) and 2 more; ",
            id="the first of many",
        ),
    ],
)
def test_nodes_that_hyperpod_holds_back_are_named(nodes: list[NodeState], words: str) -> None:
    assert words in held_back(nodes)
    assert bool(words) == bool(held_back(nodes))


# nodes to avoid


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        pytest.param([], Avoidance(), id="nothing happened"),
        pytest.param([("a", ago(5))], Avoidance(suspects=("a",)), id="a node that failed once is a suspect"),
        pytest.param(
            [("b", ago(50)), ("a", ago(9)), ("b", ago(10))],
            Avoidance(("b",), ("a",), NOW + timedelta(seconds=90)),
            id="a node that failed twice is avoided until the window after its last fault is over",
        ),
        pytest.param(
            [("a", ago(150)), ("a", ago(10))],
            Avoidance(suspects=("a",)),
            id="faults that lie further apart than the window do not add up",
        ),
        pytest.param(
            [("a", ago(150)), ("a", ago(60))],
            Avoidance(("a",), (), NOW + timedelta(seconds=40)),
            id="an avoided node stays so though its first fault is older than the window",
        ),
        pytest.param([("a", ago(120)), ("a", ago(100))], Avoidance(), id="a node is forgiven when the window is over"),
        pytest.param(
            [("a", ago(20)), ("a", ago(10)), ("b", ago(40)), ("b", ago(30))],
            Avoidance(("a", "b"), (), NOW + timedelta(seconds=70)),
            id="the end is that of the first to be forgiven",
        ),
    ],
)
def test_faults_of_attempts_become_nodes_to_avoid(faults: list[tuple[str, datetime]], expected: Avoidance) -> None:
    assert nodes_to_avoid(faults, NOW, window_seconds=100, faults_to_avoid=2) == expected


names = st.sampled_from(["a", "b", "c", "d"])
history = st.lists(st.tuples(names, st.integers(0, 300).map(ago)), max_size=12)


@given(history, st.randoms(use_true_random=False), st.integers(1, 4))
def test_avoidance_ends_when_it_says_and_not_before(
    faults: list[tuple[str, datetime]], shuffler: Any, threshold: int
) -> None:
    rules = {"window_seconds": 100.0, "faults_to_avoid": threshold}
    found = nodes_to_avoid(faults, NOW, **rules)
    mixed = list(faults)
    shuffler.shuffle(mixed)
    assert nodes_to_avoid(mixed, NOW, **rules) == found
    assert not set(found.avoid) & set(found.suspects)
    assert (found.ends_at is None) == (not found.avoid)
    if found.ends_at is not None:
        assert found.ends_at > NOW
        just_before = nodes_to_avoid(faults, found.ends_at - timedelta(microseconds=1), **rules)
        assert just_before.avoid == found.avoid
        assert set(nodes_to_avoid(faults, found.ends_at, **rules).avoid) < set(found.avoid)


# affinity


def test_a_cluster_without_labels_and_faults_gets_no_affinity() -> None:
    assert node_affinity([NodeState("a"), NodeState("b")]) is None


def test_the_affinity_of_a_hyperpod_cluster_with_faulty_nodes() -> None:
    nodes = [NodeState("a", health="Schedulable", deep_check="Passed"), NodeState("b")]
    assert node_affinity(nodes, avoid=["y", "x"], suspects=["x", "w"]) == {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [
                {
                    "matchExpressions": [{"key": LABEL_HEALTH, "operator": "In", "values": ["Schedulable"]}],
                    "matchFields": [
                        {"key": "metadata.name", "operator": "NotIn", "values": ["x"]},
                        {"key": "metadata.name", "operator": "NotIn", "values": ["y"]},
                    ],
                }
            ]
        },
        "preferredDuringSchedulingIgnoredDuringExecution": [
            {
                "weight": 100,
                "preference": {"matchExpressions": [{"key": LABEL_DEEP_CHECK, "operator": "In", "values": ["Passed"]}]},
            },
            {
                "weight": 100,
                "preference": {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["w"]}]},
            },
        ],
    }


def forbidden(affinity: Mapping[str, Any] | None) -> list[str]:
    """Names of the nodes that the affinity rules out."""
    required = (affinity or {}).get("requiredDuringSchedulingIgnoredDuringExecution", {"nodeSelectorTerms": [{}]})
    [term] = required["nodeSelectorTerms"]
    return [name for field in term.get("matchFields", ()) for name in field["values"]]


SPARE = NodeState("spare", ready="True", instance_type="ml.trn1.32xlarge")


@pytest.mark.parametrize(
    ("others", "needed", "expected"),
    [
        pytest.param([SPARE], 1, ["bad"], id="a bad node is ruled out where another can take its place"),
        pytest.param([], 1, [], id="the only node of a cluster is not"),
        pytest.param([SPARE], 2, [], id="a node without which the gang does not fit is not"),
        pytest.param([SPARE, replace(SPARE, name="third")], 2, ["bad"], id="a gang that fits without it is kept off"),
        pytest.param([replace(SPARE, instance_type="ml.m5.large")], 1, [], id="a node of another type is no spare"),
        pytest.param([replace(SPARE, unschedulable=True)], 1, [], id="a cordoned node is no spare"),
        pytest.param([replace(SPARE, ready="Unknown")], 1, [], id="a silent node is no spare"),
        pytest.param([replace(SPARE, health="UnschedulablePendingReboot")], 1, [], id="a faulty node is no spare"),
        pytest.param(
            [SPARE, NodeState("labelled", health="Schedulable", ready="True")],
            1,
            [],
            id="a node without the label is no spare where it is required",
        ),
    ],
)
def test_a_node_is_ruled_out_only_where_there_is_room_without_it(
    others: list[NodeState], needed: int, expected: list[str]
) -> None:
    nodes = [replace(SPARE, name="bad"), *others]
    affinity = node_affinity(nodes, avoid={"bad"}, needed=needed, instance_type="ml.trn1.32xlarge")
    assert forbidden(affinity) == expected


def test_a_node_that_cannot_be_ruled_out_is_taken_after_every_suspect() -> None:
    affinity = node_affinity([NodeState("bad")], avoid={"bad"}, suspects={"odd"})
    assert affinity == {
        "preferredDuringSchedulingIgnoredDuringExecution": [
            {
                "weight": 100,
                "preference": {
                    "matchFields": [
                        {"key": "metadata.name", "operator": "NotIn", "values": ["bad"]},
                        {"key": "metadata.name", "operator": "NotIn", "values": ["odd"]},
                    ]
                },
            },
            {
                "weight": 100,
                "preference": {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["bad"]}]},
            },
        ]
    }


def holds(term: Mapping[str, Any], node: NodeState) -> bool:
    """Whether a node satisfies a term as Kubernetes reads it: all requirements hold; NotIn admits absence."""
    labels = {LABEL_HEALTH: node.health, LABEL_DEEP_CHECK: node.deep_check}
    fields = {"metadata.name": node.name}
    pairs = [(labels, each) for each in term.get("matchExpressions", ())]
    pairs += [(fields, each) for each in term.get("matchFields", ())]
    assert all(len(each["values"]) == 1 for each in term.get("matchFields", ())), "the API server refuses others"
    return all((source[each["key"]] in each["values"]) == (each["operator"] == "In") for source, each in pairs)


states = st.builds(
    NodeState,
    name=names,
    health=st.sampled_from([None, "Schedulable", "UnschedulablePendingReboot"]),
    deep_check=st.sampled_from([None, "Passed", "Failed"]),
)
clusters = st.lists(states, max_size=4, unique_by=lambda node: node.name)


@given(clusters, st.sets(names), st.sets(names), st.randoms(use_true_random=False))
def test_pods_go_only_where_they_may_and_the_template_depends_on_no_order(
    nodes: list[NodeState], avoid: set[str], suspects: set[str], shuffler: Any
) -> None:
    affinity = node_affinity(nodes, avoid=avoid, suspects=suspects)
    mixed = list(nodes)
    shuffler.shuffle(mixed)
    again = node_affinity(mixed, avoid=sorted(avoid, reverse=True), suspects=sorted(suspects, reverse=True))
    assert json.dumps(again) == json.dumps(affinity)
    required = (affinity or {}).get("requiredDuringSchedulingIgnoredDuringExecution", {"nodeSelectorTerms": [{}]})
    labelled = any(node.health is not None for node in nodes)
    usable = {
        node.name for node in nodes if (not labelled or node.health == "Schedulable") and find_fault(node) is None
    }
    allowed = {node.name for node in nodes if all(holds(term, node) for term in required["nodeSelectorTerms"])}
    # Never a faulty node, never a bad one while there is another, and never none while there is one.
    assert allowed == (usable - avoid or usable)
    for preferred in (affinity or {}).get("preferredDuringSchedulingIgnoredDuringExecution", ()):
        assert preferred["preference"], "an empty preference would match no node"
