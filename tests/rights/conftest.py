"""What the comparison of rights needs to know of the session that it ends: when it began and which tests it had."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import pytest
from rbac_audit import audit_time

HERE = Path(__file__).resolve().parent
BEGUN = pytest.StashKey[str]()
LEFT_OUT = pytest.StashKey[set[Path]]()
"""Files of which tests were deselected."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGUN] = audit_time(datetime.now(timezone.utc))  # noqa: TID251  compared with what the API server writes
    config.stash[LEFT_OUT] = set()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash[LEFT_OUT].add(item.path)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The comparison comes last, in whatever order the folders were named."""
    items.sort(key=lambda item: HERE in item.path.parents)  # stable


@pytest.fixture(scope="session")
def begun(request: pytest.FixtureRequest) -> str:
    """When the session began, as audit events have it."""
    return request.config.stash[BEGUN]


@pytest.fixture(scope="session")
def whole_files(request: pytest.FixtureRequest) -> frozenset[Path]:
    """The test files that this session ran from their first test to their last."""
    config = request.config
    named = {Path(argument.partition("::")[0]).resolve() for argument in config.args if "::" in argument}
    return frozenset({item.path for item in request.session.items} - config.stash[LEFT_OUT] - named)
