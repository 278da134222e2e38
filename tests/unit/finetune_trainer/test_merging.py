"""Merging against peft and transformers: equal logits, equal bytes, named refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_trainer.artifacts import verify_artifact
from finetune_trainer.contract import ContractError, ExitCode
from finetune_trainer.errors import CorruptArtifact, StageError, UserError
from finetune_trainer.merging import merge, parse_bytes, plan_merge
from finetune_trainer.model_files import read_model_files
from finetune_trainer.safetensors_stream import TensorPlan, encode_header, read_header
from finetune_trainer.stages import merge as merge_stage

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(3, 67).reshape(2, 32)


def load_shards(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def run_merge(base: Path, adapter: Path, output: Path, max_shard_bytes: int = 10**9, cpus: int = 2) -> Any:
    """Merge without the stage around it; copies config.json, so that transformers loads the result."""
    output.mkdir()
    result = merge(plan_merge(read_model_files(base), adapter, max_shard_bytes), output, {}, cpus)
    shutil.copy(base / "config.json", output)
    return result


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def logits_of(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path, adapter_artifacts: ModuleType) -> Any:
    return adapter_artifacts.random_adapter(tiny_model, tmp_path / "adapter")


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param({}, id="standard lora on q and v"),
        pytest.param({"target_modules": ALL_LINEAR, "lora_alpha": 3}, id="all linear layers"),
        pytest.param({"use_rslora": True}, id="rank-stabilised scale"),
        pytest.param(
            {
                "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7},
                "alpha_pattern": {"v_proj": 1, "layers.0.self_attn.q_proj": 32},
            },
            id="rank and alpha patterns",
        ),
        pytest.param({"target_modules": ["embed_tokens", "lm_head"]}, id="embedding and output layer, untied"),
        pytest.param({"use_dora": True, "target_modules": ALL_LINEAR}, id="DoRA on all linear layers"),
        pytest.param({"use_dora": True, "use_rslora": True, "target_modules": ["embed_tokens"]}, id="DoRA embedding"),
        pytest.param({"modules_to_save": ["lm_head", "embed_tokens"]}, id="modules to save"),
    ],
)
def test_merged_logits_equal_base_plus_adapter_logits(
    tiny_model: Path, tmp_path: Path, adapter_artifacts: ModuleType, lora: dict[str, Any]
) -> None:
    adapter = adapter_artifacts.random_adapter(tiny_model, tmp_path / "adapter", **lora)
    result = run_merge(tiny_model, adapter, tmp_path / "merged")

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = logits_of(base)
    expected = logits_of(PeftModel.from_pretrained(base, adapter))
    found = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (found - expected).abs().max() < 1e-5
    assert (found - before).abs().max() > 1e-2
    assert all(proof.changed > 0.99 * proof.elements for proof in result.proofs)
    assert len(result.proofs) == len(json.loads(json.dumps([proof.as_json() for proof in result.proofs])))


def assert_equal_but_for_ties(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Equal bytes, but for a step of the dtype in one of a thousand numbers.

    The products are summed by another library, in another order on some processors: the last bit of a float32 may then
    decide to which side a number halfway between two of the dtype is rounded.
    """
    steps = (found.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert steps.max() <= 1, name
    assert steps.sum() <= max(1, steps.numel() // 1000), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_accumulated_in_float32_and_rounded_once(
    tmp_path: Path, tiny_model: Path, adapter_artifacts: ModuleType, dtype: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    kind = getattr(torch, dtype)
    weights = {name: tensor.to(kind) for name, tensor in load_shards(base).items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_artifacts.random_adapter(base, tmp_path / "adapter", target_modules=ALL_LINEAR)
    run_merge(base, adapter, tmp_path / "merged")

    pairs = load_file(adapter / "adapter_model.safetensors")
    merged = load_shards(tmp_path / "merged")
    assert merged.keys() == weights.keys()
    for name, weight in weights.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight
        if f"{key}.lora_A.weight" in pairs:
            delta = 2.0 * (pairs[f"{key}.lora_B.weight"] @ pairs[f"{key}.lora_A.weight"])
            expected = (weight.float() + delta).to(kind)
        assert merged[name].dtype == kind
        assert_equal_but_for_ties(merged[name], expected, name)


def test_a_bfloat16_merge_has_the_numbers_of_pefts(
    tmp_path: Path, tiny_model_module: ModuleType, adapter_artifacts: ModuleType
) -> None:
    base = tiny_model_module.write_tiny_model(tmp_path / "base", dtype="bfloat16")
    adapter = adapter_artifacts.random_adapter(base, tmp_path / "adapter", target_modules=ALL_LINEAR)
    run_merge(base, adapter, tmp_path / "merged")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    ours, theirs = load_shards(tmp_path / "merged"), load_shards(tmp_path / "peft")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_equal_but_for_ties(ours[name], theirs[name], name)


def test_a_transposed_weight_gets_a_transposed_delta(tmp_path: Path) -> None:
    """GPT-2's layers store (inputs, outputs); peft marks that with fan_in_fan_out."""
    weight, a, b = torch.randn(6, 9), torch.randn(2, 6), torch.randn(9, 2)
    base, adapter = bare_base(tmp_path, {"h.0.attn.c_attn.weight": weight}), tmp_path / "adapter"
    bare_adapter(adapter, "transformer.h.0.attn.c_attn", a, b, fan_in_fan_out=True)
    run_merge(base, adapter, tmp_path / "merged")
    merged = load_shards(tmp_path / "merged")["h.0.attn.c_attn.weight"]
    assert torch.allclose(merged, weight + 2.0 * (b @ a).T, atol=1e-6)


def bare_base(tmp_path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder = tmp_path / "bare-base"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": False, **config}))
    return folder


def bare_adapter(folder: Path, module: str, a: torch.Tensor, b: torch.Tensor, **config: Any) -> None:
    folder.mkdir()
    key = f"base_model.model.{module}"
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": a.shape[0], "lora_alpha": 2 * a.shape[0], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("cpus", [1, 2, 5])
def test_the_number_of_threads_does_not_change_a_byte(
    tmp_path: Path, tiny_model_module: ModuleType, adapter_artifacts: ModuleType, cpus: int
) -> None:
    base = tiny_model_module.write_tiny_model(tmp_path / "base", sharded=True)
    adapter = adapter_artifacts.random_adapter(base, tmp_path / "adapter", target_modules=ALL_LINEAR)
    one = run_merge(base, adapter, tmp_path / "one", cpus=1)
    other = run_merge(base, adapter, tmp_path / "other", cpus=cpus)
    assert [(file.path.name, file.sha256) for file in one.files] == [
        (file.path.name, file.sha256) for file in other.files
    ]
    for file in other.files:
        assert file.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("sharded", "max_shard_size", "expected"),
    [
        pytest.param(False, "5GB", 1, id="one file stays one file without an index"),
        pytest.param(True, "5GB", None, id="shards that fit stay as they are"),
        pytest.param(False, "40KB", None, id="one file too large is laid out again"),
        pytest.param(True, "40KB", None, id="shards too large are laid out again"),
        pytest.param(False, "1B", 21, id="a tensor larger than a shard has a shard of its own"),
    ],
)
def test_the_stage_writes_a_model_that_transformers_loads(
    workspace: Path,
    tmp_path: Path,
    tiny_model_module: ModuleType,
    adapter_artifacts: ModuleType,
    sharded: bool,
    max_shard_size: str,
    expected: int | None,
) -> None:
    base = tiny_model_module.write_tiny_model(tmp_path / "base", sharded=sharded)
    (base / "LICENSE").write_text("as it is")
    (base / "original").mkdir()
    (base / "original" / "params.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"must not travel")
    model = adapter_artifacts.copy_artifact(base, workspace / "model", "model")
    adapter = adapter_artifacts.random_adapter(base, tmp_path / "adapter")
    consolidated = adapter_artifacts.copy_artifact(adapter, workspace / "consolidated", "consolidate")
    config = adapter_artifacts.stage_config(
        workspace,
        "merge",
        {"merge": {"maxShardSize": max_shard_size}},
        [model, consolidated],
        ["model", "consolidate"],
    )
    report = merge_stage.run(config)

    assert report.exit_code == ExitCode.SUCCESS
    output = config.output_path
    manifest = verify_artifact(output, report.artifacts["merge"].digest)
    assert report.metrics["tensors"] == 21
    written = sorted(path.name for path in output.glob("*.safetensors"))
    assert report.metrics["shards"] == len(written)
    if max_shard_size == "5GB":
        assert written == sorted(path.name for path in base.glob("*.safetensors"))
    elif max_shard_size == "40KB":
        headers = [read_header(output / name) for name in written]
        assert len(headers) > 3
        assert all(header.size - header.data_start <= 40_000 or len(header.tensors) == 1 for header in headers)
    if expected is not None:
        assert len(written) == expected
    assert manifest.metadata["targets"].keys() == {
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qv"
    }
    assert (output / "model.safetensors.index.json").exists() == (len(written) > 1)
    assert {path.name for path in output.iterdir()} >= {"config.json", "generation_config.json", "LICENSE"}
    assert not (output / "pytorch_model.bin").exists()
    assert not (output / "original").exists()
    assert (output / "config.json").stat().st_nlink == 1

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    merged = AutoModelForCausalLM.from_pretrained(output)
    difference = (logits_of(merged) - logits_of(tuned)).abs().max()
    assert difference < 1e-5
    assert (
        AutoTokenizer.from_pretrained(output)("The garden").input_ids
        == AutoTokenizer.from_pretrained(base)("The garden").input_ids
    )
    assert merge_stage.run(config) == report


def test_a_damaged_byte_of_the_base_is_found_while_it_is_copied(
    workspace: Path, tmp_path: Path, tiny_model: Path, adapter: Path, adapter_artifacts: ModuleType
) -> None:
    model = adapter_artifacts.copy_artifact(tiny_model, workspace / "model", "model")
    consolidated = adapter_artifacts.copy_artifact(adapter, workspace / "consolidated", "consolidate")
    config = adapter_artifacts.stage_config(workspace, "merge", {}, [model, consolidated], ["model", "consolidate"])
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors has sha256 .* expected .* run prepare again"):
        merge_stage.run(config)
    assert not config.output_path.exists()


def spoil_adapter_key(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.norm.bias"] = torch.zeros(3)
    save_file(tensors, adapter / "adapter_model.safetensors")


def drop_a_matrix(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors")


def put_nan(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")


def other_module(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")


def quantized(base: Path, adapter: Path) -> None:
    edit_json(base / "config.json", quantization_config={"load_in_4bit": True})


def quantized_names(base: Path, adapter: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight.absmax"] = torch.ones(4)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def resized(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = torch.zeros(500, 32)
    save_file(tensors, adapter / "adapter_model.safetensors")


def integer_weights(base: Path, adapter: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def cut_base(base: Path, adapter: Path) -> None:
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-100])


def too_large(base: Path, adapter: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    pairs = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 1e5 * value for name, value in pairs.items()}, adapter / "adapter_model.safetensors")


def no_weights(base: Path, adapter: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        pytest.param(
            {"use_dora": True}, CorruptArtifact, "no .*q_proj.lora_magnitude_vector", id="DoRA without lengths"
        ),
        pytest.param({"bias": "some"}, UserError, "bias is 'some'", id="an unknown bias"),
        pytest.param(
            {"modules_to_save": ["lm_head"]}, CorruptArtifact, "names lm_head.*no weights", id="nothing saved"
        ),
        pytest.param({"layer_replication": [[0, 2]]}, UserError, "layer_replication", id="replicated layers"),
        pytest.param({"peft_type": "IA3"}, UserError, "peft_type is 'IA3'", id="another kind of adapter"),
        pytest.param({"r": 5}, CorruptArtifact, "do not fit rank 5", id="a rank that its matrices do not have"),
        pytest.param({"lora_alpha": None}, CorruptArtifact, "lora_alpha of .* is None", id="no alpha"),
        pytest.param({"fan_in_fan_out": True}, CorruptArtifact, "do not fit", id="a transposition that does not fit"),
        pytest.param(spoil_adapter_key, CorruptArtifact, "no LoRA pair.*norm.bias", id="a key that nothing uses"),
        pytest.param(drop_a_matrix, CorruptArtifact, "without .*layers.1.*lora_B", id="an A without its B"),
        pytest.param(put_nan, UserError, "layers.1.*v_proj.lora_B.* NaN", id="a value that is no number"),
        pytest.param(
            other_module, CorruptArtifact, "layers.7.*trained on another model", id="a module that is not there"
        ),
        pytest.param(quantized, UserError, "quantization_config", id="a quantised base"),
        pytest.param(resized, UserError, "vocabulary was extended", id="an extended vocabulary"),
        pytest.param(
            quantized_names, UserError, "lm_head.weight.absmax", id="quantised weights that config.json hides"
        ),
        pytest.param(integer_weights, UserError, r"q_proj.weight \(I8\)", id="integer weights"),
        pytest.param(cut_base, CorruptArtifact, "model.safetensors is no whole", id="a truncated base"),
        pytest.param(too_large, UserError, "infinite or no numbers in F16", id="a sum beyond float16"),
        pytest.param(no_weights, UserError, "convert the model to safetensors", id="a base without safetensors"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    tmp_path: Path, tiny_model: Path, adapter: Path, spoil: Any, kind: type[StageError], words: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    if isinstance(spoil, dict):
        edit_json(adapter / "adapter_config.json", **spoil)
    else:
        spoil(base, adapter)
    with pytest.raises(kind, match=words):
        run_merge(base, adapter, tmp_path / "merged")


def point_outside(base: Path) -> None:
    edit_index(base, lambda weights: {**weights, "model.norm.weight": "../elsewhere.safetensors"})


def unknown_tensor(base: Path) -> None:
    edit_index(base, lambda weights: {**weights, "model.extra.weight": weights["model.norm.weight"]})


def forgotten_tensor(base: Path) -> None:
    edit_index(base, lambda weights: {name: file for name, file in weights.items() if name != "model.norm.weight"})


def test_of_a_single_file_and_shards_the_one_that_transformers_loads_is_taken(
    tmp_path: Path, tiny_model_module: ModuleType
) -> None:
    base = tiny_model_module.write_tiny_model(tmp_path / "base", sharded=True)
    shutil.copy(
        tiny_model_module.write_tiny_model(tmp_path / "other", seed=5) / "model.safetensors", base / "model.safetensors"
    )
    model = AutoModelForCausalLM.from_pretrained(base)
    files = read_model_files(base)
    assert [shard.path.name for shard in files.shards] == ["model.safetensors"]
    assert torch.equal(model.lm_head.weight, load_file(files.shards[0].path)["lm_head.weight"])


def edit_index(base: Path, edit: Any) -> None:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "weight_map": edit(index["weight_map"])}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(point_outside, "expected a .*safetensors beside it", id="a file outside the folder"),
        pytest.param(unknown_tensor, "lists model.extra.weight, which no shard holds", id="a tensor no shard holds"),
        pytest.param(forgotten_tensor, "does not list model.norm.weight", id="a tensor that the index forgot"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, tiny_model_module: ModuleType, spoil: Any, words: str) -> None:
    base = tiny_model_module.write_tiny_model(tmp_path / "base", sharded=True)
    spoil(base)
    with pytest.raises(CorruptArtifact, match=words):
        read_model_files(base)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GB", 5 * 10**9), ("500M", 5 * 10**8), ("2Gi", 2 << 30), ("1.5KB", 1500), (123, 123), ("10 GiB", 10 << 30)],
)
def test_sizes_are_parsed(text: str | int, expected: int) -> None:
    assert parse_bytes(text, "spec.merge.maxShardSize") == expected


@pytest.mark.parametrize("text", ["", "0", "five", "5iB", "-1GB", "5XB"])
def test_a_wrong_size_names_its_field(text: str) -> None:
    with pytest.raises(ContractError, match=r"spec\.merge\.maxShardSize is"):
        parse_bytes(text, "spec.merge.maxShardSize")


MEASURE = """
import re, sys
from pathlib import Path
from finetune_trainer.merging import merge, plan_merge
from finetune_trainer.model_files import read_model_files
def peak():  # of this process alone: getrusage would count what its parent had at the fork
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
base, adapter, output = map(Path, sys.argv[1:4])
plan = plan_merge(read_model_files(base), adapter)
if output.is_dir():
    merge(plan, output, {}, 2)
assert not {"torch", "transformers", "peft"} & set(sys.modules)
print(peak(), plan.memory_bytes(2), plan.nbytes)
"""


def measured(base: Path, adapter: Path, output: Path) -> list[int]:
    """Peak memory, planned memory and bytes of the model, of a process that plans and, where `output` is, merges."""
    command = [sys.executable, "-c", MEASURE, base, adapter, output]
    environment = {"OPENBLAS_NUM_THREADS": "1", "PATH": ""}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=60)
    return [int(word) for word in ran.stdout.split()]


def test_a_merge_takes_the_memory_of_its_plan_and_no_torch(tmp_path: Path) -> None:
    tensors = {f"layers.{n}.proj.weight": torch.ones(4096, 4096, dtype=torch.bfloat16) for n in range(6)}
    base, adapter = bare_base(tmp_path, tensors), tmp_path / "adapter"
    bare_adapter(adapter, "layers.3.proj", torch.ones(64, 4096), torch.ones(4096, 64))
    (tmp_path / "merged").mkdir()
    peak, planned, model_bytes = measured(base, adapter, tmp_path / "merged")
    assert peak <= planned < 0.8 * model_bytes


def sparse_file(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """A safetensors file with a true header and a hole for its data."""
    plan = [TensorPlan(name, dtype, shape) for name, shape in shapes.items()]
    header = encode_header(plan, {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(tensor.nbytes for tensor in plan))


def sparse_llama(folder: Path, layers: int, hidden: int, intermediate: int, kv: int, vocabulary: int) -> None:
    """Headers of a Llama 3 in shards of two layers, and of an adapter of rank 64 on all its linear layers."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    shards = [{"model.embed_tokens.weight": (vocabulary, hidden)}, {"lm_head.weight": (vocabulary, hidden)}]
    pairs: dict[str, tuple[int, ...]] = {}
    for first in range(0, layers, 2):
        names = [f"model.layers.{layer}.{name}" for layer in (first, first + 1) for name in shapes]
        shards.append({f"{name}.weight": shapes[".".join(name.split(".")[3:])] for name in names})
        for name in names:
            outputs, inputs = shapes[".".join(name.split(".")[3:])]
            pairs[f"base_model.model.{name}.lora_A.weight"] = (64, inputs)
            pairs[f"base_model.model.{name}.lora_B.weight"] = (outputs, 64)
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        sparse_file(base / name, tensors, "BF16")
        weight_map |= dict.fromkeys(tensors, name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    sparse_file(adapter / "adapter_model.safetensors", pairs, "F32")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 64, "lora_alpha": 64}))


def test_a_70b_model_is_planned_from_headers_and_takes_what_a_small_one_takes(tmp_path: Path) -> None:
    sparse_llama(tmp_path / "70b", layers=80, hidden=8192, intermediate=28672, kv=1024, vocabulary=128256)
    sparse_llama(tmp_path / "8b", layers=32, hidden=4096, intermediate=14336, kv=1024, vocabulary=128256)
    peaks, planned, sizes = zip(
        *(measured(tmp_path / size / "base", tmp_path / size / "adapter", tmp_path / "none") for size in ("70b", "8b")),
        strict=True,
    )
    assert 140e9 < sizes[0] < 142e9
    assert peaks[0] < planned[0] < 300 << 20
    assert planned[0] < 1.5 * planned[1]
