"""workspace:///: files that lie on the volume already."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from finetune_trainer.artifacts import find_artifact, verify_artifact
from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.sources import open_source
from finetune_trainer.sources.models import fetch_model


def fetch(workspace: Path, source: str = "workspace:///base") -> Path:
    opened = open_source(source, repo_type="model", revision="main", token_file=None, workspace=workspace)
    return fetch_model(opened, root=workspace / "models", trust_remote_code=False)


@pytest.fixture
def base(workspace: Path, tiny_model: Path) -> Path:
    shutil.copytree(tiny_model, workspace / "base")
    return workspace / "base"


def test_a_model_takes_no_space_again(workspace: Path, base: Path) -> None:
    path = fetch(workspace)
    verify_artifact(path)
    assert (path / "model.safetensors").samefile(base / "model.safetensors")
    assert fetch(workspace) == path


def test_the_artifact_outlives_the_original(workspace: Path, base: Path) -> None:
    path = fetch(workspace)
    shutil.rmtree(base)
    verify_artifact(path)


def test_a_replaced_file_is_another_artifact(workspace: Path, base: Path) -> None:
    first = fetch(workspace)
    (base / "new").write_bytes(b'{"eos_token_id": 1}')
    (base / "new").replace(base / "generation_config.json")
    assert fetch(workspace) != first
    assert find_artifact(first) is not None


def test_a_file_edited_in_place_is_noticed(workspace: Path, base: Path) -> None:
    path = fetch(workspace)
    with (base / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(CorruptArtifact, match="sha256"):
        verify_artifact(path)


def test_links_inside_the_workspace_are_followed(workspace: Path, base: Path) -> None:
    (workspace / "blobs").mkdir()
    (base / "model.safetensors").rename(workspace / "blobs" / "abc")
    (base / "model.safetensors").symlink_to("../blobs/abc")
    path = fetch(workspace)
    verify_artifact(path)
    assert not (path / "model.safetensors").is_symlink()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        pytest.param("workspace:///../etc", "InvalidSource", id="a path that climbs out"),
        pytest.param("workspace:///base/../../x", "InvalidSource", id="a path that climbs out later"),
        pytest.param("workspace://base", "InvalidSource", id="two slashes"),
        pytest.param("workspace:///", "InvalidSource", id="the whole volume"),
        pytest.param("workspace:///none", "SourceNotFound", id="no such folder"),
        pytest.param("workspace:///out", "UnsafePath", id="a link that leaves the volume"),
        pytest.param("workspace:///holder", "UnsafePath", id="a file in the folder that is such a link"),
        pytest.param("file:///base", "InvalidSource", id="another scheme"),
    ],
)
def test_unsafe_and_wrong_paths_are_refused(workspace: Path, tmp_path: Path, source: str, reason: str) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("{}")
    (workspace / "out").symlink_to(tmp_path / "secret")
    (workspace / "holder").mkdir()
    (workspace / "holder" / "config.json").symlink_to(tmp_path / "secret" / "config.json")
    with pytest.raises(UserError) as caught:
        fetch(workspace, source)
    assert caught.value.reason == reason


def test_a_revision_is_refused_where_there_are_none(workspace: Path) -> None:
    with pytest.raises(UserError, match="has no revisions, got revision 'v2'"):
        open_source("workspace:///x", repo_type="model", revision="v2", token_file=None, workspace=workspace)
