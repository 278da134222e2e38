"""The arguments of train, parsed from stage.json by the launcher and by each worker. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_trainer import contract
from finetune_trainer.contract import ContractError, StageConfig

PRECISIONS = ("fp32", "bf16")
NEURON = "neuron"
STRATEGIES = ("ddp", "fsdp")

_NOT_OF_THE_RESULT = frozenset(
    {
        "checkpointEverySteps",
        "keepCheckpoints",
        "logEverySteps",
        "microBatchSize",
        "gradientAccumulationSteps",
        "gradientCheckpointing",
        "evaluateEverySteps",
    }
)
"""Fields of spec.training in which a checkpoint may differ from the job that resumes it."""


@dataclass(frozen=True)
class TrainArgs:
    """What train reads of stage.json. Batch sizes count rows, `warmup_steps` and the like optimizer steps.

    `accelerator` is neuron, or None for CPU and CUDA, where the process finds what it has; `instance_type` is neuron's.
    """

    method: Mapping[str, Any]
    learning_rate: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    max_gradient_norm: float
    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    precision: str
    gradient_checkpointing: bool
    seed: int
    checkpoint_every_steps: int
    keep_checkpoints: int
    log_every_steps: int
    num_nodes: int
    procs_per_node: int
    data_parallel_size: int
    strategy: str
    identity: Mapping[str, Any]
    evaluate_every_steps: int | None = None
    accelerator: str | None = None
    instance_type: str | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.procs_per_node


def parse_args(config: StageConfig) -> TrainArgs:
    """TrainArgs of `config`; ContractError names the field, its value and what is expected."""
    training, method = _object(config.spec, "spec", "training"), _object(config.spec, "spec", "method")
    parallelism = config.parallelism
    accelerator = _object(config.spec, "spec", "accelerator") if "accelerator" in config.spec else {}

    def size(name: str, default: int = 1) -> int:
        return int(_number(parallelism, "parallelism", name, default, minimum=1, whole=True))

    def number(name: str, default: float, minimum: float = 0) -> float:
        return _number(training, "spec.training", name, default, minimum=minimum)

    def count(name: str, default: int, minimum: int = 0) -> int:
        return int(_number(training, "spec.training", name, default, minimum=minimum, whole=True))

    args = TrainArgs(
        method=method,
        learning_rate=number("learningRate", 0),
        schedule=_choice(training, "spec.training", "learningRateSchedule", ("linear", "cosine", "constant"), "linear"),
        warmup_steps=count("warmupSteps", 0),
        weight_decay=number("weightDecay", 0),
        max_gradient_norm=number("maxGradNorm", 1.0),
        micro_batch_size=size("microBatchSize"),
        gradient_accumulation_steps=size("gradientAccumulationSteps"),
        global_batch_size=size("globalBatchSize"),
        precision=_choice(training, "spec.training", "precision", PRECISIONS, "bf16"),
        gradient_checkpointing=_flag(training, "spec.training", "gradientCheckpointing"),
        seed=count("seed", 0),
        checkpoint_every_steps=count("checkpointEverySteps", 100, minimum=1),
        keep_checkpoints=count("keepCheckpoints", 2, minimum=1),
        log_every_steps=count("logEverySteps", 1, minimum=1),
        num_nodes=size("numNodes"),
        procs_per_node=size("procsPerNode"),
        data_parallel_size=size("dataParallelSize"),
        strategy=_choice(parallelism, "parallelism", "strategy", STRATEGIES, "ddp"),
        identity={
            "data": config.input(contract.PREPARE).digest,
            "baseModel": config.input(contract.MODEL_INPUT).digest,
            "method": dict(method),
            "training": {key: value for key, value in training.items() if key not in _NOT_OF_THE_RESULT},
            "globalBatchSize": size("globalBatchSize"),
        },
        evaluate_every_steps=count("evaluateEverySteps", 1, minimum=1) if "evaluateEverySteps" in training else None,
        accelerator=_choice(accelerator, "spec.accelerator", "type", (NEURON,), NEURON) if accelerator else None,
        instance_type=accelerator.get("instanceType"),
        tensor_parallel_size=size("tensorParallelSize"),
        pipeline_parallel_size=size("pipelineParallelSize"),
    )
    _check_sizes(args, parallelism)
    return args


def _check_sizes(args: TrainArgs, parallelism: Mapping[str, Any]) -> None:
    if args.accelerator != NEURON:
        for name in ("tensorParallelSize", "pipelineParallelSize"):
            if parallelism.get(name, 1) != 1:
                raise ContractError(
                    f"parallelism.{name} is {parallelism[name]}: on CPU and CUDA this trainer has data parallelism only"
                )
    elif not args.instance_type:
        raise ContractError("spec.accelerator.instanceType must be set with type neuron")
    ranks = args.tensor_parallel_size * args.pipeline_parallel_size * args.data_parallel_size
    if ranks != args.world_size:
        raise ContractError(
            f"parallelism: tensorParallelSize {args.tensor_parallel_size} x pipelineParallelSize "
            f"{args.pipeline_parallel_size} x dataParallelSize {args.data_parallel_size} must be numNodes "
            f"{args.num_nodes} x procsPerNode {args.procs_per_node}"
        )
    product = args.micro_batch_size * args.gradient_accumulation_steps * args.data_parallel_size
    if args.global_batch_size != product:
        raise ContractError(
            f"parallelism: globalBatchSize {args.global_batch_size} must be microBatchSize {args.micro_batch_size} x "
            f"gradientAccumulationSteps {args.gradient_accumulation_steps} x dataParallelSize {args.data_parallel_size}"
        )


def _object(value: Mapping[str, Any], where: str, name: str) -> Mapping[str, Any]:
    found = value.get(name)
    if not isinstance(found, Mapping):
        raise ContractError(f"{where}.{name} must be an object, got {found!r}")
    return found


def _number(
    value: Mapping[str, Any], where: str, name: str, default: float, *, minimum: float, whole: bool = False
) -> float:
    found = value.get(name, default)
    kinds = (int,) if whole else (int, float)
    if isinstance(found, bool) or not isinstance(found, kinds) or not found >= minimum:
        kind = "a whole number" if whole else "a number"
        raise ContractError(f"{where}.{name} must be {kind} of at least {minimum:g}, got {found!r}")
    return found


def _choice(value: Mapping[str, Any], where: str, name: str, choices: tuple[str, ...], default: str) -> str:
    found = value.get(name, default)
    if found not in choices:
        raise ContractError(f"{where}.{name} must be one of {', '.join(choices)}, got {found!r}")
    return str(found)


def _flag(value: Mapping[str, Any], where: str, name: str) -> bool:
    found = value.get(name, False)
    if not isinstance(found, bool):
        raise ContractError(f"{where}.{name} must be true or false, got {found!r}")
    return found
