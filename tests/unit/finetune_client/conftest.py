"""What the client's tests have: an API server over real HTTP, a kubeconfig for it, and a client of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_api import FakeApi, serving

from finetune_client import FineTuneClient


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with serving(FakeApi()) as api:
        yield api


@pytest.fixture
def kubeconfig(api: FakeApi, tmp_path: Path) -> Path:
    return api.kubeconfig(tmp_path / "kubeconfig")


@pytest.fixture
def client(kubeconfig: Path) -> FineTuneClient:
    return FineTuneClient(kubeconfig=kubeconfig)
