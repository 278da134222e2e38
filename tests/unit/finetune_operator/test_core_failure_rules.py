"""The failure doctor's table itself: every row can be reached, every end has one, and every message says what to do."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.core.failure_rules import RULES, Evidence, Precedence, Rule, Verdict, When, find_rule

SUBJECT = Evidence(subject="Pod p on node n", stage="train", words="its words", node_remedy="Do this.")


def evidence_for(rule: Rule, data: st.DataObject) -> Evidence:
    """Some evidence that has just what the row looks at."""
    values: dict[str, Any] = {"exit_code": 1} if rule.when.over else {}
    for name, wanted in rule.when.looked_at:
        if isinstance(wanted, str):
            words = st.from_regex(wanted, alphabet=st.characters(codec="ascii", categories=("L", "N", "P", "Zs")))
            values[name] = data.draw(words, label=name)
        elif isinstance(wanted, frozenset):
            values[name] = data.draw(st.sampled_from(sorted(wanted, key=str)), label=name)
        else:
            values[name] = wanted
    return replace(SUBJECT, **values)


def row_id(rule: Rule) -> str:
    return f"{rule.reason} for {', '.join(f'{name}={wanted}' for name, wanted in rule.when.looked_at)}"


@pytest.mark.parametrize("rule", [pytest.param(rule, id=row_id(rule)) for rule in RULES])
@given(data=st.data())
def test_every_row_is_reached_and_its_message_has_the_evidence_and_a_remedy(rule: Rule, data: st.DataObject) -> None:
    evidence = evidence_for(rule, data)
    found = find_rule(evidence)
    if any(wanted == "." for _, wanted in rule.when.looked_at):
        assert found is not None, "the rest of what a field can say: an earlier row may have a word for it"
    else:
        assert found is rule
    message = rule.message(evidence)
    assert message.startswith(("Pod p on node n", "A pod of Pod p on node n"))
    remedy = rule.remedy.format_map({field.name: getattr(evidence, field.name) for field in fields(evidence)})
    assert remedy
    assert message.endswith(remedy)
    assert remedy.endswith(".")


@pytest.mark.parametrize("field", ["disruption_reason", "pod_reason", "unschedulable", "hang"])
def test_a_word_that_the_table_does_not_know_has_a_row_too(field: str) -> None:
    over = field != "unschedulable"
    unheard: dict[str, Any] = {field: "Unheard"}
    rule = find_rule(replace(SUBJECT, over=over, **unheard))
    assert rule is not None
    assert rule.when.looked_at[-1] == (field, ".")


@given(st.one_of(st.none(), st.integers(0, 255)), st.text(max_size=20), st.text(max_size=20), st.booleans())
def test_every_end_has_a_row(code: int | None, container: str, pod: str, deleted: bool) -> None:
    ended = Evidence(over=True, exit_code=code, container_reason=container, pod_reason=pod, deleted=deleted)
    rule = find_rule(ended)
    assert rule is not None
    assert rule.verdict is not Verdict.WAIT


def test_what_only_starts_has_no_row() -> None:
    assert find_rule(SUBJECT) is None
    assert find_rule(replace(SUBJECT, container_reason="ContainerCreating")) is None
    assert find_rule(replace(SUBJECT, container_reason="PodInitializing")) is None


def test_a_row_looks_at_fields_of_the_evidence_only() -> None:
    assert {field.name for field in fields(When)} <= {field.name for field in fields(Evidence)}


def test_only_infrastructure_is_free_and_only_what_a_pod_says_of_itself_fails_for_good() -> None:
    assert all(rule.precedence is Precedence.OWN for rule in RULES if rule.verdict is Verdict.FAIL)
    assert all(rule.verdict is Verdict.FREE for rule in RULES if rule.precedence is Precedence.NODE)


def test_every_field_that_a_message_names_is_of_the_evidence() -> None:
    known = {field.name for field in fields(Evidence)}
    for rule in RULES:
        assert set(re.findall(r"{(\w*)}", rule.said + rule.remedy)) <= known
