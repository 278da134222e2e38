"""What each spec.accelerator.type means for pods, behind one small interface: `of(job)` picks the module.

A type is one module here. Types that the API accepts and this release cannot run are refused before this is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.core.accelerators.cpu import CpuAccelerator


class Accelerator(Protocol):
    """Processes a training pod starts, and what a stage's pods ask for beside their plain resources."""

    @property
    def procs_per_node(self) -> int: ...

    def env(self, stage: str) -> Mapping[str, str]:
        """Environment variables of the stage's container."""

    def resources(self, stage: str) -> Mapping[str, str]:
        """Extended resources (devices, network interfaces) that the stage's container requests, by name."""


def of(job: FineTuneJob) -> Accelerator:
    """The accelerator of a job; ValueError for a type that unavailable_features should have refused."""
    if job.spec.accelerator.type == "cpu":
        return CpuAccelerator(procs_per_node=job.spec.accelerator.processes_per_node)
    raise ValueError(f"spec.accelerator.type {job.spec.accelerator.type} cannot be run by this release")
