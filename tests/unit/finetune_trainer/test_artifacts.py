"""Artifacts: complete or refused, whatever happens to them and to who writes them."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_trainer.artifacts import (
    HashingFile,
    artifact_ref,
    find_artifact,
    new_artifact,
    open_input,
    read_manifest,
    remove_artifact,
    verify_artifact,
)
from finetune_trainer.contract import ArtifactRef, ContractError, StageConfig
from finetune_trainer.errors import CorruptArtifact
from finetune_trainer.locks import folder_lock

FORK = multiprocessing.get_context("fork")


def tensor_file(values: bytes = b"12345678") -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return len(header).to_bytes(8, "little") + header + values


def write(path: Path, files: dict[str, bytes] | None = None) -> Path:
    with new_artifact(path, "test") as writer:
        for name, data in (files or {"a.txt": b"alpha", "deep/b.bin": b"beta"}).items():
            writer.write(name, data)
    return path


def start(target: Callable[..., None], *args: Any) -> BaseProcess:
    process = FORK.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def wait_for(path: Path, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear within {seconds} s"
        time.sleep(0.01)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write(tmp_path / "artifact")


def test_the_manifest_lists_every_file_with_size_hash_and_tensors(tmp_path: Path) -> None:
    with new_artifact(tmp_path / "x", "model") as writer:
        writer.write("b/w.safetensors", tensor_file())
        (writer.folder / "a").write_bytes(b"alpha")
        writer.metadata["answer"] = 42
    manifest = verify_artifact(tmp_path / "x")
    assert manifest.kind == "model"
    assert manifest.metadata == {"answer": 42}
    assert [(entry.path, entry.size) for entry in manifest.files] == [("a", 5), ("b/w.safetensors", len(tensor_file()))]
    assert manifest.files[0].sha256 == hashlib.sha256(b"alpha").hexdigest()
    assert manifest.tensors == {"b/w.safetensors": {"a": {"dtype": "F32", "shape": [2]}}}
    data = (tmp_path / "x" / "manifest.json").read_bytes()
    assert manifest.digest == "sha256:" + hashlib.sha256(data).hexdigest()
    assert str(tmp_path).encode() not in data
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x"]


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({"b": b"2", "a": b"1"}, id="two files"),
        pytest.param({"d/c": b"", "é": b"\0" * 4096}, id="an empty file, a folder, a name beyond ASCII"),
        pytest.param({"w.safetensors": tensor_file()}, id="tensors"),
    ],
)
def test_equal_contents_give_an_equal_digest_wherever_they_lie(tmp_path: Path, files: dict[str, bytes]) -> None:
    first, second = write(tmp_path / "1" / "x", files), write(tmp_path / "2" / "y", dict(reversed(files.items())))
    assert read_manifest(first).digest == read_manifest(second).digest
    assert {entry.path for entry in verify_artifact(first).files} == files.keys()


@pytest.mark.parametrize(
    ("damage", "found_without_contents", "words"),
    [
        pytest.param(
            lambda a: (a / "a.txt").write_bytes(b"alp"), True, "has 3 bytes, expected 5", id="a truncated file"
        ),
        pytest.param(lambda a: (a / "a.txt").write_bytes(b"alphA"), False, "has sha256", id="a flipped byte"),
        pytest.param(lambda a: (a / "deep/b.bin").unlink(), True, "b.bin is missing, expected 4", id="a missing file"),
        pytest.param(lambda a: (a / "c").write_bytes(b""), True, "c is not in the manifest", id="a foreign file"),
        pytest.param(lambda a: (a / "manifest.json").unlink(), True, "has no manifest.json", id="no manifest"),
        pytest.param(lambda a: (a / "manifest.json").write_text("{"), True, "is no manifest", id="a broken manifest"),
        pytest.param(
            lambda a: (a / "manifest.json").write_text("[]"), True, "is no manifest", id="a manifest that is a list"
        ),
        pytest.param(
            lambda a: (a / "manifest.json").write_text('{"contractVersion": 99}'),
            True,
            "contractVersion 99",
            id="a later contract",
        ),
        pytest.param(lambda a: (a / "l").symlink_to("a.txt"), True, "is a link", id="a link"),
        pytest.param(lambda a: remove_artifact(a), True, "has no manifest.json", id="no folder"),
    ],
)
def test_damage_is_named(
    artifact: Path, damage: Callable[[Path], Any], found_without_contents: bool, words: str
) -> None:
    damage(artifact)
    assert (find_artifact(artifact) is None) == found_without_contents
    with pytest.raises(CorruptArtifact) as caught:
        verify_artifact(artifact)
    assert words in caught.value.message


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_passes(artifact: Path, data: st.DataObject) -> None:
    digest = read_manifest(artifact).digest
    file = artifact / data.draw(st.sampled_from(["a.txt", "deep/b.bin", "manifest.json"]))
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(flipped)
    with pytest.raises(CorruptArtifact):
        verify_artifact(artifact, digest)
    file.write_bytes(whole)
    verify_artifact(artifact, digest)


def test_another_artifact_than_the_expected_one_is_refused(artifact: Path) -> None:
    with pytest.raises(CorruptArtifact, match="expected sha256:00"):
        verify_artifact(artifact, "sha256:" + "0" * 64)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_artifact(tmp_path / "x", "test") as writer:
            writer.write("a", b"1")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        pytest.param(tensor_file()[:-1], "has 76 bytes, its header describes 77", id="a cut tensor"),
        pytest.param(b"\xff" * 12, "header of", id="no header"),
        pytest.param(b"", "header of", id="an empty file"),
    ],
)
def test_a_safetensors_file_that_is_not_whole_is_never_published(tmp_path: Path, contents: bytes, words: str) -> None:
    with pytest.raises(CorruptArtifact, match=words), new_artifact(tmp_path / "x", "test") as writer:
        writer.write("w.safetensors", contents)
    assert list(tmp_path.iterdir()) == []


def test_a_recorded_file_that_changed_is_never_published(tmp_path: Path) -> None:
    def lie() -> None:
        with new_artifact(tmp_path / "x", "test") as writer:
            writer.record("a", 5, "0" * 64)
            (writer.folder / "a").write_bytes(b"123")

    with pytest.raises(CorruptArtifact, match="recorded 5 bytes, found 3"):
        lie()


def test_a_complete_artifact_is_kept_when_it_is_written_again(artifact: Path) -> None:
    before = (artifact / "manifest.json").stat().st_ino
    write(artifact, {"other": b"contents"})
    assert (artifact / "manifest.json").stat().st_ino == before


def test_an_incomplete_folder_is_replaced(artifact: Path) -> None:
    (artifact / "a.txt").unlink()
    write(artifact)
    verify_artifact(artifact)
    assert [entry.name for entry in artifact.parent.iterdir()] == [artifact.name]


def test_what_a_hashing_file_says_is_what_it_wrote(tmp_path: Path) -> None:
    with HashingFile(tmp_path / "deep" / "f") as file:
        file.write(b"ab")
        file.write(memoryview(b"cd"))
    assert (file.size, file.sha256) == (4, hashlib.sha256(b"abcd").hexdigest())


def test_an_input_is_opened_by_its_reference(tmp_path: Path) -> None:
    path = write(tmp_path / "finetune" / "x")
    ref = artifact_ref(tmp_path, path)
    config = StageConfig("train", "i", {}, "o", inputs={"model": ref}, workspace=str(tmp_path))
    assert ref.path == "finetune/x"
    assert open_input(config, "model") == path
    with pytest.raises(ContractError, match="needs input 'prepare'"):
        open_input(config, "prepare")
    wrong = StageConfig(
        "train", "i", {}, "o", inputs={"model": ArtifactRef(ref.path, "sha256:" + "0" * 64)}, workspace=str(tmp_path)
    )
    with pytest.raises(CorruptArtifact):
        open_input(wrong, "model")


def _write_and_hang(path: Path, ready: Path) -> None:
    with new_artifact(path, "test") as writer:
        writer.write("a", b"half")
        ready.touch()
        signal.pause()


@pytest.fixture
def hanging_writer(tmp_path: Path) -> Iterator[BaseProcess]:
    """A process that is in the middle of writing tmp_path/x."""
    process = start(_write_and_hang, tmp_path / "x", tmp_path / "ready")
    wait_for(tmp_path / "ready")
    (tmp_path / "ready").unlink()
    yield process
    process.kill()
    process.join(10)


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path, hanging_writer: BaseProcess) -> None:
    hanging_writer.kill()
    hanging_writer.join(10)
    assert find_artifact(tmp_path / "x") is None
    assert len(list(tmp_path.iterdir())) == 2  # its temporary folder and lock
    verify_artifact(write(tmp_path / "x"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_a_living_writer_is_left_alone(tmp_path: Path, hanging_writer: BaseProcess) -> None:
    verify_artifact(write(tmp_path / "x"))
    assert hanging_writer.is_alive()
    assert len(list(tmp_path.glob(".x.tmp-*"))) == 2


def test_a_folder_whose_removal_was_cut_short_goes_with_the_next_write(tmp_path: Path) -> None:
    (tmp_path / ".x.tmp-0123").mkdir()
    (tmp_path / ".x.tmp-0123" / "f").write_bytes(b"1")
    write(tmp_path / "x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def _hold(path: Path, ready: Path) -> None:
    with folder_lock(path):
        ready.touch()
        signal.pause()


def _enter(path: Path, done: Path) -> None:
    with folder_lock(path):
        done.touch()


def test_a_waiting_process_goes_on_when_the_holder_is_killed(tmp_path: Path) -> None:
    holder = start(_hold, tmp_path / "x", tmp_path / "ready")
    wait_for(tmp_path / "ready")
    waiter = start(_enter, tmp_path / "x", tmp_path / "done")
    waiter.join(0.3)
    assert not (tmp_path / "done").exists()
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    wait_for(tmp_path / "done")
    for process in (holder, waiter):
        process.join(10)


def _fetch_once(path: Path, log: Path) -> None:
    with folder_lock(path):
        if find_artifact(path) is None:
            with log.open("ab") as file:
                file.write(b"fetched\n")
            write(path)


def test_of_many_that_race_for_a_shared_artifact_one_fetches(tmp_path: Path) -> None:
    processes = [start(_fetch_once, tmp_path / "x", tmp_path / "log") for _ in range(6)]
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 6
    assert (tmp_path / "log").read_bytes() == b"fetched\n"
    verify_artifact(tmp_path / "x")


def _write_many(path: Path) -> None:
    for _ in range(6):
        write(path)


def test_writers_without_a_lock_never_break_the_artifact(tmp_path: Path) -> None:
    processes = [start(_write_many, tmp_path / "x") for _ in range(4)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    verify_artifact(tmp_path / "x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
