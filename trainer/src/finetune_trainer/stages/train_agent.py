"""torchrun for one pod of train: its elastic agent, in a process that has imported what the ranks need.

stages/train.py starts it with `python -m` and torchrun's own settings. torchrun starts each rank as a new interpreter,
so a pod of one rank imports torch twice, one after the other; here the agent imports everything once, meets the other
pods, and forks its ranks: half the time to the first step where processors are few. It must run no tensor, because
threads do not survive a fork. Where there are GPUs the ranks are new interpreters all the same, since CUDA does not
survive one either once any library has looked at the device.

On Trainium it is torchrun itself: torch_xla and torch_neuronx read the rank's environment when they are imported, and
some of what the ranks need imports them. In an agent they would find no rank, and leave the wrong address for all.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from finetune_trainer import contract
from finetune_trainer.stages import train_worker
from finetune_trainer.stages.train import WORKER_MODULE, is_neuron

_NVIDIA = Path("/dev/nvidiactl")
_SHARED_IMPORTS = (
    "peft",
    "torch._dynamo",
    "transformers.modeling_utils",
    "finetune_trainer.backends.torch",
    "finetune_trainer.training",
)


def main() -> int:
    """Run the gang's share of this pod; 0 when every rank ended well. The ranks' reports say what happened."""
    parser = argparse.ArgumentParser(description="The elastic agent of one pod of train.")
    for name in ("nodes", "procs-per-node", "node-rank", "join-seconds"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("endpoint", "run-id"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("config", "scratch"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--trace-steps", default="0")
    arguments = parser.parse_args()
    launch = LaunchConfig(
        min_nodes=arguments.nodes,
        max_nodes=arguments.nodes,
        nproc_per_node=arguments.procs_per_node,
        run_id=arguments.run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=arguments.endpoint,
        rdzv_configs={
            "is_host": arguments.node_rank == 0,
            "timeout": arguments.join_seconds,
            "join_timeout": arguments.join_seconds,
            # The store's client waits this long for its host's name to resolve and its port to open.
            "read_timeout": arguments.join_seconds,
        },
        max_restarts=0,
        start_method="spawn" if _NVIDIA.exists() else "fork",
    )
    files = ["--config", str(arguments.config), "--scratch", str(arguments.scratch)]
    own = [*files, "--trace-steps", arguments.trace_steps]
    entry: Callable[..., None] | str
    if is_neuron(contract.load_stage_config(arguments.config)):
        entry, own = sys.executable, ["-m", WORKER_MODULE, *own]
    else:
        entry = _rank
        for name in _SHARED_IMPORTS:
            importlib.import_module(name)
    try:
        launch_agent(launch, entry, own)
    except ChildFailedError:
        return 1
    return 0


def _rank(*own: str) -> None:
    code = train_worker.main(own)
    if code:
        # A rank that lost its peers has threads that wait for them; it has nothing left to do.
        os._exit(code)


if __name__ == "__main__":
    raise SystemExit(main())
