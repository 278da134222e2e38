"""Batch and parallelism arithmetic: exact, or refused with the numbers. No torch.

Called by stages.py. world_size = num_nodes * procs_per_node = tp_size * pp_size * dp_size, and
global_batch_size = micro_batch_size * gradient_accumulation_steps * dp_size (samples).
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_trainer.spec_rules import MAX_SPLIT, nearest_sizes

MAX_NODES = 1024
"""Largest number that spec.accelerator.nodes takes."""


class ParallelismError(ValueError):
    """The sizes do not divide; the message has all of them and names the fields to change."""


@dataclass(frozen=True)
class Parallelism:
    """How a training job is spread. Sizes are counts of processes, batch sizes are counts of samples.

    `strategy` is what each of the dp_size ranks holds: ddp a whole copy, fsdp a share.
    """

    num_nodes: int
    procs_per_node: int
    world_size: int
    tp_size: int
    pp_size: int
    dp_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    strategy: str = "ddp"

    def as_json(self) -> dict[str, int | str]:
        """The `parallelism` of the train stage's stage.json."""
        return {
            "numNodes": self.num_nodes,
            "procsPerNode": self.procs_per_node,
            "worldSize": self.world_size,
            "tensorParallelSize": self.tp_size,
            "pipelineParallelSize": self.pp_size,
            "dataParallelSize": self.dp_size,
            "microBatchSize": self.micro_batch_size,
            "gradientAccumulationSteps": self.gradient_accumulation_steps,
            "globalBatchSize": self.global_batch_size,
            "strategy": self.strategy,
        }


def derive_parallelism(
    *,
    num_nodes: int,
    procs_per_node: int,
    tp_size: int,
    pp_size: int,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    strategy: str = "ddp",
) -> Parallelism:
    """The whole arrangement from its free sizes; ParallelismError when the world size is no multiple of tp * pp."""
    world_size = num_nodes * procs_per_node
    dp_size, rest = divmod(world_size, tp_size * pp_size)
    if rest or dp_size < 1:
        raise ParallelismError(
            f"spec.parallelism: {num_nodes} nodes with {procs_per_node} processes each are {world_size} processes, "
            f"no multiple of tensorParallelSize {tp_size} * pipelineParallelSize {pp_size} = {tp_size * pp_size}: "
            f"change spec.accelerator.nodes or the two sizes{_nearest(world_size, procs_per_node, tp_size, pp_size)}"
        )
    return Parallelism(
        num_nodes=num_nodes,
        procs_per_node=procs_per_node,
        world_size=world_size,
        tp_size=tp_size,
        pp_size=pp_size,
        dp_size=dp_size,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        global_batch_size=micro_batch_size * gradient_accumulation_steps * dp_size,
        strategy=strategy,
    )


def _nearest(world_size: int, procs_per_node: int, tp_size: int, pp_size: int) -> str:
    """The sizes next to those asked for with which it comes out even, as the end of a sentence."""
    nodes = range(1, MAX_NODES + 1)
    choices = (
        (
            "tensorParallelSize",
            tp_size,
            [size for size in range(1, MAX_SPLIT + 1) if world_size % (size * pp_size) == 0],
        ),
        (
            "pipelineParallelSize",
            pp_size,
            [size for size in range(1, MAX_SPLIT + 1) if world_size % (tp_size * size) == 0],
        ),
        ("nodes", world_size // procs_per_node, [n for n in nodes if n * procs_per_node % (tp_size * pp_size) == 0]),
    )
    near = [(name, nearest_sizes(sizes, wanted)) for name, wanted, sizes in choices]
    told = [f"{name} {' or '.join(map(str, sizes))}" for name, sizes in near if sizes]
    return f", such as {', or '.join(told)}" if told else ""
