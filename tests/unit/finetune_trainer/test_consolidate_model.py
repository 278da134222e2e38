"""A whole model out of a checkpoint of every weight: the base's names, dtypes and layout; what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from finetune_trainer.artifacts import verify_artifact
from finetune_trainer.contract import ExitCode
from finetune_trainer.errors import CorruptArtifact, StageError, UserError
from finetune_trainer.stages import consolidate

TOKENS = torch.arange(3, 35).reshape(2, 16)
Parameters = dict[str, torch.Tensor]


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float()


def tuned(base: Path) -> Any:
    """The model of `base` in float32 with every weight moved: what a full training holds."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def load_shards(folder: Path) -> Parameters:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.fixture
def run(workspace: Path, tmp_path: Path, adapter_artifacts: ModuleType) -> Callable[..., Path]:
    """Consolidate a checkpoint of `parameters` over `base` with spec.merge `settings`; returns the output's folder."""

    def consolidated(base: Path, parameters: Parameters, world_size: int = 2, **settings: Any) -> Path:
        model = adapter_artifacts.copy_artifact(base, workspace / "model", "model")
        adapter_artifacts.write_checkpoint(tmp_path / "train" / "checkpoint", parameters, world_size)
        train = adapter_artifacts.copy_artifact(tmp_path / "train", workspace / "train", "train")
        spec = {"method": {"type": "full"}, "merge": settings}
        config = adapter_artifacts.stage_config(workspace, "consolidate", spec, [model, train], ["model", "train"])
        report = consolidate.run(config)
        assert report.exit_code == ExitCode.SUCCESS
        verify_artifact(config.output_path, report.artifacts["consolidate"].digest)
        output: Path = config.output_path
        return output

    return consolidated


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "several files"])
def test_the_model_is_what_was_trained_in_the_bases_layout(
    run: Callable[..., Path], tmp_path: Path, tiny_model_module: ModuleType, sharded: bool
) -> None:
    base = tiny_model_module.write_tiny_model(tmp_path / "base", sharded=sharded)
    model = tuned(base)
    output = run(base, dict(model.named_parameters()), world_size=3)
    assert sorted(path.name for path in output.glob("*.safetensors")) == sorted(
        path.name for path in base.glob("*.safetensors")
    )
    assert (output / "model.safetensors.index.json").exists() == sharded
    assert (logits(AutoModelForCausalLM.from_pretrained(output)) - logits(model)).abs().max() == 0
    assert AutoTokenizer.from_pretrained(output)("The garden").input_ids


def test_a_bfloat16_base_gets_values_that_are_rounded_once(
    run: Callable[..., Path], tmp_path: Path, tiny_model_module: ModuleType
) -> None:
    base = tiny_model_module.write_tiny_model(tmp_path / "base", dtype="bfloat16")
    model = tuned(base)
    found = load_shards(run(base, dict(model.named_parameters())))
    assert found.keys() == load_shards(base).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.detach().bfloat16()), name


def test_precision_and_shard_size_are_the_specs(run: Callable[..., Path], tmp_path: Path, tiny_model: Path) -> None:
    model = tuned(tiny_model)
    output = run(tiny_model, dict(model.named_parameters()), precision="fp16", maxShardSize="20KB")
    assert len(list(output.glob("model-*-of-*.safetensors"))) > 3
    assert {tensor.dtype for tensor in load_shards(output).values()} == {torch.float16}
    assert json.loads((output / "config.json").read_text())["dtype"] == "float16"
    assert (logits(AutoModelForCausalLM.from_pretrained(output)) - logits(model.half())).abs().max() < 1e-2


def test_a_bare_tied_base_with_buffers_keeps_its_own_names(run: Callable[..., Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)).save_pretrained(base)
    model = tuned(base)
    weights = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    # As old files have it: the mask of each layer, and the output layer beside the embedding that it is.
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 32, 32).tril(), "lm_head.weight": bare["wte.weight"].clone()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    output = run(base, dict(model.named_parameters()))
    found = load_shards(output)
    assert found.keys() == bare.keys()
    assert torch.equal(found["h.0.attn.bias"], bare["h.0.attn.bias"])
    assert torch.equal(found["lm_head.weight"], found["wte.weight"])
    assert torch.equal(found["wte.weight"], model.transformer.wte.weight)


def without(parameters: Parameters) -> Parameters:
    return {name: value for name, value in parameters.items() if "layers.1.mlp.up_proj" not in name}


def with_another(parameters: Parameters) -> Parameters:
    return parameters | {"model.layers.2.mlp.up_proj.weight": torch.zeros(2, 2)}


def with_other_shape(parameters: Parameters) -> Parameters:
    return parameters | {"model.norm.weight": torch.zeros(31)}


def with_nan(parameters: Parameters) -> Parameters:
    return parameters | {"model.norm.weight": torch.full((32,), float("nan"))}


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        pytest.param(without, CorruptArtifact, r"lacks parameters.*layers\.1\.mlp\.up_proj", id="a missing one"),
        pytest.param(with_another, CorruptArtifact, r"base model's files lack.*layers\.2", id="a foreign one"),
        pytest.param(with_other_shape, CorruptArtifact, r"norm.*\[31\].*\[32\]", id="another shape"),
        pytest.param(with_nan, UserError, r"model\.norm\.weight.*diverged", id="no number"),
    ],
)
def test_a_checkpoint_that_is_no_such_model_is_refused_by_name(
    run: Callable[..., Path],
    tiny_model: Path,
    workspace: Path,
    spoil: Callable[[Parameters], Parameters],
    kind: type[StageError],
    words: str,
) -> None:
    with pytest.raises(kind, match=words):
        run(tiny_model, spoil(dict(tuned(tiny_model).named_parameters())))
    assert not list((workspace / "out").glob("*"))
