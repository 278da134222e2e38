"""What a person is told who gives a broken adapter or base model to a merge: which file, what is in it, what to do."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import merge_adapter
from finetune_trainer.contract import ExitCode
from finetune_trainer.safetensors_stream import TensorPlan, encode_header

LAYER = "model.layers.0.self_attn.q_proj"
BASE = {f"{LAYER}.weight": (4, 3), "lm_head.weight": (5, 4), "model.embed_tokens.weight": (5, 4)}
ADAPTER = {f"base_model.model.{LAYER}.lora_A.weight": (2, 3), f"base_model.model.{LAYER}.lora_B.weight": (4, 2)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], value: float = 0.5) -> None:
    plan = [TensorPlan(name, "F32", shape) for name, shape in shapes.items()]
    data = b"".join(struct.pack("<f", value) * (tensor.nbytes // 4) for tensor in plan)
    path.write_bytes(encode_header(plan, {}) + data)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A folder with base/ and adapter/ that fit each other."""
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    (tmp_path / "base/tokenizer.json").write_text("{}")
    write_tensors(tmp_path / "base/model.safetensors", BASE)
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(CONFIG))
    write_tensors(tmp_path / "adapter/adapter_model.safetensors", ADAPTER)
    return tmp_path


def merge(folders: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and last line of `finetune-trainer merge-adapter`."""
    code = merge_adapter.main([str(folders / name) for name in ("base", "adapter", "output")])
    return code, (capsys.readouterr().err.strip().splitlines() or [""])[-1]


def test_what_fits_is_merged(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge(folders, capsys)[0] == ExitCode.SUCCESS
    assert (folders / "output/model.safetensors").stat().st_size == (folders / "base/model.safetensors").stat().st_size


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def configure(folder: Path, **changes: Any) -> None:
    (folder / "adapter/adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))


def index(folder: Path, weight_map: Any) -> None:
    (folder / "base/model.safetensors").rename(folder / "base/model-00001-of-00002.safetensors")
    (folder / "base/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


FIRST = "model-00001-of-00002.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], Any], ExitCode, str]] = {
    "a truncated adapter": (
        lambda at: cut(at / "adapter/adapter_model.safetensors", 250),
        ExitCode.CORRUPT_ARTIFACT,
        "adapter/adapter_model.safetensors is no whole safetensors file: it has 250 bytes, its header describes",
    ),
    "an empty adapter file": (
        lambda at: cut(at / "adapter/adapter_model.safetensors", 0),
        ExitCode.CORRUPT_ARTIFACT,
        "a header of 0 bytes is announced in a file of 0 bytes; write or download it again",
    ),
    "a git-lfs pointer instead of weights": (
        lambda at: (at / "base/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n"),
        ExitCode.CORRUPT_ARTIFACT,
        "base/model.safetensors is a pointer of git-lfs",
    ),
    "a file of torch.save under another name": (
        lambda at: (at / "base/model.safetensors").write_bytes(b"PK\x03\x04" + bytes(60)),
        ExitCode.CORRUPT_ARTIFACT,
        "base/model.safetensors is an archive of torch.save, which can run code when it is read: convert it",
    ),
    "a pickled adapter": (
        lambda at: (at / "adapter/adapter_model.safetensors").rename(at / "adapter/adapter_model.bin"),
        ExitCode.USER_ERROR,
        "save the adapter with peft's save_pretrained",
    ),
    "an adapter of another model": (
        lambda at: write_tensors(
            at / "adapter/adapter_model.safetensors",
            {name.replace("layers.0", "layers.7"): shape for name, shape in ADAPTER.items()},
        ),
        ExitCode.CORRUPT_ARTIFACT,
        "the adapter changes 'model.layers.7.self_attn.q_proj', and the base model has no tensor",
    ),
    "an adapter of a wider model": (
        lambda at: write_tensors(
            at / "adapter/adapter_model.safetensors",
            {name: tuple(2 * size if size != 2 else size for size in shape) for name, shape in ADAPTER.items()},
        ),
        ExitCode.CORRUPT_ARTIFACT,
        "do not fit rank 2 and the base's 'model.layers.0.self_attn.q_proj.weight' [4, 3]; expected [2, 3] and [4, 2]",
    ),
    "a wrong rank in adapter_config.json": (
        lambda at: configure(at, r=3),
        ExitCode.CORRUPT_ARTIFACT,
        "lora_A [2, 3] and lora_B [4, 2] do not fit rank 3",
    ),
    "a rank that is text": (
        lambda at: configure(at, r="2"),
        ExitCode.CORRUPT_ARTIFACT,
        "adapter_config.json: r of 'model.layers.0.self_attn.q_proj' is '2', expected a positive integer",
    ),
    "an alpha that is no number": (
        lambda at: configure(at, lora_alpha=float("nan")),
        ExitCode.CORRUPT_ARTIFACT,
        "lora_alpha of 'model.layers.0.self_attn.q_proj' is nan, expected a number",
    ),
    "a pattern that is none": (
        lambda at: configure(at, rank_pattern={"(": 4}),
        ExitCode.CORRUPT_ARTIFACT,
        "rank_pattern has '(', which is no pattern",
    ),
    "another kind of adapter": (
        lambda at: configure(at, peft_type="IA3"),
        ExitCode.USER_ERROR,
        "peft_type is 'IA3', only LORA is supported",
    ),
    "a missing adapter_config.json": (
        lambda at: (at / "adapter/adapter_config.json").unlink(),
        ExitCode.CORRUPT_ARTIFACT,
        "adapter_config.json is missing: an adapter cannot be read without its rank and scale",
    ),
    "NaN in an adapter": (
        lambda at: write_tensors(at / "adapter/adapter_model.safetensors", ADAPTER, float("nan")),
        ExitCode.USER_ERROR,
        "NaN or infinite",
    ),
    "a config.json that is no JSON": (
        lambda at: (at / "base/config.json").write_text("{'model_type': 'llama'}"),
        ExitCode.CORRUPT_ARTIFACT,
        "base/config.json is no JSON: Expecting property name enclosed in double quotes",
    ),
    "an empty config.json": (
        lambda at: (at / "base/config.json").write_text(""),
        ExitCode.CORRUPT_ARTIFACT,
        "base/config.json is no JSON: it is empty",
    ),
    "a config.json cut in a character": (
        lambda at: (at / "base/config.json").write_bytes('{"a": "é'.encode()[:-1]),
        ExitCode.CORRUPT_ARTIFACT,
        "base/config.json is no JSON: byte 7 is no UTF-8 text",
    ),
    "a base model with pickles only": (
        lambda at: (at / "base/model.safetensors").rename(at / "base/pytorch_model.bin"),
        ExitCode.USER_ERROR,
        "convert the model to safetensors first, other weight formats can run code when they are read",
    ),
    "a missing shard": (
        lambda at: index(at, {**dict.fromkeys(BASE, FIRST), "x": "model-00002-of-00002.safetensors"}),
        ExitCode.CORRUPT_ARTIFACT,
        "base/model-00002-of-00002.safetensors is missing",
    ),
    "a foreign shard": (
        lambda at: (
            index(at, {**dict.fromkeys(BASE, FIRST), "x": "model-00002-of-00002.safetensors"}),
            write_tensors(at / "base/model-00002-of-00002.safetensors", {"y": (2,)}),
        ),
        ExitCode.CORRUPT_ARTIFACT,
        "base/model.safetensors.index.json lists x, which no shard holds: download the model again",
    ),
    "a shard that is there twice": (
        lambda at: (
            index(at, {**dict.fromkeys(BASE, FIRST), "x": "model-00002-of-00002.safetensors"}),
            write_tensors(at / "base/model-00002-of-00002.safetensors", BASE),
        ),
        ExitCode.CORRUPT_ARTIFACT,
        "is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors",
    ),
    "an index that leads elsewhere": (
        lambda at: index(at, dict.fromkeys(BASE, "../adapter/adapter_model.safetensors")),
        ExitCode.CORRUPT_ARTIFACT,
        "is said to be in '../adapter/adapter_model.safetensors', expected a *.safetensors beside it",
    ),
}


@pytest.mark.parametrize(("spoil", "code", "words"), [pytest.param(*case, id=name) for name, case in BROKEN.items()])
def test_what_is_broken_is_told_with_file_value_and_remedy(
    folders: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], Any],
    code: ExitCode,
    words: str,
) -> None:
    spoil(folders)
    found, told = merge(folders, capsys)
    assert words in told
    assert found == code
    assert not (folders / "output").exists()
