"""Files from outside: whatever is in them, a reader says which file is wrong, in bounded time, and runs none of it."""

from __future__ import annotations

import ast
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_trainer import json_files
from finetune_trainer.adapters import ADAPTER_CONFIG_NAME, match_adapter, read_adapter_config
from finetune_trainer.artifacts import MANIFEST_NAME, new_artifact, read_manifest, read_tensor_header, verify_artifact
from finetune_trainer.checkpoints import STATE_NAME, read_checkpoint
from finetune_trainer.errors import CorruptArtifact, StageError, UserError
from finetune_trainer.json_files import is_plain_path, parse_json, read_json_file
from finetune_trainer.model_files import INDEX_NAME, SINGLE_NAME, read_model_config, read_model_files
from finetune_trainer.safetensors_stream import TensorPlan, encode_header, read_header
from finetune_trainer.sources.base import Listing, SourceFile
from finetune_trainer.sources.models import check_model, choose_model_files
from finetune_trainer.sources.store import keep_files

SOURCES = Path(read_header.__code__.co_filename).parent
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=10,
)
BROKEN_TEXT = st.sampled_from(
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"NaN", b'"\\ud800"', b"null", b"[]"]
) | st.binary(max_size=64)


def header_file(header: Any, data: bytes = b"") -> bytes:
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def outcome(read: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What was read, or the message of the damage; every other exception is a failure."""
    try:
        return read(*arguments), ""
    except CorruptArtifact as error:
        return None, error.message


# Headers that are nearly right: each part of an entry may be anything.
NUMBER = st.integers(-1, 9) | st.just(2**64) | st.just(10**4000) | st.booleans() | st.floats() | st.text(max_size=2)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F4", ""]) | st.lists(st.just("F32"), max_size=1) | st.none(),
        "shape": st.lists(NUMBER, max_size=3) | st.text(max_size=2) | st.just([10**18] * 2000),
        "data_offsets": st.lists(NUMBER, max_size=3) | st.text(max_size=2) | st.just({"0": 0, "1": 1}),
    },
)
HEADERS = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), ENTRY | JSON, max_size=4)


@FUZZ
@given(st.binary(max_size=80) | st.builds(header_file, HEADERS | JSON, st.binary(max_size=16)))
def test_any_bytes_are_tensors_of_the_files_size_or_a_named_damage(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "any.safetensors"
    path.write_bytes(data)
    header, damage = outcome(read_header, path)
    if header is None:
        assert str(path) in damage
    else:
        assert sum(tensor.nbytes for tensor in header.tensors.values()) == len(data) - header.data_start
    assert (outcome(read_tensor_header, path)[0] is None) == (header is None)


def test_a_header_that_announces_more_than_the_file_has_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptArtifact, match="a header of 4611686018427387904 bytes is announced in a file of 10"):
        read_header(path)
    with path.open("r+b") as file:  # a sparse file of a terabyte: its size is no reason to read it
        file.truncate(1 << 40)
        file.write((1 << 39).to_bytes(8, "little"))
    with pytest.raises(CorruptArtifact, match="is announced"):
        read_header(path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["a folder", "a pipe"])
def test_what_is_no_regular_file_is_refused_without_waiting_for_it(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    for name in (SINGLE_NAME, "config.json"):
        make(tmp_path / name)
    for read in (read_header, read_json_file):
        with pytest.raises(CorruptArtifact, match=r"config\.json|model\.safetensors"):
            read(tmp_path / (SINGLE_NAME if read is read_header else "config.json"))


@FUZZ
@given(BROKEN_TEXT | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_text_is_json_or_a_named_damage(data: bytes) -> None:
    _, damage = outcome(parse_json, data, "the-file")
    assert not damage or damage.startswith("the-file is no JSON")


def test_a_json_file_larger_than_any_can_be_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_BYTES", 8)
    (tmp_path / "config.json").write_text('{"a": "bcdef"}')
    with pytest.raises(CorruptArtifact, match=r"config\.json has 14 bytes, more than the 8"):
        read_model_config(tmp_path)


@FUZZ
@given(BROKEN_TEXT | st.dictionaries(st.sampled_from(["weight_map", "metadata"]), JSON).map(json.dumps))
def test_any_index_is_a_model_or_a_named_damage(tmp_path: Path, index: bytes | str) -> None:
    path = tmp_path / INDEX_NAME
    path.write_bytes(index.encode("utf-8", "surrogatepass") if isinstance(index, str) else index)
    with pytest.raises(CorruptArtifact) as caught:
        read_model_files(tmp_path)
    assert str(tmp_path) in caught.value.message


OUTSIDE = ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..", "", "x\0.safetensors",
           "\ud800.safetensors", "x" * 300 + ".safetensors", "model.bin", 7, None, ["a"]]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=[ascii(name)[:24] for name in OUTSIDE])
def test_an_index_names_files_beside_it_only(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(encode_header([TensorPlan("a", "F32", ())], {}) + bytes(4))
    (folder / "config.json").write_text("{}")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CorruptArtifact, match=r"expected a \*\.safetensors beside it"):
        read_model_files(folder)
    with pytest.raises(UserError, match=r"expected a \*\.safetensors beside it"):
        check_model("hf://a/b", folder)


MANIFESTS = st.fixed_dictionaries(
    {"contractVersion": st.just(1)},
    optional={
        "kind": st.just("test") | JSON,
        "files": st.lists(
            st.fixed_dictionaries(
                {"path": st.sampled_from(["a", "../a", "/a", ""]) | JSON, "size": NUMBER, "sha256": st.text() | JSON}
            )
            | JSON,
            max_size=2,
        )
        | JSON,
        "tensors": st.just({}) | JSON,
        "metadata": st.just({}) | JSON,
        "versions": st.just({}) | JSON,
    },
)


@FUZZ
@given(BROKEN_TEXT | (MANIFESTS | JSON).map(json.dumps))
def test_any_manifest_is_one_or_a_named_damage(tmp_path: Path, manifest: bytes | str) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(manifest.encode() if isinstance(manifest, str) else manifest)
    for read in (read_manifest, verify_artifact):
        found, damage = outcome(read, tmp_path)
        if found is None:
            assert str(tmp_path) in damage
        else:
            assert all(is_plain_path(entry.path) for entry in found.files)


@FUZZ
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "version": st.just(1) | JSON,
            "step": st.just(3) | NUMBER | JSON,
            "worldSize": st.just(1) | st.just(2**62) | NUMBER | JSON,
            "parameters": st.just({"w": {"shape": [2]}}) | st.dictionaries(st.text(max_size=3), JSON) | JSON,
        },
    )
    | JSON,
    st.dictionaries(st.sampled_from(["version", "rank", "worldSize", "step", "tensors"]), JSON) | st.none(),
)
def test_any_state_of_a_checkpoint_is_one_or_a_named_damage(tmp_path: Path, state: Any, layout: Any) -> None:
    path = tmp_path / "step-00000003"
    shutil_rmtree(path)
    metadata = {} if layout is None else {"finetune": json.dumps({"version": 1, "rank": 0, **layout})}
    with new_artifact(path, "checkpoint") as writer:
        writer.write(STATE_NAME, json.dumps(state).encode())
        tensor = encode_header([TensorPlan("param/w", "F32", (2,))], metadata) + bytes(8)
        writer.write("rank-00000.safetensors", tensor)
    with pytest.raises(CorruptArtifact) as caught:
        read_checkpoint(path)
    assert str(path) in caught.value.message


def shutil_rmtree(path: Path) -> None:
    """Remove what the example before left."""
    for file in sorted(path.glob("*")) if path.exists() else ():
        file.unlink()
    if path.exists():
        path.rmdir()


BASE = {"model.l.weight": (4, 3)}
ADAPTER = {"base_model.model.model.l.lora_A.weight": (2, 3), "base_model.model.model.l.lora_B.weight": (4, 2)}


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(
            ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "modules_to_save", "bias", "use_dora", "use_rslora",
             "fan_in_fan_out"]
        ),
        JSON | st.dictionaries(st.sampled_from(["l", "(", "*", "model.l", "(a{99999999999})"]), JSON),
    )
)  # fmt: skip
def test_any_adapter_config_is_understood_or_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / ADAPTER_CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}))
    with contextlib.suppress(StageError):
        match_adapter(read_adapter_config(tmp_path), ADAPTER, BASE, {})


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "a/./b", "a/../../b", "", "a\0b", "x" * 300])
def test_a_listing_names_plain_paths_only(tmp_path: Path, path: str) -> None:
    listing = Listing("", (SourceFile(path, 1, "i"),))
    with pytest.raises(UserError, match="no plain relative path"):
        keep_files(
            _NoSource(), listing, listing.files, root=tmp_path, kind="dataset", metadata={}, check=lambda _: None
        )
    assert list(tmp_path.iterdir()) == []


class _NoSource:
    name = "s3://bucket/x"

    def list_files(self) -> Listing:
        raise AssertionError("not asked")

    def read(self, file: SourceFile) -> bytes:
        raise AssertionError("not asked")

    def fetch(self, files: Any, folder: Path) -> None:
        raise AssertionError("not asked")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.pkl"])
def test_weights_that_can_run_code_are_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    files = [SourceFile(each, 1, "") for each in ("config.json", "tokenizer.json", name)]
    with pytest.raises(UserError, match="can run code when they are loaded: convert them to safetensors"):
        choose_model_files("hf://a/b", files, trust_remote_code=True)
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="convert the model to safetensors first, other weight formats can run code"):
        read_model_files(tmp_path)


def test_code_of_a_model_is_fetched_only_where_the_spec_says_so() -> None:
    names = ("config.json", "tokenizer.json", "model.safetensors", "modeling_x.py", "sub/evil.py", "run.sh")
    files = [SourceFile(name, 1, "") for name in names]
    chosen = {file.path for file in choose_model_files("hf://a/b", files, trust_remote_code=False)}
    assert chosen == {"config.json", "tokenizer.json", "model.safetensors"}
    trusted = {file.path for file in choose_model_files("hf://a/b", files, trust_remote_code=True)}
    assert trusted - chosen == {"modeling_x.py"}


RUNS_CODE = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.py")), ids=lambda path: path.relative_to(SOURCES).as_posix())
def test_no_module_unpickles_or_runs_what_it_reads(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert not imported & RUNS_CODE
    for name, call in calls(tree):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name not in {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "np.load", "numpy.load"}
        assert name != "torch.load" or keywords.get("weights_only") == "True"
        assert keywords.get("shell") != "True"
        assert keywords.get("allow_pickle") != "True"
        assert keywords.get("trust_remote_code") != "True"
        if name.endswith("from_pretrained") and "use_safetensors" in keywords:
            assert keywords["use_safetensors"] == "True"
