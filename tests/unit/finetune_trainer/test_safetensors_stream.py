"""The streaming reader and writer against the safetensors library itself."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from finetune_trainer.errors import CorruptArtifact
from finetune_trainer.safetensors_stream import (
    SafetensorsWriter,
    TensorPlan,
    TensorReader,
    encode_header,
    read_header,
)

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64, "U8": torch.uint8}


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write(path: Path, tensors: dict[str, torch.Tensor], chunk: int = 7) -> SafetensorsWriter:
    names = {value: key for key, value in DTYPES.items()}
    plan = [TensorPlan(name, names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(path, plan, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            data = as_bytes(tensor)
            writer.write(name, [data[start : start + chunk] for start in range(0, len(data), chunk)])
    return writer


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=5
    )
)
def test_what_is_written_reads_equal_with_the_library_and_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[str, list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("files")
    tensors = {
        f"name.{number}": torch.randint(0, 100, shape).to(DTYPES[dtype]) for number, (dtype, shape) in enumerate(shapes)
    }
    path = folder / "ours.safetensors"
    writer = write(path, tensors)
    assert writer.size == path.stat().st_size
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())

    save_file(tensors, folder / "theirs.safetensors", metadata={"format": "pt"})
    with TensorReader(folder / "theirs.safetensors") as reader:
        assert reader.header.metadata == {"format": "pt"}
        for name, tensor in tensors.items():
            info = reader.header.tensor(name)
            assert info.shape == tuple(tensor.shape)
            assert b"".join(reader.chunks(info, 3)) == bytes(reader.read(info)) == as_bytes(tensor)


def test_the_writer_hashes_what_is_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    writer = write(path, {"x": torch.arange(10.0)})
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_writer_refuses_another_order_length_or_a_missing_tensor(tmp_path: Path) -> None:
    plan = [TensorPlan("a", "U8", (2,)), TensorPlan("b", "U8", (2,))]
    with pytest.raises(ValueError, match="'b' is not the next"), SafetensorsWriter(tmp_path / "1", plan, {}) as writer:
        writer.write("b", [b"xx"])
    with pytest.raises(ValueError, match="got 3 bytes"), SafetensorsWriter(tmp_path / "2", plan, {}) as writer:
        writer.write("a", [b"xxx"])
    with pytest.raises(ValueError, match="'b' was planned"), SafetensorsWriter(tmp_path / "3", plan, {}) as writer:
        writer.write("a", [b"xx"])


def header_file(entries: object, data: bytes) -> bytes:
    raw = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: str, shape: list[object], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        pytest.param(b"\x01\x02", "header of", id="a file shorter than the length field"),
        pytest.param((1 << 60).to_bytes(8, "little") + b"{}", "header of 1152921504606846976", id="a length beyond it"),
        pytest.param(header_file(b"{nope}", b""), "no JSON", id="a header that is no JSON"),
        pytest.param(header_file([1], b""), "no JSON object", id="a header that is a list"),
        pytest.param(header_file({"x": {"dtype": "F32"}}, b""), "lacks", id="an entry without offsets"),
        pytest.param(header_file({"x": entry("F99", [1], 0, 4)}, b"1234"), "dtype 'F99'", id="an unknown dtype"),
        pytest.param(header_file({"x": entry("F32", [-1], 0, 4)}, b"1234"), "no counts", id="a negative dimension"),
        pytest.param(header_file({"x": entry("F32", [True], 0, 4)}, b"1234"), "no counts", id="a dimension of true"),
        pytest.param(header_file({"x": entry("F32", [2], 0, 4)}, b"1234"), "takes 4 bytes", id="a shape that lies"),
        pytest.param(header_file({"x": entry("U8", [4], 0, 4)}, b"12"), "has .* describes", id="a file that is cut"),
        pytest.param(header_file({"x": entry("U8", [1], 0, 1)}, b"12"), "has .* describes", id="bytes after the end"),
        pytest.param(
            header_file({"x": entry("U8", [2], 0, 2), "y": entry("U8", [2], 1, 3)}, b"123"),
            "'y' begins",
            id="an overlap",
        ),
        pytest.param(
            header_file({"x": entry("U8", [1], 0, 1), "y": entry("U8", [1], 2, 3)}, b"123"), "'y' begins", id="a gap"
        ),
    ],
)
def test_a_damaged_file_is_named_with_what_was_found(tmp_path: Path, contents: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(contents)
    with pytest.raises(CorruptArtifact, match=message) as caught:
        read_header(path)
    assert str(path) in caught.value.message


def test_a_missing_file_and_a_missing_tensor_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifact, match=r"gone\.safetensors is missing"):
        read_header(tmp_path / "gone.safetensors")
    path = tmp_path / "a.safetensors"
    path.write_bytes(encode_header([TensorPlan("x", "U8", (0,))], {}))
    with pytest.raises(CorruptArtifact, match="has no tensor 'y'; it has x"):
        read_header(path).tensor("y")


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, {"x": torch.arange(100.0)})
    with TensorReader(path) as reader:
        os.truncate(path, 200)
        with pytest.raises(CorruptArtifact, match="ends at byte 200"):
            reader.read(reader.header.tensor("x"))
