"""The operator uses every right that the chart grants, and no other, by the API server's audit log of this session.

Last of all tests, behind contract and end-to-end tests: the operators under test run as a service account with the
chart's roles, and the installed one as its own. Both together are compared with what the chart grants.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import kube
import operator_account
import pytest
from operator_account import ACCOUNT
from rbac_audit import (
    Differences,
    Grant,
    Rule,
    compare,
    granted,
    reaches_back,
    service_account_user,
    suite_of,
    together,
    used,
    whole_suites,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

TESTS = Path(__file__).resolve().parents[1]
OPERATORS = "app.kubernetes.io/name=finetune-operator"
UNSEEN = {
    Rule("ClusterRole/*", "finetune-operator.io", "finetunejobs/finalizers", "update"): (
        "the admission plugin OwnerReferencesPermissionEnforcement asks the authorizer for it, in no request of its own"
    )
}
"""Rights that are needed and are in no audit log, with the reason."""


@pytest.fixture(scope="module")
def lines(begun: str) -> list[str]:
    """The audit log of at least this session."""
    named = os.environ.get("FINETUNE_AUDIT_LOG")
    if not named:
        pytest.skip("no FINETUNE_AUDIT_LOG: only the cluster of hack/cluster writes down who asked for what")
    earlier = sorted(Path(named).parent.glob("audit-*.log"))
    found = [line for path in (*earlier, Path(named)) for line in path.read_text(encoding="utf-8").splitlines()]
    assert not earlier or reaches_back(found[0], begun), (
        f"the audit log begins after this session: raise audit_log_maxsize in hack/cluster (now 2 files of {named})"
    )
    return found


@dataclass(frozen=True)
class Operator:
    """The name of a release's objects, the account that its operator runs as, and what the chart grants that."""

    name: str
    user: str
    grants: frozenset[Grant]


@pytest.fixture(scope="module")
def operators(request: pytest.FixtureRequest) -> list[Operator]:
    """The account of the contract tests, and the release that end-to-end tests use, if there were any of them.

    Without these the installed release may be another than the chart of this tree.
    """
    found = []
    if (account := request.config.stash.get(ACCOUNT, None)) is not None:
        grants = granted(account.manifests, account.namespace, account.name)
        found.append(Operator(account.name, account.user, grants))
    if not any(TESTS / "e2e" in item.path.parents for item in request.session.items):
        return found
    for deployment in kube.items("deployments", "-n", os.environ.get("NAMESPACE", "finetune-system"), "-l", OPERATORS):
        namespace, name = deployment["metadata"]["namespace"], deployment["metadata"]["name"]
        release = deployment["metadata"]["labels"]["app.kubernetes.io/instance"]
        manifests = operator_account.render(release, namespace, "rbac.aggregate=false")
        grants = granted(manifests, namespace, name)
        found.append(Operator(name, service_account_user(namespace, name), grants))
    return found


@pytest.fixture(scope="module")
def differences(lines: list[str], begun: str, operators: list[Operator]) -> Differences:
    """Of all operators that have asked for something in this session."""
    uses = {each: used(lines, each.user, begun) for each in operators}
    parts = {each.name: compare(uses[each], each.grants) for each in operators if uses[each]}
    if not parts:
        pytest.skip("no operator has asked the API server for anything in this session")
    return together(parts)


def test_nothing_was_used_that_the_chart_does_not_grant(differences: Differences) -> None:
    assert sorted(differences.not_granted) == []


def test_nothing_is_granted_that_no_test_has_used(
    differences: Differences, whole_files: frozenset[Path], request: pytest.FixtureRequest
) -> None:
    if request.session.testsfailed:
        pytest.skip("tests have failed, and what they would have used is not known")
    files = [path for folder in ("contract", "e2e") for path in (TESTS / folder).glob("test_*.py")]
    suites = whole_suites(files, whole_files)
    if not suites:
        pytest.skip("not the whole suite ran: `make test` tells, and `make test-kueue` for Kueue's kinds")
    assert sorted(rule for rule in differences.not_used if suite_of(rule) in suites) == sorted(
        rule for rule in UNSEEN if suite_of(rule) in suites
    )


def test_what_no_request_shows_is_granted_as_the_authorizer_is_asked_for_it(operators: list[Operator]) -> None:
    for operator in operators:
        for rule in UNSEEN:
            resource, subresource = rule.resource.split("/")
            asked = (rule.verb, f"{resource}.{rule.group}", f"--subresource={subresource}", "--as", operator.user)
            assert kube.kubectl("auth", "can-i", "-n", "default", *asked).strip() == "yes"
