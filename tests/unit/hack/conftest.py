"""Makes the packages of the local cluster and the demo importable: they run from their folders, before any set-up."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "hack" / "cluster"))
sys.path.insert(0, str(Path(__file__).parents[3] / "hack" / "demo"))

from local_cluster import binaries
from local_cluster.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    source = tmp_path / "source"
    for module in (*binaries.MODULES, *binaries.ADD_ON_MODULES):
        (source / "go" / module.name).mkdir(parents=True)
        (source / "go" / module.name / "go.mod").write_text(f"module {module.name}\n")
    return Settings(cache=tmp_path / "cache", state=tmp_path / "state", run=tmp_path / "run", source=source)
