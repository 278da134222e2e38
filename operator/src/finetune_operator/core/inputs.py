"""What a job's stages are and what each one reads: stage.json, its digest, and the attempt that runs from it.

Called by stages.py, which decides when; desired.py makes the objects. Whatever is put into a StageConfig here and is
not volatile by the contract is part of the stage's digest: a change of it runs the stage again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.core import accelerators
from finetune_operator.core.names import child_name
from finetune_operator.core.parallelism import Parallelism, derive_parallelism
from finetune_operator.core.settings import Settings
from finetune_trainer import contract
from finetune_trainer.contract import ArtifactRef, StageConfig


@dataclass(frozen=True)
class Start:
    """An attempt that has to exist now. `config` is its stage.json, `completions` the number of its pods.

    `device_resource` is the name under which the cluster offers the accelerator's devices, None where it has none.
    """

    name: str
    number: int
    config: StageConfig
    digest: str
    completions: int
    default_image: str
    device_resource: str | None = None


GANGS = frozenset({contract.COMPILE, contract.TRAIN})
"""Stages that run on the accelerator's nodes, one pod a node. The others are one pod on CPUs."""


def stage_names(job: FineTuneJob) -> tuple[str, ...]:
    """The stages shown for a job, in order; those that its spec switches off are among them, as skipped."""
    left_out = set()
    if job.spec.accelerator.type != "neuron":
        left_out.add(contract.COMPILE)
    if job.spec.publish is None:
        left_out.add(contract.PUBLISH)
    return tuple(stage for stage in contract.STAGES if stage not in left_out)


def is_skipped(job: FineTuneJob, stage: str) -> bool:
    """True when the spec does not ask for the stage."""
    if stage == contract.COMPILE:
        return job.spec.compile is not None and not job.spec.compile.enabled
    if stage == contract.MERGE:
        return not job.spec.merge.enabled or job.spec.method.type == "full"
    return stage == contract.EVALUATE and not job.spec.evaluate.enabled


def job_parallelism(job: FineTuneJob, settings: Settings) -> Parallelism:
    """How the job's training is spread; ParallelismError when the sizes do not divide."""
    spec = job.spec
    return derive_parallelism(
        num_nodes=spec.accelerator.nodes,
        procs_per_node=accelerators.of(job, settings.instance_types).procs_per_node,
        tp_size=spec.parallelism.tensor_parallel_size,
        pp_size=spec.parallelism.pipeline_parallel_size,
        micro_batch_size=spec.training.micro_batch_size,
        gradient_accumulation_steps=spec.training.gradient_accumulation_steps,
        strategy=spec.parallelism.strategy,
    )


def stage_completions(job: FineTuneJob, stage: str) -> int:
    """Number of pods of a stage's attempt."""
    return job.spec.accelerator.nodes if stage in GANGS else 1


def stage_spec(job: FineTuneJob, stage: str) -> dict[str, Any]:
    """The part of the spec that a stage reads, defaults filled in; a change of anything else leaves the stage alone."""
    spec = job.spec.plain
    if stage == contract.PREPARE:
        length = {key: spec["training"][key] for key in ("maxSteps", "epochs", "seed") if key in spec["training"]}
        return {"model": spec["model"], "dataset": spec["dataset"], "training": length}
    if stage in GANGS:
        return {"method": spec["method"], "training": spec["training"], **_chips(job)}
    if stage == contract.CONSOLIDATE:
        # After full this stage writes what merge writes after lora.
        return {"method": spec["method"]} | ({"merge": spec["merge"]} if job.spec.method.type == "full" else {})
    if stage == contract.MERGE:
        return {"method": spec["method"], "merge": spec["merge"]}
    if stage == contract.EVALUATE:
        # The gate is judged by the operator from the report: another threshold measures nothing anew.
        return {"evaluate": {key: value for key, value in spec["evaluate"].items() if key != "gate"}}
    if stage == contract.PUBLISH:
        return {"publish": spec["publish"]}
    raise KeyError(stage)


