"""Fixtures of the trainer's tests: tiny base models made once a session, and a workspace folder a test."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

_TESTS = Path(__file__).parents[2]


def _load(name: str) -> ModuleType:
    """A module of tests/, which is no package under --import-mode=importlib."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _TESTS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def tiny_model_module() -> ModuleType:
    """tests/tiny_model.py, for tests that want another shape of it."""
    return _load("tiny_model")


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
    return _load("hub_server")


@pytest.fixture(scope="session")
def adapter_artifacts() -> ModuleType:
    """tests/adapter_artifacts.py: checkpoints, adapters and artifacts for the stages after training."""
    return _load("adapter_artifacts")
