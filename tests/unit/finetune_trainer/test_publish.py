"""Publishing to S3, against moto's server over HTTP with faults between."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
import report_jobs
from s3_proxy import CALL, CUT, DAMAGE, DENIED, FAILED, LOST_ANSWER, SLOW_DOWN, Fault, S3Proxy, s3_proxy

from finetune_trainer import contract, s3_upload
from finetune_trainer.contract import StageConfig
from finetune_trainer.errors import CorruptArtifact, RetryableError, StageError, UserError
from finetune_trainer.s3_upload import LocalFile, hash_file, part_bytes_of
from finetune_trainer.stage import reusable_report
from finetune_trainer.stages import publish

URI = "s3://models/team/llama"
PART = 64 << 10
"""Bytes of a part in these tests; S3 takes none below 5 MiB, and moto does not insist on it here."""
MODEL = random.Random(11).randbytes(2 * PART + 777)
"""Three parts."""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Proxy]:
    with s3_proxy() as proxy:
        yield proxy


@pytest.fixture
def s3(server: S3Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    for name, value in {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "3",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3_upload, "PART_BYTES", PART)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", PART)
    # How long botocore waits between tries is its own affair; that it tries again is ours.
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    server.reset()
    client = boto3.Session().client("s3")
    for bucket in client.list_buckets()["Buckets"]:
        for item in client.list_objects_v2(Bucket=bucket["Name"]).get("Contents", []):
            client.delete_object(Bucket=bucket["Name"], Key=item["Key"])
        for each in client.list_multipart_uploads(Bucket=bucket["Name"]).get("Uploads", []):
            client.abort_multipart_upload(Bucket=bucket["Name"], Key=each["Key"], UploadId=each["UploadId"])
        client.delete_bucket(Bucket=bucket["Name"])
    client.create_bucket(Bucket="models")
    server.reset()
    yield client
    client.close()


@functools.cache
def made(model: bytes) -> tuple[tempfile.TemporaryDirectory[str], StageConfig]:
    """A job's artifacts, made once for all tests: each of their many files is written durably."""
    folder = tempfile.TemporaryDirectory(prefix="published-")
    return folder, report_jobs.write_job(Path(folder.name), stage=contract.PUBLISH, model=model)


def job(workspace: Path, contents: str | None = None, *, model: bytes = MODEL, uri: str = URI) -> StageConfig:
    s3 = {"uri": uri} | ({} if contents is None else {"contents": contents})
    folder, config = made(model)
    shutil.copytree(folder.name, workspace, dirs_exist_ok=True)
    return replace(config, workspace=str(workspace), spec={"publish": {"s3": s3}})


def objects(s3: Any, prefix: str = "team/llama/") -> dict[str, bytes]:
    listed = s3.list_objects_v2(Bucket="models", Prefix=prefix).get("Contents", [])
    return {
        item["Key"].removeprefix(prefix): s3.get_object(Bucket="models", Key=item["Key"])["Body"].read()
        for item in listed
    }


def unfinished(s3: Any) -> list[str]:
    return [each["Key"] for each in s3.list_multipart_uploads(Bucket="models").get("Uploads", [])]


