from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.core.names import MAX_NAME_LENGTH, child_name, pod_host_name
from finetune_trainer import contract

DIGEST = "0123456789abcdef" * 4
LABEL = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")

job_names = st.from_regex(r"\A[a-z0-9]([-a-z0-9.]{0,250}[a-z0-9])?\Z")


def test_a_short_name_is_kept_whole() -> None:
    assert child_name("tiny", "train", DIGEST, 2) == "tiny-train-01234567-2"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("a" * 63, id="a name of 63 characters"),
        pytest.param("8b-dolly", id="a digit in front, which a Service must not have"),
        pytest.param("team.model", id="a dot, which a host name must not have"),
    ],
)
def test_a_name_that_does_not_fit_is_cut_and_marked(name: str) -> None:
    made = child_name(name, "consolidate", DIGEST, 1)
    assert LABEL.match(made)
    assert len(made) <= MAX_NAME_LENGTH
    assert made.endswith("-consolidate-01234567-1")


@given(job_names, st.sampled_from(contract.STAGES), st.integers(1, 9999), st.integers(0, 1023))
def test_every_name_is_a_dns_label_also_with_a_pods_index(name: str, stage: str, attempt: int, index: int) -> None:
    made = child_name(name, stage, DIGEST, attempt)
    assert LABEL.match(made)
    assert len(pod_host_name(made, index)) <= 63


@given(st.tuples(job_names, job_names), st.sampled_from(contract.STAGES))
def test_two_jobs_never_share_a_childs_name(pair: tuple[str, str], stage: str) -> None:
    first, second = (child_name(name, stage, DIGEST, 1) for name in pair)
    assert (first == second) == (pair[0] == pair[1])


@given(st.sets(st.tuples(st.sampled_from(contract.STAGES), st.integers(1, 50)), min_size=2))
def test_stage_and_attempt_are_told_apart(attempts: set[tuple[str, int]]) -> None:
    assert len({child_name("tiny", stage, DIGEST, attempt) for stage, attempt in attempts}) == len(attempts)
