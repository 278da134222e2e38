"""What a job will take and what it took: the plan of spec.dryRun, and the cost.

Called by surroundings.py and reconcile.py. derive_plan describes the Jobs that desired.py would make, in its very
manifests, and adds the arithmetic of memory.py, the training's time and its price. Pure, and nothing of it decides what
runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune_operator.api import constants
from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.api.status import (
    Cost,
    MemoryParts,
    PlanCost,
    PlanEstimate,
    PlannedStage,
    PlanStatus,
)
from finetune_operator.core.accelerators.instances import InstanceType
from finetune_operator.core.accelerators.whole_node import DEVICE_STAGES
from finetune_operator.core.failure import Waiting
from finetune_operator.core.memory import GIB, MemoryEstimate, estimate_memory, trainable_parameters
from finetune_operator.core.model_shapes import ModelShape
from finetune_operator.core.observed import AttemptKey
from finetune_operator.core.parallelism import Parallelism
from finetune_operator.core.records import Outcome
from finetune_operator.core.settings import Settings
from finetune_trainer import contract
from finetune_trainer.spec_rules import FLASH_TOKENS

UTILISATION = 0.35
"""Share of the devices' bf16 peak that training is supposed to reach (model FLOPs utilisation; Chowdhery et al. 2022,
"PaLM", appendix B). 0.25 to 0.5 is what tuned runs publish, and a small model or batch reaches less."""

Manifest = Mapping[str, Any]


def derive_plan(
    job: FineTuneJob,
    settings: Settings,
    jobs: Mapping[str, Manifest],
    parallelism: Parallelism,
    shape: ModelShape | None,
    instance: InstanceType | None,
    *,
    total_steps: int | None = None,
    refused: Waiting | None = None,
    doubts: Sequence[str] = (),
    waiting: Waiting | None = None,
    under_way: str | None = None,
    first_is_named: bool = True,
    pod_memory_bytes: int | None = None,
) -> PlanStatus:
    """The plan of a job.

    `jobs` has the batch/v1 Job of each stage that is still to run, in order; `first_is_named` says whether the name of
    the first one is its final one, as that of the others never is. `total_steps` is prepare's count where it is known;
    without it spec.training.maxSteps is. `refused` is why the job would not be started, `waiting` what its first stage
    would wait for, `doubts` are spec_doubts: all end up in the message. `under_way` is a stage that runs all the same.
    """
    steps = total_steps if total_steps is not None else job.spec.training.max_steps
    memory = None if shape is None else estimate_memory(job.spec, parallelism, shape)
    hours, why_not = None, "trainHours: no training is left to start."
    if contract.TRAIN in jobs:
        hours, why_not = _train_hours(job, parallelism, shape, instance, steps)
    price = None if instance is None else instance.price_per_hour
    cost = None
    if hours is not None and price is not None:
        amount = round(hours * parallelism.num_nodes * price, 2)
        cost = PlanCost(amount=amount, currency=settings.currency)
    return PlanStatus(
        message=_message(jobs, refused, doubts, waiting, under_way),
        world_size=parallelism.world_size,
        data_parallel_size=parallelism.dp_size,
        global_batch_size=parallelism.global_batch_size,
        trainable_parameters=None if shape is None else trainable_parameters(job.spec, shape),
        stages=tuple(
            _planned(job, stage, manifest, instance, is_named=first_is_named and stage == next(iter(jobs)))
            for stage, manifest in jobs.items()
        ),
        estimate=PlanEstimate(
            memory_gib_per_device=None if memory is None else _rounded(memory.total / GIB),
            device_memory_gib=_device_memory(job, parallelism, instance, pod_memory_bytes),
            parts=None if memory is None else _parts(memory),
            train_hours=None if hours is None else _rounded(hours),
            assumptions=_assumptions(job, memory, hours, why_not, price),
        ),
        cost=cost,
    )


def train_flops(job: FineTuneJob, parallelism: Parallelism, shape: ModelShape, steps: int) -> float:
    """Floating-point operations of the whole training.

    Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1: 2 a parameter and token forward, and
    backward 2 for the gradients of the inputs and 2 for those of the weights. Frozen weights have none of the last, so
    an adapter costs 4 for each parameter of the base, and 6 for each of its own. Attention scores are left out; a row
    is counted at its full length, padding too.
    """
    tokens = float(steps) * parallelism.global_batch_size * job.spec.dataset.max_length
    if job.spec.method.type == "full":
        return 6 * shape.parameters * tokens
    return (4 * shape.parameters + 6 * trainable_parameters(job.spec, shape)) * tokens


def derive_cost(outcomes: Mapping[AttemptKey, Outcome], instance: InstanceType | None, currency: str) -> Cost | None:
    """What the attempts that have ended took: the time of their pods, and the price of those on accelerator nodes.

    None before any pod had a node. Counted to whole seconds and cents. Only stages that have their nodes to themselves
    are priced: the pods of all others share nodes of which nobody says what they are. Where the instance type has no
    price there is no amount.
    """
    seconds = sum(outcome.pod_seconds or 0 for outcome in outcomes.values())
    if not seconds:
        return None
    if instance is None or instance.price_per_hour is None:
        return Cost(pod_seconds=seconds)
    priced = sum(outcome.pod_seconds or 0 for (stage, _, _), outcome in outcomes.items() if stage in DEVICE_STAGES)
    amount = round(priced / 3600 * instance.price_per_hour, 2)
    return Cost(pod_seconds=seconds, amount=amount, currency=currency)


def _planned(
    job: FineTuneJob, stage: str, manifest: Manifest, instance: InstanceType | None, *, is_named: bool
) -> PlannedStage:
    pod = manifest["spec"]["template"]["spec"]
    container = pod["containers"][0]
    resources = container.get("resources") or {}
    labels = manifest["metadata"].get("labels") or {}
    queue = labels.get(constants.LABEL_QUEUE) or (job.spec.queue.name if job.spec.queue is not None else None)
    return PlannedStage(
        name=stage,
        job_name=manifest["metadata"]["name"] if is_named else None,
        pods=manifest["spec"].get("parallelism") or 1,
        instance_type=instance.name if instance is not None and stage in DEVICE_STAGES else None,
        requests={name: str(value) for name, value in (resources.get("requests") or {}).items()},
        limits={name: str(value) for name, value in (resources.get("limits") or {}).items()},
        image=container["image"],
        queue=queue,
    )


def _train_hours(
    job: FineTuneJob,
    parallelism: Parallelism,
    shape: ModelShape | None,
    instance: InstanceType | None,
    steps: int | None,
) -> tuple[float | None, str]:
    """Hours of the training, or None and the sentence that says why they are not known."""
    if shape is None:
        return None, "trainHours: the model's sizes are not known before prepare has run."
    if steps is None:
        return None, "trainHours: spec.training.epochs is a number of steps only after prepare has counted the rows."
    if instance is None or not instance.bf16_tflops_per_device:
        return None, "trainHours: the speed of these nodes is not known."
    if job.spec.training.precision != "bf16":
        return None, "trainHours: the speed of these nodes is known for precision bf16 only."
    peak = parallelism.num_nodes * instance.devices * instance.bf16_tflops_per_device * 1e12
    return train_flops(job, parallelism, shape, steps) / (peak * UTILISATION) / 3600, ""


def _device_memory(
    job: FineTuneJob, parallelism: Parallelism, instance: InstanceType | None, pod_memory_bytes: int | None
) -> float | None:
    if instance is not None and instance.core_memory_gib > 0:
        return _rounded(instance.core_memory_gib)
    if job.spec.accelerator.type == "cpu" and pod_memory_bytes is not None:
        return _rounded(pod_memory_bytes / parallelism.procs_per_node / GIB)
    return None


def _parts(memory: MemoryEstimate) -> MemoryParts:
    return MemoryParts(**{name: _rounded(value) for name, value in memory.parts_gib().items()})


def _assumptions(
    job: FineTuneJob, memory: MemoryEstimate | None, hours: float | None, why_not: str, price: float | None
) -> str:
    said = []
    if memory is None:
        said.append("memoryGibPerDevice: the model's sizes are not known before prepare has run.")
    else:
        optimizer = "no sharding of the optimizer, fused attention"
        if job.spec.accelerator.type == "neuron":
            optimizer = (
                "the optimizer's float32 copies and moments shared by data parallel ranks (ZeRO-1), flash attention "
                f"for multiples of {FLASH_TOKENS} tokens without a mask"
            )
        said.append(
            f"Memory: no activation checkpointing, {optimizer}, every token of a row in the loss; the device's "
            "context, communication buffers and fragmentation come on top."
        )
    if hours is None:
        said.append(why_not)
    else:
        said.append(
            f"Time: {UTILISATION:.0%} of the devices' bf16 peak, without start, compilation, checkpoints and faults."
        )
        if price is None:
            said.append("cost: no pricePerHour is configured for the instance type.")
        else:
            said.append("Cost: the nodes of the train stage only.")
    return " ".join(said)


def _message(
    jobs: Mapping[str, Manifest],
    refused: Waiting | None,
    doubts: Sequence[str],
    waiting: Waiting | None,
    under_way: str | None,
) -> str:
    pods = {stage: manifest["spec"].get("parallelism") or 1 for stage, manifest in jobs.items()}
    shown = ", ".join(f"{stage} ({number} pod{'s' if number > 1 else ''})" for stage, number in pods.items())
    if under_way is not None:
        said = [f"Stage {under_way} goes on to its end, and no other is started: spec.dryRun is true."]
    else:
        said = ["Nothing is started: spec.dryRun is true."]
    if not jobs:
        return " ".join([*said, "No other stage is left to run."])
    said.append(f"The job would {'then ' if under_way is not None else ''}run {shown}.")
    if refused is not None:
        said.append(f"It would be refused ({refused.reason}): {refused.message}.")
    if waiting is not None:
        said.append(f"It would wait ({waiting.reason}): {waiting.message}")
    said.extend(doubts)
    if refused is None:
        said.append("Set spec.dryRun to false to start it.")
    return " ".join(said)


def _rounded(value: float) -> float:
    """Three significant digits: an estimate has no more."""
    return float(f"{value:.3g}")