def assert_complete(s3: Any, config: StageConfig) -> None:
    """The prefix holds the merged model to the byte, and a manifest whose hashes are those of what is there."""
    found = objects(s3)
    manifest = json.loads(found.pop("manifest.json"))
    assert {entry["path"]: (entry["size"], entry["sha256"]) for entry in manifest["files"]} == {
        path: (len(data), hashlib.sha256(data).hexdigest()) for path, data in found.items()
    }
    model = config.input_path(contract.MERGE)
    assert found["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert unfinished(s3) == []


def test_the_model_its_card_and_its_report_are_published(s3: Any, workspace: Path) -> None:
    config = job(workspace)
    report = publish.run(config)
    assert_complete(s3, config)
    found = objects(s3)
    assert found.keys() == {
        "config.json", "model.safetensors", "tokenizer.json", "README.md", "report.html", "manifest.json"
    }  # fmt: skip
    assert b"library_name: transformers" in found["README.md"]
    assert b"Held-out loss" in found["report.html"]
    manifest = json.loads(found["manifest.json"])
    assert manifest["sources"][contract.MERGE] == config.input(contract.MERGE).digest
    assert report.message.startswith(f"{URI} is complete")
    assert report.metrics["uri"] == URI
    assert report.metrics["contents"] == "model"
    assert report.metrics["sentBytes"] == report.metrics["bytes"] > len(MODEL)


@pytest.mark.parametrize(
    ("contents", "names"),
    [
        ("adapter", {"adapter_config.json", "adapter_model.safetensors"}),
        (
            "both",
            {
                "config.json", "model.safetensors", "tokenizer.json",
                "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
            },
        ),
    ],
)  # fmt: skip
def test_the_adapter_is_published_alone_or_below_the_model(
    s3: Any, workspace: Path, contents: str, names: set[str]
) -> None:
    publish.run(job(workspace, contents, model=b"\0"))
    assert objects(s3).keys() == names | {"README.md", "report.html", "manifest.json"}


def test_without_a_merged_model_the_adapter_is_published_and_a_model_refused(s3: Any, workspace: Path) -> None:
    whole = job(workspace, "model", model=b"\0")
    config = replace(whole, inputs={name: ref for name, ref in whole.inputs.items() if name != contract.MERGE})
    with pytest.raises(UserError, match="merge.enabled") as caught:
        publish.run(config)
    assert caught.value.reason == "NothingToPublish"
    assert publish.run(replace(config, spec={"publish": {"s3": {"uri": URI}}})).metrics["contents"] == "adapter"
    assert b"library_name: peft" in objects(s3)["README.md"]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault("PUT .*model.safetensors", SLOW_DOWN, times=2), id="throttled"),
        pytest.param(Fault("PUT .*model.safetensors", FAILED, after=1), id="a 500 in the middle"),
        pytest.param(Fault("PUT .*partNumber=2", CUT), id="a connection that is cut"),
        pytest.param(Fault("PUT .*partNumber=2", LOST_ANSWER), id="an answer that is lost"),
        pytest.param(Fault("PUT .*partNumber=3", DAMAGE, times=2), id="a part that arrives damaged"),
        pytest.param(Fault("PUT .*config.json", DAMAGE), id="a small file that arrives damaged"),
        pytest.param(Fault("POST .*uploadId", FAILED), id="a completion that fails once"),
        pytest.param(Fault("GET .*list-type", CUT), id="a listing that is cut"),
        pytest.param(Fault("PUT .*manifest.json", LOST_ANSWER), id="the answer to the manifest is lost"),
    ],
)
def test_a_fault_on_the_way_is_outlived(s3: Any, server: S3Proxy, workspace: Path, fault: Fault) -> None:
    server.faults.append(fault)
    config = job(workspace)
    publish.run(config)
    assert fault.seen > fault.after
    assert_complete(s3, config)


def test_a_completion_whose_answer_was_lost_is_known_by_what_is_there(
    s3: Any, server: S3Proxy, workspace: Path
) -> None:
    server.faults += [
        Fault("POST .*uploadId", LOST_ANSWER),
        Fault("POST .*uploadId", (404, "NoSuchUpload"), after=0),
    ]
    config = job(workspace)
    publish.run(config)
    assert_complete(s3, config)


@pytest.mark.parametrize(
    ("fault", "kind", "reason"),
    [
        pytest.param(Fault("PUT", DENIED, times=99), UserError, "AccessDenied", id="denied to write"),
        pytest.param(Fault("GET .*list-type", DENIED, times=99), UserError, "AccessDenied", id="denied to list"),
        pytest.param(Fault("PUT", SLOW_DOWN, times=999), RetryableError, "S3Unavailable", id="throttled for long"),
        pytest.param(Fault("PUT .*part", CUT, times=99), RetryableError, "S3Unavailable", id="cut again and again"),
        pytest.param(Fault("PUT .*part", DAMAGE, times=99), RetryableError, "UploadDamaged", id="always damaged"),
        pytest.param(
            Fault("PUT .*part", (404, "NoSuchUpload")), RetryableError, "UploadDamaged", id="aborted by somebody"
        ),
    ],
)
def test_what_does_not_pass_is_told_and_leaves_no_manifest(
    s3: Any, server: S3Proxy, workspace: Path, fault: Fault, kind: type[StageError], reason: str
) -> None:
    server.faults.append(fault)
    with pytest.raises(kind) as caught:
        publish.run(job(workspace))
    assert caught.value.reason == reason
    assert URI in caught.value.message
    server.reset()
    assert "manifest.json" not in objects(s3)


