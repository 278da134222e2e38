"""What both arms of the benchmark run: a FineTuneJob of seven stages, and the very Jobs that the operator makes of it.

The floor's Jobs come out of the operator's own pure core (tests/simulated.py walks a job to its end), so both arms
create pod templates that are equal byte for byte. Only names, namespace and uid differ from chain to chain; they are
put in as text.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import fake_nodes
from simulated import Simulation

from finetune_operator.api import constants
from finetune_operator.config import read_config
from finetune_trainer import contract

STAGES = contract.STAGES
_PLACEHOLDER_UID = "00000000-0000-0000-0000-000000000000"
ENVIRONMENT = {
    "FINETUNE_TRAINER_IMAGE": "example.invalid/finetune-trainer:bench",
    "FINETUNE_FEATURE_GATES": "Neuron=true,Publish=true",
    "FINETUNE_HEALTH_PORT": "0",
}
"""Settings of the operator under test. The floor's Jobs are made with the same ones."""


def chain_name(index: int) -> str:
    """Name of a FineTuneJob, or of the floor's chain of Jobs; all of one length."""
    return f"chain-{index:05d}"


def finetune_job(name: str, namespace: str) -> dict[str, Any]:
    """A FineTuneJob that has all seven stages and whose pods run on fake nodes."""
    return {
        "apiVersion": "finetune-operator.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": {"source": "hf://meta-llama/Meta-Llama-3-8B", "revision": "main"},
            "dataset": {"source": "hf://databricks/databricks-dolly-15k", "format": "dolly", "maxLength": 2048},
            "method": {"type": "lora", "lora": {"rank": 16, "alpha": 16, "targetModules": ["q_proj", "v_proj"]}},
            "training": {
                "maxSteps": 1200,
                "learningRate": 2e-5,
                "microBatchSize": 1,
                "gradientAccumulationSteps": 3,
                "checkpointEverySteps": 400,
            },
            "parallelism": {"tensorParallelSize": 8},
            "accelerator": {"type": "neuron", "instanceType": fake_nodes.INSTANCE_TYPE, "nodes": 1},
            "workspace": {"claimName": fake_nodes.CLAIM},
            "compile": {"enabled": True},
            "evaluate": {"prompts": [{"text": "Who are the Smiths?"}]},
            "publish": {"s3": {"uri": "s3://models/bench"}, "serviceAccountName": fake_nodes.PUBLISHER},
            "stages": fake_nodes.stage_overrides(STAGES),
        },
    }


class Chain:
    """The Jobs of one chain after another, each as the JSON text that is posted."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def job(self, index: int, name: str, uid: str) -> bytes:
        """The Job of stage `index` of the chain `name`, whose label job-uid is `uid`."""
        return self._texts[index].replace(_PLACEHOLDER_UID, uid).replace(chain_name(0), name).encode()


@dataclass
class _Recorder(Simulation):
    """A simulation that keeps the Jobs as they were asked for, before anything happened to them."""

    asked_for: list[dict[str, Any]] = field(default_factory=list)

    def _create(self, manifest: dict[str, Any]) -> None:
        if manifest["kind"] == "Job":
            self.asked_for.append(copy.deepcopy(manifest))
        super()._create(manifest)


def capture(namespace: str, environment: Mapping[str, str] = ENVIRONMENT) -> Chain:
    """What the operator would create for finetune_job, without ownerReferences: the floor has no FineTuneJob."""
    body = finetune_job(chain_name(0), namespace)
    body["metadata"] |= {"uid": _PLACEHOLDER_UID, "generation": 1, "creationTimestamp": "2026-01-02T03:04:05Z"}
    recorder = _Recorder(body=body, settings=read_config(environment).settings())
    for stage in STAGES:
        recorder.settle()
        recorder.run_stage(stage)
    made = [manifest["metadata"]["labels"][constants.LABEL_STAGE] for manifest in recorder.asked_for]
    if made != list(STAGES):
        raise RuntimeError(f"the operator's core asked for Jobs of {made}, expected one for each of {list(STAGES)}")
    for manifest in recorder.asked_for:
        del manifest["metadata"]["ownerReferences"]
    return Chain([json.dumps(manifest) for manifest in recorder.asked_for])
