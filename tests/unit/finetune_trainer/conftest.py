"""Fixtures of the trainer's tests: tiny base models made once a session, and a workspace folder a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import adapter_artifacts as adapter_artifacts_module
import hub_server
import pytest
import tiny_model as tiny_model_source
from train_runs import Ranks


@pytest.fixture(scope="session")
def tiny_model_module() -> ModuleType:
    """tests/tiny_model.py, for tests that want another shape of it."""
    return tiny_model_source


@pytest.fixture(scope="session")
def tiny_model(tiny_model_module: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny Llama in the hub's layout. Read only: tests share it."""
    folder: Path = tiny_model_module.write_tiny_model(tmp_path_factory.mktemp("model"))
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_module: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model's tokenizer and config but without weights: needs no torch."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_model_module.write_tiny_tokenizer(folder)
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """An empty workspace volume."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def hub_server_module() -> ModuleType:
    """tests/hub_server.py: a hub on this machine."""
    return hub_server


@pytest.fixture(scope="session")
def adapter_artifacts() -> ModuleType:
    """tests/adapter_artifacts.py: checkpoints, adapters and artifacts for the stages after training."""
    return adapter_artifacts_module


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Starts ranks of train as processes; the first test pays for the imports of the one that they are forked from."""
    server = Ranks()
    yield server
    server.close()