def test_denial_names_every_right_that_is_needed(s3: Any, server: S3Proxy, workspace: Path) -> None:
    server.faults.append(Fault("PUT", DENIED, times=99))
    with pytest.raises(UserError) as caught:
        publish.run(job(workspace))
    for right in ("ListBucket", "ListBucketMultipartUploads", "GetObject", "PutObject", "AbortMultipartUpload"):
        assert f"s3:{right}" in caught.value.message


def test_a_bucket_that_is_not_there_is_a_user_error(s3: Any, workspace: Path) -> None:
    with pytest.raises(UserError, match="nowhere-at-all") as caught:
        publish.run(job(workspace, uri="s3://nowhere-at-all/llama"))
    assert caught.value.reason == "DestinationNotFound"


def test_no_credentials_are_a_user_error(s3: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError) as caught:
        publish.run(job(workspace))
    assert caught.value.reason == "NoCredentials"


def test_the_next_attempt_sends_only_what_is_missing(s3: Any, server: S3Proxy, workspace: Path) -> None:
    config = job(workspace)
    server.faults.append(Fault("PUT .*partNumber=3", DENIED, times=99))
    with pytest.raises(UserError):
        publish.run(config)
    server.reset()
    assert unfinished(s3) == ["team/llama/model.safetensors"]
    publish.run(config)
    assert server.count("POST .*uploads") == 0
    assert next(request for request in server.requests if "partNumber" in request).endswith("partNumber=3")
    assert server.count("PUT .*partNumber") == 1
    assert server.count("PUT .*config.json") == 0
    assert_complete(s3, config)


def test_parts_of_another_model_are_given_up_and_not_gone_on_with(s3: Any, server: S3Proxy, workspace: Path) -> None:
    made = s3.create_multipart_upload(Bucket="models", Key="team/llama/model.safetensors", ChecksumAlgorithm="SHA256")
    s3.upload_part(
        Bucket="models", Key="team/llama/model.safetensors", UploadId=made["UploadId"], PartNumber=1, Body=b"x" * PART
    )
    config = job(workspace)
    publish.run(config)
    assert_complete(s3, config)


def test_an_object_that_is_damaged_there_is_sent_again(s3: Any, workspace: Path) -> None:
    s3.put_object(Bucket="models", Key="team/llama/config.json", Body=b"[]", ChecksumAlgorithm="SHA256")
    config = job(workspace)
    publish.run(config)
    assert_complete(s3, config)


def test_a_complete_prefix_of_the_same_model_is_verified_and_left(
    s3: Any, server: S3Proxy, workspace: Path, tmp_path: Path
) -> None:
    publish.run(job(workspace))
    s3.put_object(Bucket="models", Key="team/llama/notes.txt", Body=b"ours")
    server.reset()
    other = tmp_path / "other"
    other.mkdir()
    report = publish.run(job(other))
    assert report.metrics["sentBytes"] == 0
    assert server.count("PUT|POST") == 0


def test_a_complete_prefix_that_lost_an_object_is_told(s3: Any, workspace: Path, tmp_path: Path) -> None:
    publish.run(job(workspace))
    s3.delete_object(Bucket="models", Key="team/llama/model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(RetryableError, match=r"model\.safetensors") as caught:
        publish.run(job(other))
    assert caught.value.reason == "UploadDamaged"


def test_a_complete_prefix_of_another_model_is_refused_with_both_digests(
    s3: Any, workspace: Path, tmp_path: Path
) -> None:
    first = publish.run(job(workspace)).metrics["contentDigest"]
    before = objects(s3)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError) as caught:
        publish.run(job(other, model=b"another"))
    assert caught.value.reason == "PrefixTaken"
    assert first in caught.value.message
    assert caught.value.message.count("sha256:") == 2
    assert objects(s3) == before


