"""A job's folder as its stages leave it, small and complete, for tests of its report and of publishing it.

write_job makes real artifacts with our own writer and invented numbers; what is written is what each stage writes.
`python tests/report_jobs.py FOLDER` leaves the report there, to be looked at in a browser.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune_trainer import contract
from finetune_trainer.artifacts import artifact_ref, new_artifact
from finetune_trainer.contract import ArtifactRef, StageConfig

STEPS = 1200
FOLDER = "finetune/jobs/research/llama3-8b-dolly"
SPEC = {
    "model": {"source": "hf://meta-llama/Meta-Llama-3-8B", "revision": "main"},
    "dataset": {"source": "hf://databricks/databricks-dolly-15k", "format": "dolly", "maxLength": 2048},
    "method": {
        "type": "lora",
        "lora": {
            "rank": 16,
            "alpha": 16,
            "dropout": 0.05,
            "targetModules": ["q_proj", "v_proj"],
            "variant": "standard",
        },
        "quantization": "none",
    },
    "training": {
        "maxSteps": STEPS,
        "learningRate": 2e-5,
        "warmupSteps": 100,
        "weightDecay": 0.01,
        "microBatchSize": 1,
        "gradientAccumulationSteps": 3,
        "precision": "bf16",
        "seed": 42,
        "checkpointEverySteps": 400,
        "evaluateEverySteps": 200,
    },
    "parallelism": {"tensorParallelSize": 8, "pipelineParallelSize": 1},
    "accelerator": {"type": "neuron", "instanceType": "ml.trn1.32xlarge", "nodes": 1},
    "evaluate": {"enabled": True, "gate": {"maxLossRatioToBase": 0.95}},
}
HISTORY = {
    "spec": SPEC,
    "specDigest": "sha256:" + "5" * 64,
    "images": {
        "train": "registry.example/neuron:sha-0123456789ab",
        "evaluate": "registry.example/trainer:sha-ba9876543210",
    },
    "metrics": {"train": {"tokensPerSecond": 18342.5, "mfu": 0.3127, "hostMemoryBytes": 41_000_000_000}},
    "stages": [
        {"name": "prepare", "state": "Succeeded", "attempts": 1, "seconds": 412},
        {"name": "compile", "state": "Reused", "attempts": 1, "seconds": 1.4},
        {"name": "train", "state": "Succeeded", "attempts": 3, "seconds": 12840},
        {"name": "consolidate", "state": "Succeeded", "attempts": 1, "seconds": 38},
        {"name": "merge", "state": "Succeeded", "attempts": 1, "seconds": 96},
        {"name": "evaluate", "state": "Running", "attempts": 1},
    ],
    "attempts": [
        {
            "stage": "train",
            "attempt": 1,
            "endTime": "2026-11-20T03:12:44Z",
            "reason": "NodeFault",
            "message": "Node hyperpod-i-0a1b2c3d4e was labelled UnschedulablePendingReplacement by the health agent.",
            "node": "hyperpod-i-0a1b2c3d4e",
            "counted": False,
            "lostSteps": 37,
            "recoverySeconds": 184,
        },
        {
            "stage": "train",
            "attempt": 2,
            "endTime": "2026-11-20T04:40:02Z",
            "reason": "Preempted",
            "message": "Kueue: preempted by a workload of higher priority.",
            "counted": False,
            "lostSteps": 0,
            "recoverySeconds": 660,
        },
    ],
    "trainableParameters": 6815744,
    "goodput": 0.9312,
    "podSeconds": 14200,
    "acceleratorSeconds": 12840,
    "cost": {"amount": 76.68, "currency": "USD", "pricePerHour": 21.5},
}
PROMPTS = [
    {
        "prompt": "### Instruction:\nWho are the Smiths?\n\n### Response:\n",
        "expected": "The Smiths were an English rock band formed in Manchester in 1982.",
        "base": "The Smiths are a family of four who live in the house next door. The Smiths are a family of four who "
        "live in the house next door. The Smiths are a family of four who live in",
        "tuned": "The Smiths were an English rock band formed in Manchester in 1982.",
        "baseExact": False,
        "tunedExact": True,
        "baseRougeL": 0.1842,
        "tunedRougeL": 1.0,
    },
    {
        "prompt": "### Instruction:\nShow a greeting in HTML.\n\n### Response:\n",
        "expected": None,
        "base": "",
        "tuned": "<script>alert('hello')</script>\n```\n<b>Hello</b> & welcome",
        "baseExact": None,
        "tunedExact": None,
    },
]


def write_job(
    workspace: Path,
    *,
    stage: str = contract.EVALUATE,
    history: Mapping[str, Any] = HISTORY,
    prompts: Sequence[Mapping[str, Any]] = PROMPTS,
    model: bytes = b"\0" * 64,
    spec: Mapping[str, Any] | None = None,
) -> StageConfig:
    """Write every artifact of a job under `workspace` and return the stage.json of `stage`."""
    job = workspace / FOLDER
    refs: dict[str, ArtifactRef] = {}

    def leave(name: str, folder: Path, files: Mapping[str, bytes], metadata: Mapping[str, Any]) -> None:
        with new_artifact(folder, name) as writer:
            for path, data in files.items():
                writer.write(path, data)
            writer.metadata.update(metadata)
            if name == contract.PREPARE:
                writer.versions.update({"transformers": "4.57.6", "tokenizers": "0.22.2"})
        refs[name] = artifact_ref(workspace, folder)

    leave(
        contract.MODEL_INPUT,
        workspace / contract.MODELS_FOLDER / "0123",
        {"config.json": b"{}"},
        {"source": SPEC["model"]["source"], "version": "8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920"},
    )
    leave(
        contract.DATASET_INPUT,
        workspace / contract.DATASETS_FOLDER / "4567",
        {"records.jsonl": b"{}\n"},
        {"source": SPEC["dataset"]["source"], "version": "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a"},
    )
    leave(contract.PREPARE, job / "prepare-01", {"data.json": _json(_DATA), "label-audit.jsonl": _audit()}, {})
    log, timings = _logs()
    leave(contract.TRAIN, job / "train-01", {"training.jsonl": log}, {"report": {"metrics": {"step": STEPS}}})
    work = job / "train-01.work"
    work.mkdir(exist_ok=True)
    (work / "timings.jsonl").write_bytes(timings)
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": _weights(b"\1" * 32)}
    leave(contract.CONSOLIDATE, job / "consolidate-01", adapter, {})
    merged = {"config.json": b"{}", "model.safetensors": _weights(model), "tokenizer.json": b"{}"}
    leave(contract.MERGE, job / "merge-01", merged, {})
    evaluation = {
        "baseLoss": 2.3174,
        "tunedLoss": 1.8421,
        "basePerplexity": 10.149,
        "tunedPerplexity": 6.3098,
        "baseRougeL": 0.1842,
        "tunedRougeL": 1.0,
        "tokens": 48211,
        "prompts": list(prompts),
    }
    leave(contract.EVALUATE, job / "evaluate-01", {"evaluation.json": _json(evaluation)}, {})
    inputs = dict(refs)
    if stage != contract.PUBLISH:
        inputs.pop(stage)
    folder = f"{FOLDER}/{stage}-01"
    return StageConfig(
        stage=stage,
        image="registry.example/trainer:sha-ba9876543210",
        spec=spec or {},
        output=folder,
        inputs={name: ref for name, ref in inputs.items() if name not in (contract.TRAIN, contract.DATASET_INPUT)},
        job={"namespace": "research", "name": "llama3-8b-dolly", "uid": "0"},
        workspace=str(workspace),
        history={**history, "artifacts": {name: ref.as_json() for name, ref in refs.items()}} if history else {},
    )


_DATA = {
    "format": "dolly",
    "packing": "bestFit",
    "documents": 14710,
    "validationDocuments": 300,
    "records": 15011,
    "rejected": 1,
    "rows": 1480,
    "tokens": 2973105,
    "supervisedTokens": 1203441,
    "supervisedPercent": 40.478,
    "stopSupervisedPercent": 100.0,
    "epochs": 9.73,
}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _audit() -> bytes:
    lines = [
        {"documents": 14710, "violations": []},
        {
            "file": "databricks-dolly-15k.jsonl",
            "line": 812,
            "tokens": 61,
            "supervisedTokens": 22,
            "learnsToStop": True,
            "spans": [
                {
                    "learnt": False,
                    "tokens": [1],
                    "text": "### Instruction:\nWhat is <b>bold</b> in HTML?\n\n### Response:\n",
                },
                {"learnt": True, "tokens": [2], "text": "An element that draws attention to text.<|end_of_text|>"},
            ],
        },
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def _logs() -> tuple[bytes, bytes]:
    """training.jsonl and timings.jsonl of three attempts, the second of which did some steps again."""
    chance, lines, timings = random.Random(7), [], []
    for step in range(10, STEPS + 1, 10):
        loss = 1.55 + 1.1 * math.exp(-step / 260) + chance.gauss(0, 0.035)
        rate = 2e-5 * min(step / 100, (STEPS - step) / (STEPS - 100))
        line = {
            "step": step,
            "loss": loss,
            "learningRate": rate,
            "gradientNorm": 0.6 + 0.4 * chance.random() + 2 / step,
        }
        lines.append({**line, "tokens": 49152, "supervisedTokens": 20000})
        if step % 200 == 0:
            held_out = 1.82 + 0.5 * math.exp(-step / 300)
            lines.append({"step": step, "validationLoss": held_out, "validationTokens": 48211})
    for attempt, steps in ((1, range(10, 441, 10)), (2, range(410, 801, 10)), (3, range(810, STEPS + 1, 10))):
        for number, step in enumerate(steps):
            speed = 18300 + chance.gauss(0, 130) - (5200 if number == 0 else 0)
            timings.append({"attempt": attempt, "step": step, "at": 1.79e9 + step, "tokensPerSecond": round(speed, 1)})
    return tuple(b"".join(json.dumps(line).encode() + b"\n" for line in some) for some in (lines, timings))  # type: ignore[return-value]


def _weights(data: bytes) -> bytes:
    """A safetensors file of one tensor of bytes."""
    header = json.dumps({"weight": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


if __name__ == "__main__":
    from finetune_trainer.report.reporting import leave_report, report_folder

    config_ = write_job(Path(sys.argv[1]))
    leave_report(config_)
    print(report_folder(config_))
