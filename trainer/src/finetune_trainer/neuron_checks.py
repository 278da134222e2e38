"""The checks of neuron_rules.py at the start of compile and train: against stage.json, the model's own config.json, the
pod's environment and what is installed.

Called by stage.py in every pod of the two, before torch is loaded. The operator has refused all of it before, unless
another version did so or the pod's environment and image are not the operator's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from finetune_trainer import contract
from finetune_trainer.contract import StageConfig
from finetune_trainer.errors import CorruptArtifact
from finetune_trainer.model_files import CONFIG_NAME, read_model_config
from finetune_trainer.neuron_rules import (
    NeuronNode,
    check_caches,
    check_cores,
    check_groups,
    check_model,
    neuron_model,
)
from finetune_trainer.neuron_stack import find_stack
from finetune_trainer.spec_checks import Problem

ADAPTER_NAME = "adapter_config.json"


def check_neuron_stage(config: StageConfig, environment: Mapping[str, str]) -> tuple[Problem, ...]:
    """Everything that speaks against the stage; empty where stage.json's accelerator is not neuron.

    `environment` is the process's. CorruptArtifact where the base model's config.json is missing or lacks a size.
    """
    accelerator = config.spec.get("accelerator") or {}
    if accelerator.get("type") != "neuron":
        return ()
    model = config.input_path(contract.MODEL_INPUT)
    instance_type = str(accelerator.get("instanceType", ""))
    cores = environment.get("NEURON_RT_NUM_CORES", "")
    node = NeuronNode(instance_type, int(cores) if cores.isdigit() else 0)
    problems: list[Problem] = []
    if node.cores:
        problems.extend(check_cores(config.parallelism, node))
        problems.extend(check_groups(config.parallelism, node))
    problems.extend(check_caches(environment, f"spec.stages.{config.stage}.env"))
    problems.extend(_installed_problems(instance_type))
    problems.extend(_adapter_problems(model))
    sizes = config.parallelism
    tp_size, pp_size = int(sizes["tensorParallelSize"]), int(sizes["pipelineParallelSize"])
    try:
        facts = neuron_model(read_model_config(model))
    except KeyError as error:
        raise CorruptArtifact(f"{model / CONFIG_NAME} has no {error.args[0]}, by which the model is split") from error
    problems.extend(check_model(config.spec["method"], tp_size, pp_size, facts, node))
    return tuple(problems)


def _adapter_problems(model: Path) -> Iterator[Problem]:
    """A base whose folder holds an adapter: the only way in which a training could start from one.

    transformers loads an adapter that lies beside a base's weights, and the vendor refuses to. One that was made with
    torch has an A for each of q, k and v, of which the vendor's own conversion takes the mean
    (optimum-neuron 0.4.5, models/training/transformations_utils.py:537 and 1104).
    """
    if (model / ADAPTER_NAME).exists():
        yield Problem(
            "spec.model.source",
            ADAPTER_NAME,
            f"the base model's folder holds an adapter ({ADAPTER_NAME}), and a training on Trainium cannot go on from "
            "one that torch made: merge it into its base (finetune-trainer merge-adapter) and give the merged model",
        )


def _installed_problems(instance_type: str) -> Iterator[Problem]:
    """An optimum-neuron that is not of the pair's row; nothing where it is not installed at all, as in a rehearsal."""
    row = find_stack(instance_type)
    if row is None or not row.optimum_neuron:
        return
    try:
        has = metadata.version("optimum-neuron")
    except metadata.PackageNotFoundError:
        return
    if has != row.optimum_neuron:
        yield Problem(
            "image",
            has,
            f"the image has optimum-neuron {has}, and every rule here was made from {row.optimum_neuron}: use the "
            f"image of this release (SDK {row.sdk})",
        )
