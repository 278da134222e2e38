"""The operator's rights, listed here once and compared with what the chart renders: no verb more, none less."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

Rules = dict[tuple[str, str], set[str]]

JOBS_AND_PODS: Rules = {
    ("finetune-operator.io", "finetunejobs"): {"get", "list", "watch", "delete"},
    ("finetune-operator.io", "finetunejobs/status"): {"patch"},
    ("batch", "jobs"): {"get", "list", "watch", "create", "patch", "delete"},
    ("", "configmaps"): {"get", "list", "create", "patch", "delete"},
    ("", "services"): {"get", "list", "create", "patch", "delete"},
    ("", "pods"): {"list", "watch"},
    ("", "persistentvolumeclaims"): {"get"},
    ("", "secrets"): {"get"},
    ("events.k8s.io", "events"): {"create"},
}
TOKEN_REVIEW: Rules = {("authentication.k8s.io", "tokenreviews"): {"create"}}
OWN_NAMESPACE: Rules = {("", "secrets"): {"get", "patch"}}


def rules(manifest: dict[str, Any]) -> Rules:
    """Verbs by (API group, resource); a pair that two rules name is an error, since one of them would hide."""
    found: Rules = {}
    for rule in manifest["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                assert (group, resource) not in found
                found[group, resource] = set(rule["verbs"])
    return found


def of_kind(manifests: Iterable[dict[str, Any]], *kinds: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(m["kind"], m["metadata"]["name"]): m for m in manifests if m["kind"] in kinds}


def test_roles_hold_exactly_the_verbs_listed(render: Any) -> None:
    found = {name: rules(m) for name, m in of_kind(render(), "ClusterRole", "Role").items()}
    assert found == {
        ("ClusterRole", "finetune-operator"): JOBS_AND_PODS,
        ("ClusterRole", "finetune-operator-token-review"): TOKEN_REVIEW,
        ("Role", "finetune-operator"): OWN_NAMESPACE,
        ("ClusterRole", "finetune-operator-view"): {
            ("finetune-operator.io", "finetunejobs"): {"get", "list", "watch"},
            ("finetune-operator.io", "finetunejobs/status"): {"get", "list", "watch"},
        },
        ("ClusterRole", "finetune-operator-edit"): {
            ("finetune-operator.io", "finetunejobs"): {"create", "update", "patch", "delete", "deletecollection"},
        },
    }


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


def test_only_token_review_is_bound_cluster_wide_when_namespaces_are_named(render: Any) -> None:
    manifests = render("--set", "watchNamespaces={research,team-b}")
    cluster_wide = of_kind(manifests, "ClusterRoleBinding")
    assert {m["roleRef"]["name"] for m in cluster_wide.values()} == {"finetune-operator-token-review"}
    bound = [
        m["metadata"]["namespace"]
        for m in manifests
        if m["kind"] == "RoleBinding" and m["roleRef"]["kind"] == "ClusterRole"
    ]
    assert bound == ["research", "team-b"]


def test_people_get_their_rights_by_aggregation(render: Any) -> None:
    prefix = "rbac.authorization.k8s.io/aggregate-to-"
    found = {
        name: {label.removeprefix(prefix) for label in m["metadata"]["labels"] if label.startswith(prefix)}
        for (_, name), m in of_kind(render(), "ClusterRole").items()
    }
    assert found == {
        "finetune-operator": set(),
        "finetune-operator-token-review": set(),
        "finetune-operator-view": {"view", "edit", "admin"},
        "finetune-operator-edit": {"edit", "admin"},
    }
