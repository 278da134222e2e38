"""accelerator.type: cpu. No devices; the spec says how many processes a training pod starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_operator.core.nodes import LABEL_INSTANCE_TYPE
from finetune_trainer import contract


@dataclass(frozen=True)
class CpuAccelerator:
    """CPU cores only: gloo between the ranks, no extended resource. `instance_type` binds training to such nodes."""

    procs_per_node: int
    instance_type: str | None = None

    def env(self, stage: str) -> Mapping[str, str]:
        return {}

    def resources(self, stage: str) -> Mapping[str, str]:
        return {}

    def requests(self, stage: str) -> Mapping[str, str]:
        return {}

    def node_selector(self, stage: str) -> Mapping[str, str]:
        if self.instance_type is None or stage != contract.TRAIN:
            return {}
        return {LABEL_INSTANCE_TYPE: self.instance_type}

    def tolerations(self, stage: str) -> tuple[Mapping[str, Any], ...]:
        return ()

    def shared_memory(self, stage: str) -> str | None:
        return None
