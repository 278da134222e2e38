"""accelerator.type: neuron. AWS Trainium: one process a logical NeuronCore, all devices of a node.

The variables of its pods, by instance type and with the source of each, are finetune_trainer/neuron_environment.py's:
the stages read the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar

from finetune_operator.core.accelerators.whole_node import WholeNode
from finetune_trainer import contract
from finetune_trainer.neuron_environment import neuron_environment

CACHE_PATH = str(PurePosixPath(contract.WORKSPACE_PATH, contract.NEURON_CACHE_FOLDER))
"""Compiled graphs, shared by all jobs of the workspace: compile fills it, train reads it."""


@dataclass(frozen=True)
class NeuronAccelerator(WholeNode):
    """Trainium, by the Neuron device plugin's resources and taint."""

    taint: ClassVar[str] = "aws.amazon.com/neuron"

    def all_env(self) -> Mapping[str, str]:
        return neuron_environment(
            self.instance.name, cores=self.instance.cores, has_efa=self.has_efa, cache_path=CACHE_PATH
        )
