"""hf:// against a hub on this machine."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from finetune_trainer.artifacts import find_artifact, verify_artifact
from finetune_trainer.errors import RetryableError, StageError, UserError
from finetune_trainer.sources import open_source
from finetune_trainer.sources.base import Source
from finetune_trainer.sources.datasets import fetch_dataset
from finetune_trainer.sources.models import fetch_model

TOKEN = "hf_of_someone_with_access"
OTHER = "hf_of_someone_without"


@pytest.fixture
def model_files(tiny_model: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in tiny_model.iterdir()}


@pytest.fixture
def hub(hub_server_module: ModuleType, model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with hub_server_module.Hub(accounts={TOKEN, OTHER}) as server:
        server.repos["org/base"] = hub_server_module.Repo(dict(model_files))
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        # The library writes, and so can resume, in pieces of this size; the real one is larger than the test's model.
        monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 16384)
        yield server


def source(workspace: Path, name: str = "hf://org/base", *, token: str | None = None, **overrides: Any) -> Source:
    token_file = None
    if token is not None:
        token_file = workspace / "token"
        token_file.write_text(token + "\n")
    options = {"repo_type": "model", "revision": "main", "token_file": str(token_file) if token_file else None}
    return open_source(name, workspace=workspace, **{**options, **overrides})


def fetch(workspace: Path, **options: Any) -> Path:
    return fetch_model(source(workspace, **options), root=workspace / "models", trust_remote_code=False)


def test_a_model_arrives_whole_and_its_commit_is_recorded(
    hub: Any, workspace: Path, model_files: dict[str, bytes]
) -> None:
    hub.repos["org/base"].files |= {"README.md": b"# x", "original/consolidated.00.pth": b"x" * 5000, "run.py": b"1"}
    path = fetch(workspace)
    manifest = verify_artifact(path)
    assert {entry.path: (path / entry.path).read_bytes() for entry in manifest.files} == model_files
    assert manifest.metadata == {"source": "hf://org/base", "version": hub.repos["org/base"].commit}
    assert {entry.name for entry in path.parent.iterdir()} == {path.name, f".{path.name}.lock"}
    assert set(manifest.tensors) == {"model.safetensors"}


def test_a_second_job_downloads_nothing(hub: Any, workspace: Path) -> None:
    first = fetch(workspace)
    hub.requests.clear()
    assert fetch(workspace) == first
    assert hub.downloads("model.safetensors") == []


def test_a_new_commit_is_another_artifact(hub: Any, workspace: Path) -> None:
    first = fetch(workspace)
    hub.repos["org/base"].files["generation_config.json"] = b'{"eos_token_id": 1}'
    second = fetch(workspace)
    assert first != second
    assert find_artifact(first) is not None


def test_a_damaged_artifact_is_fetched_again(hub: Any, workspace: Path) -> None:
    path = fetch(workspace)
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fetch(workspace) == path
    verify_artifact(path)


def test_a_cut_download_goes_on_where_it_was_cut(hub: Any, workspace: Path) -> None:
    hub.cut_at["model.safetensors"] = [100_000]
    verify_artifact(fetch(workspace))
    ranges = hub.downloads("model.safetensors")
    assert ranges[0] == ""
    assert len(ranges) == 2
    # what was on its way when the connection broke may be lost, the rest is not asked for again
    assert 0 < int(ranges[1].removeprefix("bytes=").removesuffix("-")) <= 100_000


def test_a_download_that_a_dead_process_left_goes_on(hub: Any, workspace: Path) -> None:
    hub.cut_at["model.safetensors"] = [100_000, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10]
    with pytest.raises(RetryableError) as caught:
        fetch(workspace)
    assert caught.value.reason == "HubUnavailable"
    hub.cut_at.clear()
    hub.requests.clear()
    verify_artifact(fetch(workspace))
    assert hub.downloads("tokenizer.json") == []
    assert hub.downloads("model.safetensors")[0].startswith("bytes=")


def test_a_file_that_is_not_what_the_hub_lists_is_refused_and_removed(hub: Any, workspace: Path) -> None:
    hub.broken.add("model.safetensors")
    with pytest.raises(RetryableError, match=r"model\.safetensors of model org/base at revision main is not the file"):
        fetch(workspace)
    hub.broken.clear()
    verify_artifact(fetch(workspace))


_FETCH = """
import sys
from pathlib import Path
from finetune_trainer.sources import open_source
from finetune_trainer.sources.models import fetch_model
workspace = Path(sys.argv[1])
source = open_source("hf://org/base", repo_type="model", revision=None, token_file=None, workspace=workspace)
print("at", fetch_model(source, root=workspace / "models", trust_remote_code=False), flush=True)
"""


def test_of_two_jobs_one_downloads_and_when_it_is_killed_the_other_does(hub: Any, workspace: Path) -> None:
    release = hub.held["model.safetensors"] = threading.Event()
    command = [sys.executable, "-c", _FETCH, str(workspace)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as second,
    ):
        assert first.stdout is not None
        assert second.stdout is not None
        lines = [first.stdout.readline(), second.stdout.readline()]
        waits = ["waiting for another process" in line for line in lines]
        assert sorted(waits) == [False, True], lines
        fetching, waiting = (second, first) if waits[0] else (first, second)
        fetching.kill()
        release.set()
        assert waiting.stdout is not None
        output = waiting.stdout.read()
        assert waiting.wait(30) == 0
    verify_artifact(Path(output.splitlines()[-1].removeprefix("at ")))


@pytest.mark.parametrize(
    ("options", "kind", "reason", "words"),
    [
        pytest.param({"name": "hf://org/none"}, UserError, "SourceNotFound", "org/none", id="unknown repository"),
        pytest.param(
            {"name": "hf://org/private"}, UserError, "SourceNotFound", "tokenSecretRef", id="private, without a token"
        ),
        pytest.param(
            {"name": "hf://org/private", "token": OTHER},
            UserError,
            "SourceNotFound",
            "private",
            id="private, no access",
        ),
        pytest.param(
            {"name": "hf://org/gated"}, UserError, "AccessDenied", "tokenSecretRef", id="gated, without a token"
        ),
        pytest.param(
            {"name": "hf://org/gated", "token": OTHER},
            UserError,
            "AccessDenied",
            "accept its terms",
            id="gated, no access",
        ),
        pytest.param({"token": "hf_wrong"}, UserError, "AccessDenied", "the secret's value", id="wrong token"),
        pytest.param({"revision": "v9"}, UserError, "RevisionNotFound", "revision v9", id="unknown revision"),
        pytest.param(
            {"name": "hf://a/b/c"}, UserError, "InvalidSource", "hf://organisation/name", id="no repository name"
        ),
        pytest.param({"name": "hf://../x"}, UserError, "InvalidSource", "hf://organisation/name", id="path for a name"),
        pytest.param({"token": "  "}, UserError, "SecretMissing", "empty", id="empty token"),
    ],
)
def test_what_the_hub_refuses_is_told_with_repository_and_remedy(
    hub: Any,
    hub_server_module: ModuleType,
    workspace: Path,
    model_files: dict[str, bytes],
    options: dict[str, Any],
    kind: type[StageError],
    reason: str,
    words: str,
) -> None:
    for name, gated in (("org/gated", True), ("org/private", False)):
        hub.repos[name] = hub_server_module.Repo(model_files, gated=gated, tokens=frozenset({TOKEN}))
    with pytest.raises(kind) as caught:
        fetch(workspace, **options)
    assert caught.value.reason == reason
    assert words in caught.value.message
    assert "hf_of" not in caught.value.message


def test_a_token_with_access_opens_a_gated_repository(
    hub: Any, hub_server_module: ModuleType, workspace: Path, model_files: dict[str, bytes]
) -> None:
    hub.repos["org/gated"] = hub_server_module.Repo(model_files, gated=True, tokens=frozenset({TOKEN}))
    path = fetch(workspace, name="hf://org/gated", token=TOKEN)
    verify_artifact(path)
    assert not any(TOKEN.encode() in file.read_bytes() for file in path.rglob("*") if file.is_file())


def test_a_signed_address_of_the_hubs_storage_is_in_no_message(
    hub: Any, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.moved["model.safetensors"] = f"{hub.endpoint}/storage?X-Amz-Signature=abc&y=1"
    with pytest.raises(UserError) as caught:
        fetch(workspace)
    assert caught.value.reason == "HubRefused"
    assert "/storage?…" in caught.value.message
    assert "Signature" not in caught.value.message + capsys.readouterr().out


def test_an_address_whose_signature_ran_out_is_asked_for_again(
    hub: Any, hub_server_module: ModuleType, workspace: Path
) -> None:
    with hub_server_module.Hub(refused=403) as storage:
        hub.moved["model.safetensors"] = f"{storage.endpoint}/model?signature=old"
        with pytest.raises(UserError) as caught:
            fetch(workspace)
        assert caught.value.reason == "AccessDenied"
        assert len(storage.requests) == 5


def test_a_hub_that_lists_a_path_that_climbs_out_is_refused(hub: Any, workspace: Path) -> None:
    hub.repos["org/base"].files["../../out.jsonl"] = b"{}"
    opened = source(workspace, repo_type="dataset")
    with pytest.raises(UserError) as caught:
        fetch_dataset(opened, root=workspace / "d" / "e", split="train", configuration=None, files="**/*.jsonl")
    assert caught.value.reason == "UnsafePath"


def test_a_hub_that_cannot_be_reached_is_worth_another_try(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(RetryableError) as caught:
            fetch(workspace)
    assert caught.value.reason == "HubUnavailable"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        pytest.param(
            {"config.json": b"{}", "pytorch_model.bin": b"x"}, "pickled weights only", id="pickled weights only"
        ),
        pytest.param({"config.json": b"{}"}, "no *.safetensors", id="no weights"),
        pytest.param({"adapter_config.json": b"{}"}, "it is an adapter", id="an adapter"),
        pytest.param({"config.json": b"{}", "model.safetensors": b"x"}, "no tokenizer", id="no tokenizer"),
        pytest.param(
            {"config.json": b"[]", "model.safetensors": b"x", "tokenizer.json": b"{}"},
            "config.json is no JSON object",
            id="config is a list",
        ),
        pytest.param(
            {"config.json": b"{}", "model.safetensors": b"x" * 20, "tokenizer.json": b"{}"},
            "no whole safetensors",
            id="cut weights",
        ),
        pytest.param(
            {
                "config.json": b"{}",
                "model-00001-of-00002.safetensors": b"\x02\0\0\0\0\0\0\0{}",
                "model.safetensors.index.json": json.dumps(
                    {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
                ).encode(),
                "tokenizer.json": b"{}",
            },
            "names model-00002-of-00002.safetensors",
            id="a missing shard",
        ),
    ],
)
def test_a_repository_that_is_no_model_is_refused(
    hub: Any, workspace: Path, files: dict[str, bytes], words: str
) -> None:
    hub.repos["org/base"].files = files
    with pytest.raises(UserError) as caught:
        fetch(workspace)
    assert caught.value.reason == "ModelNotUsable"
    assert words in caught.value.message


def test_code_of_a_repository_comes_only_when_it_is_trusted(hub: Any, workspace: Path) -> None:
    hub.repos["org/base"].files["modeling_x.py"] = b"x = 1\n"
    assert not (fetch(workspace) / "modeling_x.py").exists()
    trusted = fetch_model(source(workspace), root=workspace / "models", trust_remote_code=True)
    assert (trusted / "modeling_x.py").exists()


def test_a_dataset_is_chosen_by_its_card(hub: Any, hub_server_module: ModuleType, workspace: Path) -> None:
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/tr-*\n---\n# x\n"
    hub.repos["org/data"] = hub_server_module.Repo(
        {"README.md": card.encode(), "data/tr-0.jsonl": b"{}\n", "data/te-0.jsonl": b"{}\n", "other.json": b"[]"}
    )
    path = fetch_dataset(
        source(workspace, "hf://org/data", repo_type="dataset"),
        root=workspace / "datasets",
        split="train",
        configuration=None,
        files=None,
    )
    assert [entry.path for entry in verify_artifact(path).files] == ["data/tr-0.jsonl"]


@pytest.mark.parametrize(
    ("configuration", "split", "expected"),
    [
        pytest.param("chats", "train_sft", ["chats/train_sft-0.parquet", "chats/train_sft-1.parquet"], id="several"),
        pytest.param("chats", "test_sft", ["chats/test.parquet"], id="another split"),
        pytest.param("plain", "train", ["plain.csv"], id="another configuration"),
    ],
)
def test_configuration_and_split_choose_among_those_of_the_card(
    hub: Any, hub_server_module: ModuleType, workspace: Path, configuration: str, split: str, expected: list[str]
) -> None:
    card = """---
configs:
- config_name: chats
  data_files:
  - split: train_sft
    path: chats/train_sft-*
  - split: test_sft
    path: chats/test.parquet
- config_name: plain
  data_files: plain.csv
---
"""
    names = ("chats/train_sft-1.parquet", "chats/train_sft-0.parquet", "chats/test.parquet", "plain.csv")
    files = {name: name.encode() for name in names}
    hub.repos["org/data"] = hub_server_module.Repo({"README.md": card.encode(), **files})
    path = fetch_dataset(
        source(workspace, "hf://org/data", repo_type="dataset"),
        root=workspace / "datasets",
        split=split,
        configuration=configuration,
        files=None,
    )
    assert [entry.path for entry in verify_artifact(path).files] == expected
