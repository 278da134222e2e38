"""The checks at the start of compile and train, against files and environment as a pod has them."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import neuron_checks
from finetune_trainer.contract import ArtifactRef, StageConfig
from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.neuron_checks import check_neuron_stage
from finetune_trainer.neuron_environment import neuron_environment
from finetune_trainer.stage import check_config

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "num_hidden_layers": 32,
}
SIZES = {
    "numNodes": 1,
    "procsPerNode": 32,
    "worldSize": 32,
    "tensorParallelSize": 8,
    "pipelineParallelSize": 1,
    "dataParallelSize": 4,
}
MODEL = "finetune/models/m"
ENVIRONMENT = neuron_environment("ml.trn1.32xlarge", cores=32, has_efa=False, cache_path="/workspace/neuron-cache")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / MODEL
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def stage(workspace: Path, accelerator: dict[str, Any] | None = None, **sizes: int) -> StageConfig:
    spec: dict[str, Any] = {
        "method": {"type": "lora", "lora": {"rank": 16, "targetModules": ["q_proj", "v_proj"]}},
        "training": {"learningRate": 2.0e-5, "maxSteps": 10},
    }
    spec["accelerator"] = accelerator or {"type": "neuron", "instanceType": "ml.trn1.32xlarge"}
    reference = ArtifactRef(MODEL, "sha256:" + "0" * 64)
    return StageConfig(
        stage="train",
        image="i",
        spec=spec,
        output="",
        workspace=str(workspace),
        inputs={"model": reference},
        parallelism={**SIZES, **sizes},
    )


def fields(config: StageConfig, environment: dict[str, str] = ENVIRONMENT) -> dict[str, str]:
    return {problem.field: problem.message for problem in check_neuron_stage(config, environment)}


def test_the_walkthroughs_stage_is_sound(model: Path, tmp_path: Path) -> None:
    assert fields(stage(tmp_path)) == {}


def test_other_accelerators_are_not_looked_at(tmp_path: Path) -> None:
    assert fields(stage(tmp_path / "nowhere", {"type": "cpu"}, tensorParallelSize=7)) == {}
    cpu = StageConfig(stage="train", image="i", spec={"method": {}, "training": {}}, output="")
    assert fields(cpu) == {}


def test_everything_that_is_wrong_is_told_at_once(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text(json.dumps({**CONFIG, "model_type": "mistral"}))
    (model / "adapter_config.json").write_text("{}")
    environment = {**ENVIRONMENT, "NEURON_CC_FLAGS": "--cache_dir=/fsx/llama3.1"}
    found = check_neuron_stage(stage(tmp_path, dataParallelSize=1, tensorParallelSize=16), environment)
    assert {problem.field for problem in found} == {
        "parallelism",
        "spec.stages.train.env",
        "spec.model.source",
        "spec.method.lora.targetModules",
    }
    messages = " ".join(str(problem) for problem in found)
    words = ["16 of them idle", "'/fsx/llama3.1'", "holds an adapter", "merge-adapter", "mistral", "add k_proj"]
    assert [word for word in words if word not in messages] == []


def test_another_optimum_neuron_than_the_rules_were_made_from_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        PackageNotFoundError = metadata.PackageNotFoundError

        @staticmethod
        def version(_name: str) -> str:
            return "0.5.0"

    monkeypatch.setattr(neuron_checks, "metadata", Installed)
    assert "optimum-neuron 0.5.0" in fields(stage(tmp_path))["image"]


def test_a_model_without_a_size_is_a_damaged_artifact(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text(json.dumps({name: CONFIG[name] for name in CONFIG if name != "vocab_size"}))
    with pytest.raises(CorruptArtifact, match=r"config.json has no vocab_size"):
        check_neuron_stage(stage(tmp_path), ENVIRONMENT)


def test_the_stages_that_hold_a_chip_are_refused_at_their_start_and_no_other(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEURON_RT_NUM_CORES", raising=False)
    config = stage(tmp_path, dataParallelSize=2, tensorParallelSize=16)
    for name in ("compile", "train"):
        with pytest.raises(UserError, match=r"spec.method.lora.targetModules: at tensorParallelSize 16 .* add k_proj"):
            check_config(replace(config, stage=name))
    check_config(replace(config, stage="consolidate"))
