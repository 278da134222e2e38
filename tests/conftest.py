"""Settings for every test: properties are checked on the same examples in every run, so that a failure is a change's.

`HYPOTHESIS_PROFILE=explore make unit` looks for new counter-examples instead. The one Kueue that contract and
end-to-end tests share is here too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import kueue
import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# As stage.set_environment does for every stage: without it the first adapter imports torch's whole compiler.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@pytest.fixture(scope="session")
def kueue_switch() -> Iterator[kueue.Switch]:
    """Kueue, on or off as the last test left it; after the session it is as it was before."""
    switch = kueue.Switch()
    yield switch
    switch.restore()


@pytest.fixture
def with_kueue(kueue_switch: kueue.Switch) -> None:
    """Kueue runs."""
    kueue_switch.on()
