"""The comparison of an audit log with the chart's roles, on small logs."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from rbac_audit import (
    Differences,
    Grant,
    Rule,
    Suite,
    Use,
    audit_time,
    compare,
    granted,
    reaches_back,
    service_account_user,
    suite_of,
    together,
    used,
    whole_suites,
)

USER = service_account_user("finetune-system", "finetune-operator")


MORNING, NOON, EVENING = (audit_time(datetime(2026, 1, 2, hour, tzinfo=timezone.utc)) for hour in (6, 12, 18))


def line(verb: str, *, user: str = USER, at: str = NOON, **reference: str) -> str:
    """One audit event as the API server writes it, without what nobody reads here."""
    event: dict[str, Any] = {"kind": "Event", "stage": "ResponseComplete", "verb": verb, "user": {"username": user}}
    event["requestReceivedTimestamp"] = at
    if reference:
        event["objectRef"] = {"apiVersion": "v1", **reference}
    return json.dumps(event)


def test_uses_are_the_users_requests_for_resources() -> None:
    lines = [
        line("list", resource="pods"),
        line("list", resource="pods"),
        line("get", resource="pods", subresource="log", namespace="team-a", name="x"),
        line("create", resource="jobs", apiGroup="batch", namespace="team-a", name="x-train-1"),
        line("get", resource="nodes", user="system:admin"),
        line("get"),
        line("create", resource="selfsubjectaccessreviews", apiGroup="authorization.k8s.io"),
        "",
    ]
    assert used(lines, USER) == {
        Use("", "pods", "list"),
        Use("", "pods/log", "get", "team-a", "x"),
        Use("batch", "jobs", "create", "team-a"),
    }


def test_what_was_asked_before_the_session_is_left_out() -> None:
    lines = [line("list", resource="pods", at=MORNING), line("get", resource="pods", at=EVENING)]
    assert used(lines, USER, NOON) == {Use("", "pods", "get")}
    assert NOON == "2026-01-02T12:00:00.000000Z", "as the API server writes it"
    assert reaches_back(lines[0], NOON)
    assert not reaches_back(lines[1], NOON)


def test_a_line_that_is_still_being_written_is_left_out_and_a_broken_one_named() -> None:
    whole = line("list", resource="pods")
    assert used([whole, whole[:20]], USER) == {Use("", "pods", "list")}
    with pytest.raises(ValueError, match="line 1"):
        used([whole[:20], whole], USER)


def grant(verb: str, resource: str, *, namespace: str = "", names: tuple[str, ...] = (), role: str = "R") -> Grant:
    return Grant(Rule(role, "", resource, verb), namespace, names)


@pytest.mark.parametrize(
    ("given", "use", "allowed"),
    [
        pytest.param(grant("get", "secrets"), Use("", "secrets", "get", "a", "s"), True, id="everywhere"),
        pytest.param(grant("get", "secrets", namespace="a"), Use("", "secrets", "get", "a", "s"), True, id="there"),
        pytest.param(
            grant("get", "secrets", namespace="b"), Use("", "secrets", "get", "a", "s"), False, id="elsewhere"
        ),
        pytest.param(grant("list", "pods", namespace="a"), Use("", "pods", "list"), False, id="all namespaces at once"),
        pytest.param(grant("get", "secrets", names=("s",)), Use("", "secrets", "get", "a", "s"), True, id="by name"),
        pytest.param(
            grant("get", "secrets", names=("t",)), Use("", "secrets", "get", "a", "s"), False, id="other name"
        ),
        pytest.param(grant("list", "secrets", names=("s",)), Use("", "secrets", "list", "a"), False, id="list by name"),
        pytest.param(grant("get", "pods"), Use("", "pods/log", "get", "a", "p"), False, id="not the subresource"),
        pytest.param(grant("get", "pods"), Use("", "pods", "patch", "a", "p"), False, id="another verb"),
        pytest.param(grant("get", "jobs"), Use("batch", "jobs", "get", "a", "j"), False, id="another group"),
    ],
)
def test_a_grant_allows_what_rbac_would(given: Grant, use: Use, allowed: bool) -> None:
    assert given.allows(use) is allowed
    found = compare([use], [given])
    assert (found.not_granted == frozenset(), found.not_used == frozenset()) == (allowed, allowed)


def test_a_use_counts_for_the_narrowest_grant() -> None:
    wide = grant("get", "secrets", role="wide")
    narrow = grant("get", "secrets", namespace="finetune-system", names=("tls",), role="narrow")
    own = Use("", "secrets", "get", "finetune-system", "tls")
    of_a_job = Use("", "secrets", "get", "team-a", "token")
    assert compare([own], [wide, narrow]).not_used == {wide.rule}
    assert compare([of_a_job], [wide, narrow]).not_used == {narrow.rule}
    assert compare([own, of_a_job], [wide, narrow]).not_used == frozenset()


def test_a_role_bound_in_two_namespaces_is_used_in_one() -> None:
    grants = [grant("list", "pods", namespace=namespace) for namespace in ("a", "b")]
    assert compare([Use("", "pods", "list", "b")], grants) == compare([], [])


def test_the_charts_roles_are_read_with_their_bindings(render: Any) -> None:
    manifests = render("--set", "watchNamespaces={research}", "--set", "nodes.watch=true")
    grants = granted(manifests, "finetune-system", "finetune-operator")
    assert Grant(Rule("ClusterRole/finetune-operator", "batch", "jobs", "create"), "research") in grants
    assert Grant(Rule("ClusterRole/finetune-operator-cluster", "", "nodes", "watch")) in grants
    lease = Rule("Role/finetune-operator", "coordination.k8s.io", "leases", "update")
    assert Grant(lease, "finetune-system", ("finetune-operator",)) in grants
    assert not any("view" in each.rule.role or "edit" in each.rule.role for each in grants)
    assert granted(manifests, "finetune-system", "somebody-else") == frozenset()


def test_a_binding_of_a_role_that_is_not_there_is_an_error(render: Any) -> None:
    manifests = [m for m in render() if m["kind"] != "Role"]
    with pytest.raises(ValueError, match="finetune-operator-own binds"):
        granted(manifests, "finetune-system", "finetune-operator")


def test_what_one_release_uses_is_used_and_what_one_lacks_is_lacking() -> None:
    def rule(release: str, verb: str) -> Rule:
        return Rule(f"ClusterRole/{release}-cluster", "", "nodes", verb)

    lacking = Use("", "nodes", "patch")
    parts = {
        "mine": Differences(frozenset(), frozenset({rule("mine", "list"), rule("mine", "watch")})),
        "installed": Differences(
            frozenset({lacking}), frozenset({rule("installed", "list"), rule("installed", "get")})
        ),
    }
    assert together(parts) == Differences(frozenset({lacking}), frozenset({rule("*", "list")}))


FILES = [Path(folder, name) for folder in ("contract", "e2e") for name in ("test_kueue.py", "test_faults.py")]
KUEUES, OTHERS = [path for path in FILES if "kueue" in path.name], [path for path in FILES if "kueue" not in path.name]


@pytest.mark.parametrize(
    ("collected", "suites"),
    [
        pytest.param(FILES, set(Suite), id="everything"),
        pytest.param(OTHERS, {Suite.MAIN}, id="all but Kueue's tests"),
        pytest.param(KUEUES, {Suite.KUEUE}, id="Kueue's tests"),
        pytest.param([*KUEUES, OTHERS[0]], {Suite.KUEUE}, id="Kueue's tests and some others"),
        pytest.param(FILES[:1], set(), id="one file"),
    ],
)
def test_unused_rights_are_told_by_whole_suites_only(collected: list[Path], suites: set[Suite]) -> None:
    assert whole_suites(FILES, collected) == suites


def test_rights_on_kueues_kinds_are_used_by_kueues_tests() -> None:
    assert suite_of(Rule("R", "kueue.x-k8s.io", "workloads/status", "patch")) is Suite.KUEUE
    assert suite_of(Rule("R", "batch", "jobs", "patch")) is Suite.MAIN
