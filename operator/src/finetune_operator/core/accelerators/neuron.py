"""accelerator.type: neuron. AWS Trainium and Inferentia2: one process a logical NeuronCore, all devices of a node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar

from finetune_operator.core.accelerators.whole_node import WholeNode
from finetune_trainer import contract

CACHE_PATH = str(PurePosixPath(contract.WORKSPACE_PATH, contract.WORKSPACE_ROOT, "neuron-cache"))
"""Compiled graphs, shared by all jobs of the workspace: compile fills it, train reads it."""

_COMPILER_FLAGS = (
    "--model-type transformer",
    "--distribution-strategy=llm-training",
    "--enable-saturate-infinity",
    f"--cache_dir={CACHE_PATH}",
)


@dataclass(frozen=True)
class NeuronAccelerator(WholeNode):
    """Variables as in AWS's fine-tuning sample for Llama 3 on Trainium (awslabs/awsome-distributed-training)."""

    taint: ClassVar[str] = "aws.amazon.com/neuron"

    def device_env(self) -> Mapping[str, str]:
        return {
            "NEURON_RT_NUM_CORES": str(self.instance.cores),
            "NEURON_CC_FLAGS": " ".join(_COMPILER_FLAGS),
            "NEURON_FUSE_SOFTMAX": "1",
            "NEURON_RT_STOCHASTIC_ROUNDING_EN": "1",
            "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS": "5",
            "MALLOC_ARENA_MAX": "70",
            "OMP_NUM_THREADS": "1",
        }

    def efa_env(self) -> Mapping[str, str]:
        return {**super().efa_env(), "FI_EFA_USE_DEVICE_RDMA": "1", "FI_EFA_FORK_SAFE": "1"}