def _chips(job: FineTuneJob) -> dict[str, Any]:
    """spec.accelerator for Neuron: a graph is compiled for one family of chips, and what a rank has depends on it.

    Nothing on CPU and CUDA, where the process finds its device and the result does not depend on it.
    """
    accelerator = job.spec.accelerator
    if accelerator.type != "neuron":
        return {}
    return {"accelerator": {"type": accelerator.type, "instanceType": accelerator.instance_type}}


_INPUTS: Mapping[str, Sequence[str]] = {
    contract.PREPARE: (),
    contract.COMPILE: (contract.MODEL_INPUT, contract.PREPARE),
    contract.TRAIN: (contract.MODEL_INPUT, contract.PREPARE, contract.COMPILE),
    contract.CONSOLIDATE: (contract.MODEL_INPUT, contract.TRAIN),
    contract.MERGE: (contract.MODEL_INPUT, contract.CONSOLIDATE),
    contract.EVALUATE: (contract.MODEL_INPUT, contract.PREPARE, contract.CONSOLIDATE, contract.MERGE),
    contract.PUBLISH: (contract.CONSOLIDATE, contract.MERGE, contract.EVALUATE),
}
"""Artifacts that a stage reads, each where it is there: evaluate reads merge's only where merge ran.

train reads of compile's only that it is there, and its digest leaves it out (contract.py).
"""


def stage_config(
    job: FineTuneJob, stage: str, artifacts: Mapping[str, ArtifactRef], image: str, settings: Settings
) -> tuple[StageConfig, str]:
    """stage.json without its volatile fields, and its digest."""
    parallelism: Mapping[str, int | str] = {}
    if stage == contract.PREPARE:
        parallelism = {"globalBatchSize": job_parallelism(job, settings).global_batch_size}
    elif stage in GANGS:
        parallelism = job_parallelism(job, settings).as_json()
    inputs = {name: artifacts[name] for name in _INPUTS[stage] if name in artifacts}
    config = StageConfig(
        stage=stage, image=image, spec=stage_spec(job, stage), output="", inputs=inputs, parallelism=parallelism
    )
    return config, contract.stage_digest(config)


def start_attempt(
    job: FineTuneJob,
    stage: str,
    number: int,
    config: StageConfig,
    digest: str,
    default_image: str,
    settings: Settings,
    device_resource: str | None = None,
) -> Start:
    """The attempt with its volatile fields filled in."""
    name = child_name(job.name, stage, digest, number)
    completions = stage_completions(job, stage)
    secrets = {}
    if stage == contract.PREPARE:
        secrets = {key: f"{contract.SECRETS_PATH}/{key}" for key in secret_references(job)}
    progress: Mapping[str, str] = {}
    if settings.progress is not None:
        progress = {
            "url": settings.progress.url,
            "tokenPath": f"{contract.PROGRESS_PATH}/token",
            "caPath": f"{contract.PROGRESS_PATH}/ca.crt",
        }
    whole = StageConfig(
        stage=stage,
        image=config.image,
        spec=config.spec,
        inputs=config.inputs,
        parallelism=config.parallelism,
        output=contract.stage_output(job.namespace, job.name, stage, digest),
        job={"namespace": job.namespace, "name": job.name, "uid": job.uid},
        attempt=number,
        workspace=contract.WORKSPACE_PATH,
        secrets=secrets,
        rendezvous=f"{name}-0.{name}:{contract.RENDEZVOUS_PORT}" if completions > 1 else "",
        progress=progress,
    )
    return Start(
        name=name,
        number=number,
        config=whole,
        digest=digest,
        completions=completions,
        default_image=default_image,
        device_resource=device_resource if stage in GANGS else None,
    )


def secret_references(job: FineTuneJob) -> dict[str, tuple[str, str]]:
    """Secrets that prepare reads: key of stage.json's `secrets` -> (Secret's name, key in it)."""
    references = {
        contract.MODEL_TOKEN_SECRET: job.spec.model.token_secret_ref,
        contract.DATASET_TOKEN_SECRET: job.spec.dataset.token_secret_ref,
    }
    return {key: (ref.name, ref.key) for key, ref in references.items() if ref is not None}
