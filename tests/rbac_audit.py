"""Rights used against rights granted: an API server's audit log beside the chart's roles. Pure.

tests/rights gives a session's lines and helm's manifests; what comes out is every use that no role allows, and every
verb of a role that nobody used. What everybody may (`system:basic-user`) is left out.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

BASIC_GROUPS = ("authorization.k8s.io", "authentication.k8s.io")
BASIC_PREFIX = "selfsubject"
KUEUE_GROUP = "kueue.x-k8s.io"


@dataclass(frozen=True, order=True)
class Use:
    """One kind of request that was made. `namespace` and `name` are "" where the request has none."""

    group: str
    resource: str
    verb: str
    namespace: str = ""
    name: str = ""


@dataclass(frozen=True, order=True)
class Rule:
    """One verb on one resource (pods/log for a subresource) in one role."""

    role: str
    group: str
    resource: str
    verb: str


@dataclass(frozen=True, order=True)
class Grant:
    """A rule as a binding gives it: in `namespace`, everywhere for ""; on `names` only, on any for none."""

    rule: Rule
    namespace: str = ""
    names: tuple[str, ...] = ()

    def allows(self, use: Use) -> bool:
        """Whether RBAC lets this use pass by this grant."""
        rule = self.rule
        return (
            (rule.group, rule.resource, rule.verb) == (use.group, use.resource, use.verb)
            and self.namespace in ("", use.namespace)
            and (not self.names or use.name in self.names)
        )

    @property
    def breadth(self) -> tuple[bool, bool]:
        """Smaller for a narrower grant: names first, then the namespace."""
        return (not self.names, not self.namespace)


@dataclass(frozen=True)
class Differences:
    """`not_granted`: uses that no role allows. `not_used`: rules that no use needed, in whatever namespace."""

    not_granted: frozenset[Use]
    not_used: frozenset[Rule]


def service_account_user(namespace: str, name: str) -> str:
    """The user name of a service account's requests."""
    return f"system:serviceaccount:{namespace}:{name}"


def audit_time(moment: datetime) -> str:
    """A moment as audit events have it; such texts are in the order of time."""
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def used(lines: Iterable[str], user: str, since: str = "") -> frozenset[Use]:
    """What the user asked for, refused or not, from audit events (audit.k8s.io/v1) as JSON lines.

    `since` is an audit_time: what was asked earlier is left out, and so are requests that are for no resource
    (discovery, health). ValueError names a line that is no event, except for the last, which the API server may be
    writing.
    """
    found = set()
    rows = list(lines)
    for number, line in enumerate(rows, start=1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(rows):
                break
            raise ValueError(f"audit log, line {number}: {error}") from error
        reference = event.get("objectRef")
        if event["user"]["username"] != user or event["requestReceivedTimestamp"] < since:
            continue
        if reference is not None and not _is_basic(reference):
            found.add(_use(event["verb"], reference))
    return frozenset(found)


def reaches_back(first_line: str, since: str) -> bool:
    """Whether a log that begins with this line has all since then."""
    return bool(json.loads(first_line)["requestReceivedTimestamp"] <= since)


def _is_basic(reference: Mapping[str, str]) -> bool:
    return reference.get("apiGroup") in BASIC_GROUPS and reference["resource"].startswith(BASIC_PREFIX)


def _use(verb: str, reference: Mapping[str, str]) -> Use:
    resource = reference["resource"]
    if reference.get("subresource"):
        resource = f"{resource}/{reference['subresource']}"
    # RBAC does not know the name of what is only being created, though the event may have it.
    name = "" if verb == "create" and "/" not in resource else reference.get("name", "")
    return Use(reference.get("apiGroup", ""), resource, verb, reference.get("namespace", ""), name)


def granted(manifests: Iterable[Mapping[str, Any]], namespace: str, service_account: str) -> frozenset[Grant]:
    """What the bindings among the manifests give this service account by roles among the manifests."""
    manifests = list(manifests)
    roles = {
        (m["kind"], m["metadata"].get("namespace", ""), m["metadata"]["name"]): m
        for m in manifests
        if m["kind"] in ("ClusterRole", "Role")
    }
    subject = {"kind": "ServiceAccount", "name": service_account, "namespace": namespace}
    found: set[Grant] = set()
    for binding in manifests:
        if binding["kind"] not in ("ClusterRoleBinding", "RoleBinding") or subject not in binding["subjects"]:
            continue
        scope = binding["metadata"].get("namespace", "") if binding["kind"] == "RoleBinding" else ""
        reference = binding["roleRef"]
        key = (reference["kind"], scope if reference["kind"] == "Role" else "", reference["name"])
        if key not in roles:
            raise ValueError(f"{binding['kind']} {binding['metadata']['name']} binds {reference}, which is not there")
        found |= set(_grants(f"{reference['kind']}/{reference['name']}", roles[key]["rules"], scope))
    return frozenset(found)


def _grants(role: str, rules: Iterable[Mapping[str, Any]], namespace: str) -> Iterator[Grant]:
    for rule in rules:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for verb in rule["verbs"]:
                    names = tuple(sorted(rule.get("resourceNames", ())))
                    yield Grant(Rule(role, group, resource, verb), namespace, names)


def compare(uses: Iterable[Use], grants: Iterable[Grant]) -> Differences:
    """Both differences. A use that several grants allow counts for the narrowest, so that a wide one needs its own."""
    grants = sorted(grants, key=lambda grant: (grant.breadth, grant))
    not_granted, needed = set(), set()
    for use in uses:
        fitting = next((grant for grant in grants if grant.allows(use)), None)
        if fitting is None:
            not_granted.add(use)
        else:
            needed.add(fitting.rule)
    return Differences(frozenset(not_granted), frozenset(grant.rule for grant in grants) - needed)


def together(parts: Mapping[str, Differences]) -> Differences:
    """Of several releases of one chart, by the name of their objects: a rule is used if one of them has used it.

    The rules' roles are named as in a release `*`.
    """
    not_used = [
        {replace(rule, role=rule.role.replace(name, "*")) for rule in part.not_used} for name, part in parts.items()
    ]
    return Differences(
        frozenset(use for part in parts.values() for use in part.not_granted),
        frozenset(set.intersection(*not_used)) if not_used else frozenset(),
    )


class Suite(enum.StrEnum):
    """Tests that together use every right on some kinds, by the make target that runs them."""

    MAIN = "test"
    KUEUE = "test-kueue"


def suite_of(rule: Rule) -> Suite:
    """Whose tests use this rule. Kueue's kinds are there in Kueue's own tests only."""
    return Suite.KUEUE if rule.group == KUEUE_GROUP else Suite.MAIN


def whole_suites(files: Iterable[Path], collected: Collection[Path]) -> frozenset[Suite]:
    """The suites that a session runs in full: it has `collected` these of all test `files`, each whole."""
    missing = [path for path in files if path not in collected]
    in_part = {Suite.KUEUE if path.name == "test_kueue.py" else Suite.MAIN for path in missing}
    return frozenset(Suite) - in_part
