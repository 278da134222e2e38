"""stage.json of compile and train on Trainium, with inputs as small as can be: what the tests of both share.

No model is loaded and no rank is torch's: tests/neuron_vendor has the tool and a program for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune_trainer import contract
from finetune_trainer.artifacts import artifact_ref, new_artifact
from finetune_trainer.contract import ArtifactRef, StageConfig

VENDOR = Path(__file__).with_name("neuron_vendor")
PROGRAM = "neuron_vendor.traced_program"
MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "_name_or_path": "hub/tiny",
}
DATA = {"rowLength": 128, "packing": "bestFit", "validationRows": 4, "maxSteps": 8}
METHOD = {
    "type": "lora",
    "quantization": "none",
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "targetModules": ["q_proj", "v_proj"], "variant": "standard"},
}
TRAINING = {
    "maxSteps": 8,
    "learningRate": 0.01,
    "learningRateSchedule": "cosine",
    "warmupSteps": 2,
    "weightDecay": 0.1,
    "maxGradNorm": 1.0,
    "microBatchSize": 1,
    "gradientAccumulationSteps": 3,
    "precision": "bf16",
    "seed": 11,
    "checkpointEverySteps": 4,
    "keepCheckpoints": 2,
    "logEverySteps": 1,
}
ACCELERATOR = {"type": "neuron", "instanceType": "ml.trn1.32xlarge"}


def _input(workspace: Path, path: str, name: str, value: Mapping[str, Any]) -> ArtifactRef:
    folder = workspace / path
    if not folder.exists():
        with new_artifact(folder, "input") as writer:
            writer.write(name, json.dumps(value).encode())
    return artifact_ref(workspace, folder)


def neuron_config(
    workspace: Path,
    *,
    job: str = "j",
    stage: str = contract.COMPILE,
    nodes: int = 1,
    procs: int = 2,
    training: Mapping[str, Any] | None = None,
    method: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    image: str = "trainer:test",
) -> StageConfig:
    """One of compile, or of train after it, whose inputs are made under `workspace`."""
    facts = {**MODEL, **(model or {})}, {**DATA, **(data or {})}
    names = [contract.digest_of(each)[7:15] for each in facts]
    config = StageConfig(
        stage=stage,
        image=image,
        spec={
            "method": {**METHOD, **(method or {})},
            "training": {**TRAINING, **(training or {})},
            "accelerator": ACCELERATOR,
        },
        output="",
        inputs={
            contract.MODEL_INPUT: _input(workspace, f"finetune/models/{names[0]}", "config.json", facts[0]),
            contract.PREPARE: _input(workspace, f"finetune/jobs/n/{job}/prepare-{names[1]}", "data.json", facts[1]),
        },
        parallelism={
            "numNodes": nodes,
            "procsPerNode": procs,
            "worldSize": nodes * procs,
            "tensorParallelSize": procs,
            "pipelineParallelSize": 1,
            "dataParallelSize": nodes,
            "microBatchSize": 1,
            "gradientAccumulationSteps": 3,
            "globalBatchSize": 3 * nodes,
            "strategy": "ddp",
        },
        job={"namespace": "n", "name": job, "uid": "0f0e"},
        workspace=str(workspace),
        rendezvous="" if nodes == 1 else f"{job}-0:29400",
    )
    return replace(config, output=contract.stage_output("n", job, stage, contract.stage_digest(config)))
