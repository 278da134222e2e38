"""s3:// against moto's server, over HTTP."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from finetune_trainer.artifacts import verify_artifact
from finetune_trainer.errors import RetryableError, StageError, UserError
from finetune_trainer.sources import open_source
from finetune_trainer.sources.base import Source
from finetune_trainer.sources.datasets import fetch_dataset
from finetune_trainer.sources.models import fetch_model


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.Session().client("s3")
    for bucket in client.list_buckets()["Buckets"]:
        for item in client.list_objects_v2(Bucket=bucket["Name"]).get("Contents", []):
            client.delete_object(Bucket=bucket["Name"], Key=item["Key"])
        client.delete_bucket(Bucket=bucket["Name"])
    client.create_bucket(Bucket="models")
    yield client
    client.close()


def source(workspace: Path, name: str = "s3://models/base") -> Source:
    return open_source(name, repo_type="model", revision=None, token_file=None, workspace=workspace)


def fetch(workspace: Path, name: str = "s3://models/base") -> Path:
    return fetch_model(source(workspace, name), root=workspace / "models", trust_remote_code=False)


def upload(s3: Any, folder: Path, prefix: str = "base") -> None:
    for path in folder.iterdir():
        s3.put_object(Bucket="models", Key=f"{prefix}/{path.name}", Body=path.read_bytes())


def test_a_model_arrives_whole_from_a_prefix(s3: Any, workspace: Path, tiny_model: Path) -> None:
    upload(s3, tiny_model)
    s3.put_object(Bucket="models", Key="base/", Body=b"")
    s3.put_object(Bucket="models", Key="base-2/config.json", Body=b"{}")
    path = fetch(workspace, "s3://models/base/")
    manifest = verify_artifact(path)
    assert {entry.path: entry.sha256 for entry in manifest.files} == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in tiny_model.iterdir()
    }
    assert fetch(workspace, "s3://models/base/") == path


def test_a_changed_object_is_another_artifact(s3: Any, workspace: Path, tiny_model: Path) -> None:
    upload(s3, tiny_model)
    first = fetch(workspace)
    s3.put_object(Bucket="models", Key="base/generation_config.json", Body=b"{}")
    assert fetch(workspace) != first


def test_a_listing_of_many_pages_is_read_to_its_end(s3: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(7):
        s3.put_object(Bucket="models", Key=f"data/train/{number}.jsonl", Body=b"")
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    files = source(workspace, "s3://models/data").list_files().files
    assert [file.path for file in files] == [f"train/{number}.jsonl" for number in range(7)]


def test_one_object_is_a_dataset(s3: Any, workspace: Path) -> None:
    s3.put_object(Bucket="models", Key="data/records.jsonl", Body=b"{}\n")
    path = fetch_dataset(
        source(workspace, "s3://models/data/records.jsonl"),
        root=workspace / "datasets",
        split="train",
        configuration=None,
        files=None,
    )
    assert [entry.path for entry in verify_artifact(path).files] == ["records.jsonl"]


def test_a_prefix_is_a_dataset_of_many_files_in_splits(s3: Any, workspace: Path) -> None:
    for name in ("train/1.parquet", "train/0.parquet", "test/0.parquet", "README.md"):
        s3.put_object(Bucket="models", Key=f"chats/{name}", Body=b"x")
    path = fetch_dataset(
        source(workspace, "s3://models/chats/"),
        root=workspace / "datasets",
        split="train",
        configuration=None,
        files=None,
    )
    assert [entry.path for entry in verify_artifact(path).files] == ["train/0.parquet", "train/1.parquet"]


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        pytest.param("s3://nowhere-at-all/base", UserError, "SourceNotFound", id="no bucket"),
        pytest.param("s3://models/none", UserError, "SourceNotFound", id="nothing under the prefix"),
        pytest.param("s3://models", UserError, "InvalidSource", id="no prefix"),
        pytest.param("s3://Models_/x", UserError, "InvalidSource", id="no bucket name"),
        pytest.param("s3://models/unsafe", UserError, "UnsafePath", id="a key that climbs out"),
    ],
)
def test_what_is_not_there_is_told(s3: Any, workspace: Path, name: str, kind: type[StageError], reason: str) -> None:
    s3.put_object(Bucket="models", Key="unsafe/../../config.json", Body=b"{}")
    with pytest.raises(kind) as caught:
        fetch(workspace, name)
    assert caught.value.reason == reason
    assert name.split("/")[2] in caught.value.message


def test_missing_credentials_are_a_user_error(s3: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError) as caught:
        fetch(workspace)
    assert caught.value.reason == "NoCredentials"


def test_refused_credentials_name_the_rights_that_are_needed(
    server: str, s3: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _Answers(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n") as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(UserError, match="s3:GetObject") as caught:
            fetch(workspace)
    assert caught.value.reason == "AccessDenied"


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", id="slow down"),
        pytest.param(b"", id="the connection is closed"),
    ],
)
def test_an_unwell_server_is_worth_another_try(
    s3: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    with _Answers(answer) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(RetryableError) as caught:
            fetch(workspace)
    assert caught.value.reason == "S3Unavailable"


def test_a_cut_download_goes_on_where_it_was_cut(
    server: str, s3: Any, workspace: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(s3, tiny_model)
    with _CuttingProxy(server, b"model.safetensors", after=100_000) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        path = fetch(workspace)
    assert proxy.cuts == 1
    assert (path / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()


class _Answers:
    """A server that answers every connection with the same bytes and closes it."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(self._answer)


class _CuttingProxy(_Answers):
    """Passes connections through to a server; the first answer to a GET of `name` is cut `after` so many bytes."""

    def __init__(self, server: str, name: bytes, *, after: int) -> None:
        super().__init__(b"")
        self._server = server.removeprefix("http://").split(":")
        self._name = name
        self._after = after
        self.cuts = 0
        self.endpoint = ""

    def __enter__(self) -> _CuttingProxy:  # type: ignore[override]
        self.endpoint = super().__enter__()
        return self

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._pass, args=(connection,), daemon=True).start()

    def _pass(self, connection: socket.socket) -> None:
        with connection, socket.create_connection((self._server[0], int(self._server[1]))) as server:
            while request := connection.recv(65536):
                server.sendall(request)
                cut = self.cuts == 0 and self._name in request.split(b"\r\n")[0] and request.startswith(b"GET")
                self.cuts += cut
                sent = 0
                server.settimeout(0.2)
                try:
                    while data := server.recv(16384):
                        connection.sendall(data)
                        sent += len(data)
                        if cut and sent >= self._after:
                            return
                except TimeoutError:
                    continue
                return
