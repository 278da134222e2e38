"""`finetune-trainer consolidate-checkpoint` and the stage on the vendor's shards: what comes out computes the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from neuron_shards import share_lora_a, whole_shapes, write_checkpoint
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune_trainer.artifacts import new_artifact, read_manifest, verify_artifact
from finetune_trainer.consolidate_checkpoint import main
from finetune_trainer.contract import ExitCode, StageConfig
from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.stages import consolidate

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "neuron"


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(tokens).logits
    return result


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", ["lora-all-tp4-gqa", "lora-all-tp4-gqa-xser", "lora-qv-tp2-xser"])
def test_an_adapter_computes_what_its_ranks_computed(name: str, tmp_path: Path) -> None:
    fixture = FIXTURES / name
    output = tmp_path / "adapter"
    assert main([str(fixture / "checkpoint"), str(output), "--base", str(fixture / "base")]) == ExitCode.SUCCESS
    expected = load_file(fixture / "expected" / "forward.safetensors")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(fixture / "base"), str(output))
    assert (logits(model, expected["input_ids"]) - expected["logits"]).abs().max() < 1e-6
    found, wanted = load_all(output), load_file(fixture / "expected" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    config = json.loads((output / "adapter_config.json").read_text())
    assert config == json.loads((fixture / "checkpoint" / "adapter_default" / "adapter_config.json").read_text())
    targets = verify_artifact(output).metadata["targets"]
    assert targets["model.layers.1.self_attn.v_proj.weight"]["scale"] == 2.0


@pytest.mark.parametrize(
    ("name", "size"),
    [("full-tp4-gqa", "5GB"), ("full-tp4-gqa", "40KB"), ("full-zero1-tp2-dp2", "5GB")],
    ids=["one file", "several files", "bf16"],
)
def test_a_model_is_one_that_transformers_loads(
    name: str, size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixture = FIXTURES / name
    output = tmp_path / "model"
    arguments = [str(fixture / "checkpoint"), str(output), "--max-shard-size", size]
    if name == "full-zero1-tp2-dp2":
        # Its ranks trained apart: told of, and only taken where that is asked for.
        assert main(arguments) == ExitCode.USER_ERROR
        assert "DivergingCopies" in capsys.readouterr().err
        arguments.append("--first-copies")
    assert main(arguments) == ExitCode.SUCCESS
    said = capsys.readouterr().err
    assert said.startswith("warning: 5 tensors differ between ranks") if "--first-copies" in arguments else said == ""
    wanted = load_file(fixture / "expected" / "model.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(output, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[key]), key
    # The vendor's own writes every file of a larger model under one name, so that the last one alone is left.
    assert (len(list(output.glob("*.safetensors"))) > 1) == (size == "40KB")
    assert (output / "model.safetensors.index.json").exists() == (size == "40KB")
    assert model.config.dtype == next(iter(wanted.values())).dtype
    plain = tmp_path / "plain"
    shutil.copytree(output, plain, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(wanted, plain / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.arange(3, 35).reshape(2, 16)
    expected = logits(AutoModelForCausalLM.from_pretrained(plain, dtype="auto"), tokens)
    assert (logits(model, tokens) - expected).abs().max() == 0


def test_the_command_says_what_it_did_and_writes_over_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixture = FIXTURES / "lora-pp2-vendor-writer"
    command = [
        sys.executable,
        "-m",
        "finetune_trainer",
        "consolidate-checkpoint",
        fixture / "checkpoint",
        tmp_path / "out",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "the adapter 'default' on tensor parallel size 1, pipeline parallel size 2: 28 tensors" in ran.stdout
    assert "24 keys of other pipeline ranks' parameters left out" in ran.stdout
    assert "not held against a base model" in ran.stdout
    assert ran.stderr == ""
    assert main([str(fixture / "checkpoint"), str(tmp_path / "out")]) == ExitCode.USER_ERROR
    said = capsys.readouterr().err
    assert said.startswith("OutputExists: ")
    assert said.count("\n") == 1


def test_what_is_damaged_is_said_in_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint-7"
    shutil.copytree(FIXTURES / "full-tp4-gqa" / "checkpoint", folder)
    path = folder / "shards" / "model" / "dp_rank_00_tp_rank_02_pp_rank_00.pt"
    tensors = torch.load(path, weights_only=True)
    tensors["model.norm.weight"][0] += 1
    torch.save(tensors, path)
    assert main([str(folder), str(tmp_path / "out")]) == ExitCode.USER_ERROR
    assert "DivergingCopies: 'model.norm.weight' is not the same" in capsys.readouterr().err
    path.unlink()
    assert main([str(folder), str(tmp_path / "out")]) == ExitCode.CORRUPT_ARTIFACT
    assert "lacks dp_rank_00_tp_rank_02_pp_rank_00.pt" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-7"]


def test_another_base_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = FIXTURES / "lora-pp2-vendor-writer" / "base"
    for name, words in (("lora-all-tp4-gqa", "do not fit rank 4 and the base's"), ("full-tp4-gqa", "another model")):
        arguments = [str(FIXTURES / name / "checkpoint"), str(tmp_path / "out"), "--base", str(other)]
        assert main(arguments) == ExitCode.CORRUPT_ARTIFACT
        assert words in capsys.readouterr().err
    assert main([arguments[0], str(tmp_path / "out"), "--base", str(tmp_path / "no")]) == ExitCode.USER_ERROR
    assert "NoSuchFolder" in capsys.readouterr().err


def test_a_model_gets_from_the_base_what_the_checkpoint_lacks(
    tmp_path: Path, tiny_model: Path, adapter_artifacts: ModuleType
) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in whole_shapes(config).items()}
    write_checkpoint(tmp_path / "checkpoint-5", tensors, config, tp=2)
    base = adapter_artifacts.copy_artifact(tiny_model, tmp_path / "base", "model")
    (base / "LICENSE").write_text("free")
    assert main([str(tmp_path / "checkpoint-5"), str(tmp_path / "out"), "--base", str(base)]) == ExitCode.SUCCESS
    files = {entry.path for entry in read_manifest(tmp_path / "out").files}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "LICENSE"} <= files
    # Of the dtype that was trained, whatever the base's.
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    found = load_all(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("whose", ["the checkpoint's", "the base's"])
def test_the_tokenizer_comes_along_from_one_folder(tmp_path: Path, tiny_tokenizer: Path, whose: str) -> None:
    checkpoint, base = tmp_path / "checkpoint-3", tmp_path / "base"
    shutil.copytree(FIXTURES / "lora-qv-tp2-xser" / "checkpoint", checkpoint)
    shutil.copytree(FIXTURES / "lora-qv-tp2-xser" / "base", base)
    shutil.copytree(tiny_tokenizer, base, dirs_exist_ok=True)
    if whose == "the checkpoint's":
        (checkpoint / "tokenizer.json").write_text("{}")
    assert main([str(checkpoint), str(tmp_path / "out"), "--base", str(base)]) == ExitCode.SUCCESS
    files = {entry.path for entry in read_manifest(tmp_path / "out").files}
    if whose == "the checkpoint's":
        assert files == {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
        assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    else:
        assert {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} < files
    assert read_manifest(tmp_path / "out").metadata["step"] == 3


@pytest.fixture
def make_config(workspace: Path, tmp_path: Path, adapter_artifacts: ModuleType) -> Callable[..., StageConfig]:
    """stage.json of consolidate over a train artifact whose checkpoint is `write`'s, in the vendor's format."""

    def make(
        base: Path, write: Callable[[Path], Any], method: str, adapter_config: dict[str, Any] | None = None
    ) -> StageConfig:
        with new_artifact(tmp_path / "train" / "checkpoint", "checkpoint") as writer:
            write(writer.folder)
            # What the training loop writes beside the vendor's files.
            state = {
                "version": 1,
                "format": "neuronx-distributed",
                "step": 12,
                "worldSize": 8,
                "parameters": {},
                "layout": {"tensorParallelSize": 4, "pipelineParallelSize": 2, "dataParallelSize": 1},
            }
            (writer.folder / "state.json").write_text(json.dumps(state))
        if adapter_config is not None:
            (tmp_path / "train" / "adapter_config.json").write_text(json.dumps(adapter_config))
        train = adapter_artifacts.copy_artifact(tmp_path / "train", workspace / "train", "train")
        model = adapter_artifacts.copy_artifact(base, workspace / "model", "model")
        return adapter_artifacts.stage_config(
            workspace, "consolidate", {"method": {"type": method}}, [model, train], ["model", "train"]
        )

    return make


def zero_moments(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    return {
        kind: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()} for kind in ("exp_avg", "exp_avg_sq")
    }


def test_the_stage_makes_the_same_adapter_of_the_vendors_shards(
    make_config: Callable[..., StageConfig], tiny_model: Path
) -> None:
    model_config = json.loads((tiny_model / "config.json").read_text())
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": projections}
    tensors = share_lora_a({name: torch.randn(shape) for name, shape in whole_shapes(model_config, adapter).items()})
    config = make_config(
        tiny_model,
        lambda folder: write_checkpoint(
            folder, tensors, model_config, tp=4, pp=2, adapter_config=adapter, optimizer=zero_moments(tensors)
        ),
        "lora",
        adapter,
    )
    report = consolidate.run(config)
    assert report.exit_code == ExitCode.SUCCESS
    assert report.metrics["step"] == 12
    assert report.metrics["shards"] == 8
    assert report.metrics["targets"] == 14
    found = load_all(config.output_path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert consolidate.run(config) == report


def test_the_stage_makes_the_bases_model_of_the_vendors_shards(
    make_config: Callable[..., StageConfig], tiny_model: Path
) -> None:
    model_config = json.loads((tiny_model / "config.json").read_text())
    tensors = {name: torch.randn(shape) for name, shape in whole_shapes(model_config).items()}
    config = make_config(
        tiny_model,
        lambda folder: write_checkpoint(folder, tensors, model_config, tp=4, pp=2, optimizer=zero_moments(tensors)),
        "full",
    )
    assert consolidate.run(config).exit_code == ExitCode.SUCCESS
    found = load_all(config.output_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert AutoModelForCausalLM.from_pretrained(config.output_path).config.num_hidden_layers == 2


def test_the_stage_refuses_copies_that_went_apart(make_config: Callable[..., StageConfig], tiny_model: Path) -> None:
    model_config = json.loads((tiny_model / "config.json").read_text())
    tensors = {name: torch.randn(shape) for name, shape in whole_shapes(model_config).items()}

    def write(folder: Path) -> None:
        shards = write_checkpoint(
            folder, tensors, model_config, tp=4, pp=2, optimizer=zero_moments(tensors), xser=False
        )
        path = shards / "model" / "dp_rank_00_tp_rank_02_pp_rank_01.pt"
        local = torch.load(path, weights_only=True)
        local["model.layers.1.self_attn.qkv_proj.weight_k"][0, 0] += 1
        torch.save(local, path)

    config = make_config(tiny_model, write, "full")
    with pytest.raises(UserError, match="k_proj.weight' is not the same on tensor parallel ranks 0 and 2") as caught:
        consolidate.run(config)
    assert caught.value.reason == "DivergingCopies"
    assert not config.output_path.exists()


def test_the_stage_refuses_a_checkpoint_that_lacks_a_rank(
    make_config: Callable[..., StageConfig], tiny_model: Path
) -> None:
    model_config = json.loads((tiny_model / "config.json").read_text())
    tensors = {name: torch.randn(shape) for name, shape in whole_shapes(model_config).items()}

    def write(folder: Path) -> None:
        shards = write_checkpoint(
            folder, tensors, model_config, tp=4, pp=2, xser=False, optimizer=zero_moments(tensors)
        )
        (shards / "model" / "dp_rank_00_tp_rank_01_pp_rank_01.pt").unlink()

    config = make_config(tiny_model, write, "full")
    with pytest.raises(CorruptArtifact, match=r"lacks .*dp_rank_00_tp_rank_01_pp_rank_01.pt"):
        consolidate.run(config)
