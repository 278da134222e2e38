"""The operator's rights, listed here once and compared with what the chart renders: no verb more, none less."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

Rules = dict[tuple[str, str], set[str]]

JOBS_AND_PODS: Rules = {
    ("finetune-operator.io", "finetunejobs"): {"get", "list", "watch", "delete"},
    ("finetune-operator.io", "finetunejobs/status"): {"patch"},
    ("finetune-operator.io", "finetunejobs/finalizers"): {"update"},
    ("batch", "jobs"): {"get", "list", "watch", "create", "patch", "delete"},
    ("", "services"): {"get", "list", "watch", "create", "delete"},
    ("", "pods"): {"list", "watch", "patch", "delete"},
    ("", "persistentvolumeclaims"): {"get"},
    ("", "secrets"): {"get"},
    ("", "resourcequotas"): {"list"},
    ("events.k8s.io", "events"): {"list", "create"},
}
LOGS: Rules = {("", "pods/log"): {"get"}}
QUEUE: Rules = {
    ("kueue.x-k8s.io", "workloads"): {"list", "watch", "create", "delete"},
    ("kueue.x-k8s.io", "workloads/status"): {"patch"},
    ("kueue.x-k8s.io", "localqueues"): {"get"},
}
NODES: Rules = {("", "nodes"): {"list", "watch"}}
CLUSTER_QUEUES: Rules = {
    ("kueue.x-k8s.io", "clusterqueues"): {"get"},
    ("kueue.x-k8s.io", "resourceflavors"): {"get"},
    ("kueue.x-k8s.io", "workloadpriorityclasses"): {"get"},
}
TOKEN_REVIEW: Rules = {("authentication.k8s.io", "tokenreviews"): {"create"}}
LEASE: Rules = {("coordination.k8s.io", "leases"): {"get", "update", "create"}}
TLS: Rules = {("", "secrets"): {"get", "patch"}}
READ = {"get", "list", "watch"}
MAIN = ("ClusterRole", "finetune-operator")
CLUSTER = ("ClusterRole", "finetune-operator-cluster")
OWN = ("Role", "finetune-operator")
PEOPLE: dict[tuple[str, str], Rules] = {
    ("ClusterRole", "finetune-operator-view"): {
        ("finetune-operator.io", "finetunejobs"): READ,
        ("finetune-operator.io", "finetunejobs/status"): READ,
        ("", "pods"): READ,
        ("", "persistentvolumeclaims"): READ,
        ("", "pods/log"): {"get"},
        ("batch", "jobs"): READ,
        ("", "events"): READ,
        ("events.k8s.io", "events"): READ,
    },
    ("ClusterRole", "finetune-operator-edit"): {
        ("finetune-operator.io", "finetunejobs"): READ | {"create", "update", "patch", "delete", "deletecollection"},
    },
}


def rules(manifest: dict[str, Any]) -> Rules:
    """Verbs by (API group, resource); a verb that two rules give is an error, since one of them would hide."""
    found: Rules = {}
    for rule in manifest["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                verbs = found.setdefault((group, resource), set())
                assert not verbs & set(rule["verbs"])
                verbs |= set(rule["verbs"])
    return found


def of_kind(manifests: Iterable[dict[str, Any]], *kinds: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(m["kind"], m["metadata"]["name"]): m for m in manifests if m["kind"] in kinds}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param(
            (),
            {MAIN: JOBS_AND_PODS | LOGS | QUEUE, CLUSTER: NODES | CLUSTER_QUEUES | TOKEN_REVIEW, OWN: LEASE | TLS},
            id="by default",
        ),
        pytest.param(
            ("watchNamespaces={research}",),
            {MAIN: JOBS_AND_PODS | LOGS | QUEUE, CLUSTER: TOKEN_REVIEW, OWN: LEASE | TLS},
            id="with named namespaces, where only TokenReview is left cluster-wide",
        ),
        pytest.param(
            ("watchNamespaces={research}", "nodes.watch=true", "queue.clusterQueues=true"),
            {MAIN: JOBS_AND_PODS | LOGS | QUEUE, CLUSTER: NODES | CLUSTER_QUEUES | TOKEN_REVIEW, OWN: LEASE | TLS},
            id="with named namespaces and each cluster-wide right asked for",
        ),
        pytest.param(
            ("watchNamespaces={research}", "progress.enabled=false"),
            {MAIN: JOBS_AND_PODS | LOGS | QUEUE, OWN: LEASE},
            id="with named namespaces and nothing cluster-wide",
        ),
        pytest.param(
            ("nodes.watch=false", "queue.clusterQueues=false"),
            {MAIN: JOBS_AND_PODS | LOGS | QUEUE, CLUSTER: TOKEN_REVIEW, OWN: LEASE | TLS},
            id="with cluster-wide reads switched off",
        ),
        pytest.param(
            ("queue.enabled=false", "queue.clusterQueues=true"),
            {MAIN: JOBS_AND_PODS | LOGS, CLUSTER: NODES | TOKEN_REVIEW, OWN: LEASE | TLS},
            id="with the queue switched off, whatever is said of ClusterQueues",
        ),
        pytest.param(
            ("queue.enabled=false", "logs.enabled=false", "progress.enabled=false"),
            {MAIN: JOBS_AND_PODS, CLUSTER: NODES, OWN: LEASE},
            id="with queue, logs and progress switched off",
        ),
    ],
)
def test_roles_hold_exactly_the_verbs_listed(
    render: Any, values: tuple[str, ...], expected: dict[tuple[str, str], Rules]
) -> None:
    arguments = [part for value in values for part in ("--set", value)]
    found = {name: rules(m) for name, m in of_kind(render(*arguments), "ClusterRole", "Role").items()}
    assert found == expected | PEOPLE


def test_the_lease_is_read_and_written_by_its_name_alone(render: Any) -> None:
    role = of_kind(render(), "Role")[OWN]
    named = {
        tuple(rule["verbs"]): rule.get("resourceNames") for rule in role["rules"] if rule["resources"] == ["leases"]
    }
    assert named == {("get", "update"): ["finetune-operator"], ("create",): None}


def test_no_rule_has_a_wildcard(render: Any) -> None:
    for manifest in of_kind(render(), "ClusterRole", "Role").values():
        assert "*" not in yaml.safe_dump(manifest["rules"]).replace("'", "")


def test_secrets_are_never_listed_and_only_the_operators_own_is_written(render: Any) -> None:
    for manifest in of_kind(render(), "ClusterRole", "Role").values():
        for rule in manifest["rules"]:
            if "secrets" in rule["resources"]:
                assert not {"list", "watch", "create", "update", "delete"} & set(rule["verbs"])
                assert rule["verbs"] == ["get"] or rule["resourceNames"] == ["finetune-operator-tls"]


def test_every_rule_says_why(chart: Path) -> None:
    for name in ("rbac.yaml", "aggregated-roles.yaml"):
        lines = (chart / "templates" / name).read_text().splitlines()
        starts = [number for number, line in enumerate(lines) if re.match(r"\s+- apiGroups:", line)]
        assert starts
        unexplained = [lines[number + 1].strip() for number in starts if not lines[number - 1].lstrip().startswith("#")]
        assert unexplained == []


def test_bindings_give_the_roles_to_the_operators_service_account_alone(render: Any) -> None:
    for manifest in of_kind(render(), "ClusterRoleBinding", "RoleBinding").values():
        assert manifest["subjects"] == [
            {"kind": "ServiceAccount", "name": "finetune-operator", "namespace": "finetune-system"}
        ]


def test_named_namespaces_have_the_rights_and_nobody_else(render: Any) -> None:
    manifests = render("--set", "watchNamespaces={research,team-b}", "--set", "progress.enabled=false")
    assert of_kind(manifests, "ClusterRoleBinding") == {}
    bound = {
        (m["metadata"]["namespace"], m["roleRef"]["kind"], m["roleRef"]["name"])
        for m in manifests
        if m["kind"] == "RoleBinding"
    }
    assert bound == {
        ("research", *MAIN),
        ("team-b", *MAIN),
        ("finetune-system", *OWN),
    }


def test_people_get_their_rights_by_aggregation(render: Any) -> None:
    prefix = "rbac.authorization.k8s.io/aggregate-to-"
    found = {
        name: {label.removeprefix(prefix) for label in m["metadata"]["labels"] if label.startswith(prefix)}
        for (_, name), m in of_kind(render(), "ClusterRole").items()
    }
    assert found == {
        "finetune-operator": set(),
        "finetune-operator-cluster": set(),
        "finetune-operator-view": {"view", "edit", "admin"},
        "finetune-operator-edit": {"edit", "admin"},
    }
