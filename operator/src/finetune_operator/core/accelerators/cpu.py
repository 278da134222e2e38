"""accelerator.type: cpu. No devices; the spec says how many processes a training pod starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CpuAccelerator:
    """CPU cores only: gloo between the ranks, no extended resource."""

    procs_per_node: int

    def env(self, stage: str) -> Mapping[str, str]:
        return {}

    def resources(self, stage: str) -> Mapping[str, str]:
        return {}