def test_two_jobs_at_once_end_with_one_model(s3: Any, server: S3Proxy, workspace: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    late = job(other, model=b"\0")

    def overtake() -> None:
        winner = {"contentDigest": "sha256:" + "0" * 64, "files": []}
        s3.put_object(Bucket="models", Key="team/llama/manifest.json", Body=json.dumps(winner).encode())

    server.faults.append(Fault("PUT .*manifest.json", CALL, call=overtake))
    with pytest.raises(UserError) as caught:
        publish.run(late)
    assert caught.value.reason == "PrefixTaken"


@pytest.mark.parametrize("key", ["photo.jpg", "manifest.json"])
def test_a_prefix_that_holds_something_else_is_never_written_to(s3: Any, workspace: Path, key: str) -> None:
    s3.put_object(Bucket="models", Key=f"team/llama/{key}", Body=b"not ours")
    s3.put_object(Bucket="models", Key="team/llama-2/config.json", Body=b"beside it")
    with pytest.raises(UserError) as caught:
        publish.run(job(workspace))
    assert caught.value.reason in ("PrefixNotEmpty", "PrefixTaken")
    assert objects(s3) == {key: b"not ours"}


def test_a_file_that_changed_on_the_volume_is_never_published(s3: Any, workspace: Path) -> None:
    config = job(workspace)
    path = config.input_path(contract.MERGE) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors"):
        publish.run(config)
    assert objects(s3) == {}


def test_a_finished_stage_publishes_nothing_again(s3: Any, server: S3Proxy, workspace: Path) -> None:
    config = job(workspace, model=b"\0")
    publish.run(config)
    server.reset()
    report = reusable_report(config)
    assert report is not None
    assert report.metrics["uri"] == URI
    assert server.requests == []


def test_a_pod_that_is_killed_at_any_moment_leaves_nothing_or_a_complete_upload(
    s3: Any, server: S3Proxy, workspace: Path
) -> None:
    config = job(workspace)
    stage_json = workspace / "stage.json"
    stage_json.write_text(json.dumps(config.as_json()))
    program = (
        "import sys; from finetune_trainer import s3_upload, stage; "
        f"s3_upload.PART_BYTES = {PART}; sys.exit(stage.main(['publish', '--config', {str(stage_json)!r}]))"
    )
    moments = (
        Fault(".", CALL, after=2),
        Fault("PUT .*partNumber=2", CALL),
        Fault("POST .*uploadId", CALL),
        Fault("HEAD", CALL, after=3),
    )
    for fault in moments:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        server.reset()
        fault.call = process.kill
        server.faults.append(fault)
        process.communicate(timeout=120)
        server.reset()
        assert process.returncode == -signal.SIGKILL
        assert "manifest.json" not in objects(s3)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert done.returncode == 0, done.stdout.decode()
    assert_complete(s3, config)


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 1])
def test_hashes_of_parts_are_those_of_the_bytes_that_are_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(s3_upload, "PART_BYTES", PART)
    data = MODEL[:size]
    path = tmp_path / "file"
    path.write_bytes(data)
    hashed = hash_file(LocalFile("file", path, size, hashlib.sha256(data).hexdigest()))
    assert b"".join(hashed.read_part(number) for number in range(1, len(hashed.parts) + 1)) == data
    assert list(hashed.parts) == [
        hashlib.sha256(hashed.read_part(number)).digest() for number in range(1, len(hashed.parts) + 1)
    ]
    assert len(hashed.parts) == max(1, -(-size // PART))


def test_the_largest_object_fits_the_number_of_parts() -> None:
    largest = 5 << 40
    assert -(-largest // part_bytes_of(largest)) <= 10_000
    assert part_bytes_of(1) == part_bytes_of(16 << 20) == 16 << 20
