"""Every method through train, consolidate and merge on three families of models; quantized bases killed and resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from train_runs import Ranks, outputs, train_config
from transformers import GPT2Config, GPT2LMHeadModel

from finetune_trainer.artifacts import artifact_ref
from finetune_trainer.checkpoints import read_checkpoint
from finetune_trainer.contract import ArtifactRef, ExitCode, StageConfig
from finetune_trainer.methods import load_trainable_model, trainable_parameters
from finetune_trainer.model_loading import load_causal_model
from finetune_trainer.stages import consolidate, merge

pytestmark = pytest.mark.timeout(300)  # the first test pays for the imports of a process that ranks are forked from

TRAINING = {"maxSteps": 9, "checkpointEverySteps": 3, "logEverySteps": 1, "learningRate": 0.03, "warmupSteps": 0}
FULL = {"type": "full", "quantization": "none"}


def lora(quantization: str = "none", **changes: Any) -> dict[str, Any]:
    settings = {"rank": 8, "alpha": 64, "dropout": 0.1, "targetModules": ["all-linear"], "variant": "standard"}
    return {"type": "lora", "quantization": quantization, "lora": {**settings, **changes}}


@pytest.fixture(scope="module")
def models(tiny_model: Path, tiny_model_module: Any, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    vocabulary = tiny_model_module.write_tiny_tokenizer(folder / "gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4)).save_pretrained(folder / "gpt2")
    bloom = tiny_model_module.write_tiny_bloom(folder / "bloom")
    return {"llama": tiny_model, "bloom": bloom, "gpt2": folder / "gpt2"}


def config_for(space: Path, model: Path, output: str, method: dict[str, Any], precision: str) -> StageConfig:
    training = {**TRAINING, "precision": precision}
    return train_config(space, model, packed=True, output=f"jobs/{output}", training=training, method=method)


def after(config: StageConfig, stage: str, inputs: Mapping[str, ArtifactRef]) -> Path:
    """Run a later stage of the same job; its artifact."""
    run = {"consolidate": consolidate.run, "merge": merge.run}[stage]
    given = {"model": config.inputs["model"], **inputs}
    later = replace(config, stage=stage, spec={"method": config.spec["method"]}, inputs=given, output=f"jobs/{stage}")
    run(later)
    return later.output_path


def logit_difference(one: Any, other: Any) -> float:
    """The largest difference of two models' logits, relative to the largest logit."""
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        expected, found = one.eval()(input_ids=tokens).logits, other.eval()(input_ids=tokens).logits
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("family", "method", "precision"),
    [
        pytest.param(
            "llama", lora(variant="dora", modulesToSave=["lm_head", "norm"]), "bf16", id="Llama, DoRA, a saved module"
        ),
        pytest.param("llama", lora("int8"), "bf16", id="Llama, int8"),
        pytest.param("llama", FULL, "bf16", id="Llama, full"),
        pytest.param("bloom", lora("nf4", variant="rslora"), "fp32", id="BLOOM, rsLoRA on nf4"),
        pytest.param("bloom", FULL, "fp32", id="BLOOM, full"),
        pytest.param("gpt2", lora("nf4", variant="dora"), "bf16", id="GPT-2, DoRA on nf4"),
    ],
)
def test_the_loss_falls_and_the_checkpoint_holds_what_trains_and_nothing_of_the_rest(
    ranks: Ranks, models: Mapping[str, Path], tmp_path: Path, family: str, method: dict[str, Any], precision: str
) -> None:
    config = config_for(tmp_path, models[family], "train", method, precision)
    (report,) = ranks.run(config, tmp_path / "out")
    assert report.exit_code == ExitCode.SUCCESS, outputs(tmp_path / "out")
    assert report.metrics["loss"] < report.metrics["firstLoss"] - 0.01
    assert "packed documents do not see each other" in outputs(tmp_path / "out")

    model = load_trainable_model(models[family], method, precision=precision, seed=0, device=torch.device("cpu"))
    expected = {name: tuple(parameter.shape) for name, parameter in trainable_parameters(model).items()}
    stored = read_checkpoint(config.output_path / "checkpoint")
    assert {name: tensor.shape for name, tensor in stored.parameters().items()} == expected
    assert {name for _, name in stored.tensors} == expected.keys()
    assert {tensor.dtype for tensor in stored.tensors.values()} == {"F32"}
    assert report.metrics["trainableParameters"] == sum(p.numel() for p in trainable_parameters(model).values())
    assert (config.output_path / "adapter_config.json").is_file() == (method["type"] == "lora")

    base = load_causal_model(models[family], dtype=torch.float32)
    consolidated = after(config, "consolidate", {"train": report.artifacts["train"]})
    if method["type"] == "full":
        assert logit_difference(base, load_causal_model(consolidated, dtype=torch.float32)) > 1e-2
        return
    merged = load_causal_model(
        after(config, "merge", {"consolidate": artifact_ref(tmp_path, consolidated)}), dtype=torch.float32
    )
    assert logit_difference(base, merged) > 1e-2
    assert logit_difference(PeftModel.from_pretrained(base, str(consolidated)), merged) < 1e-4


@pytest.mark.parametrize(("family", "quantization"), [("bloom", "int8"), ("llama", "nf4")])
def test_a_killed_run_on_a_quantized_base_ends_bit_for_bit_like_an_uninterrupted_one(
    ranks: Ranks, models: Mapping[str, Path], tmp_path: Path, family: str, quantization: str
) -> None:
    def config(output: str) -> StageConfig:
        return config_for(tmp_path, models[family], output, lora(quantization, variant="dora"), "bf16")

    (whole,) = ranks.run(config("whole"), tmp_path / "whole")
    ranks.run_killed(config("killed"), tmp_path / "killed", 1, "step:5")
    (resumed,) = ranks.run(replace(config("killed"), attempt=2), tmp_path / "killed")
    assert resumed.metrics["resumedFromStep"] == 3, outputs(tmp_path / "killed")
    assert resumed.artifacts["train"].digest == whole.artifacts["train"].digest


def test_another_method_is_told_from_the_one_that_wrote_the_checkpoint(
    ranks: Ranks, models: Mapping[str, Path], tmp_path: Path
) -> None:
    def config(quantization: str) -> StageConfig:
        return config_for(tmp_path, models["llama"], "train", lora(quantization), "fp32")

    ranks.run_killed(config("none"), tmp_path / "out", 1, "step:5")
    (report,) = ranks.run(config("nf4"), tmp_path / "out")
    assert (report.exit_code, report.reason) == (ExitCode.USER_ERROR, "CheckpointOfAnotherJob")
    assert 'method.quantization: the job has "nf4", the checkpoint "none"' in report.message
