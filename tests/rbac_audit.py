"""Rights used against rights granted: an API server's audit log beside the chart's roles. Pure.

A test that ran the whole suite behind an audit log gives its lines and helm's manifests; what comes out is every use
that no role allows, and every verb of a role that nobody used. What everybody may (`system:basic-user`) is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

BASIC_GROUPS = ("authorization.k8s.io", "authentication.k8s.io")
BASIC_PREFIX = "selfsubject"


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


def used(lines: Iterable[str], user: str) -> frozenset[Use]:
    """What the user asked for, refused or not, from audit events (audit.k8s.io/v1) as JSON lines.

    Requests that are for no resource (discovery, health) are left out. ValueError names a line that is no event, except
    for the last, which the API server may be writing.
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
        if event["user"]["username"] == user and reference is not None and not _is_basic(reference):
            found.add(_use(event["verb"], reference))
    return frozenset(found)


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
