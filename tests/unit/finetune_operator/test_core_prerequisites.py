from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from builders import make_job

from finetune_operator.api.constants import Reason
from finetune_operator.core.prerequisites import find_missing

JOB = make_job(model={"source": "hf://org/gated", "tokenSecretRef": {"name": "hub", "key": "token"}})
START: Any = SimpleNamespace(config=SimpleNamespace(secrets={"model-token": "/etc/finetune/secrets/model-token"}))


def missing(phase: str | None, secrets: dict[str, frozenset[str] | None]) -> tuple[Reason, str] | None:
    observed: Any = SimpleNamespace(claim=SimpleNamespace(name="workspace", phase=phase), secrets=secrets)
    found = find_missing(JOB, observed, START)
    return None if found is None else (found.reason, found.message)


@pytest.mark.parametrize("phase", ["Bound", "Pending"])
def test_nothing_is_missing_where_claim_and_key_are_there(phase: str) -> None:
    assert missing(phase, {"hub": frozenset({"token", "other"})}) is None


def test_a_claim_that_does_not_exist_or_lost_its_volume_is_named() -> None:
    absent, lost = missing(None, {}), missing("Lost", {})
    assert absent is not None
    assert (absent[0], "PersistentVolumeClaim workspace does not exist in namespace team-a" in absent[1]) == (
        Reason.CLAIM_MISSING,
        True,
    )
    assert lost == (
        Reason.CLAIM_NOT_BOUND,
        "PersistentVolumeClaim workspace has lost its volume: restore that, or use another claim.",
    )


def test_a_secret_that_does_not_exist_is_named_with_its_key() -> None:
    assert missing("Bound", {"hub": None}) == (
        Reason.SECRET_MISSING,
        "Secret hub does not exist in namespace team-a: create it with key token.",
    )


def test_of_a_secret_without_the_key_no_other_key_is_told() -> None:
    assert missing("Bound", {"hub": frozenset({"aws-root", "tokens"})}) == (
        Reason.SECRET_MISSING,
        "Secret hub in namespace team-a has no key token: add it, or correct the reference in the spec (suspend the "
        "job first).",
    )
