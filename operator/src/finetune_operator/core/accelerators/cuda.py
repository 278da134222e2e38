"""accelerator.type: cuda. NVIDIA GPUs: one process a GPU, all GPUs of a node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from finetune_operator.core.accelerators.whole_node import WholeNode


@dataclass(frozen=True)
class CudaAccelerator(WholeNode):
    """NCCL finds GPUs and NVLink by itself; it is told the network only where nodes talk over EFA."""

    taint: ClassVar[str] = "nvidia.com/gpu"

    def device_env(self) -> Mapping[str, str]:
        return {"OMP_NUM_THREADS": "1"}

    def efa_env(self) -> Mapping[str, str]:
        """Device RDMA is left to libfabric: g5 has none, and being told to use it there is an error."""
        return {**super().efa_env(), "NCCL_SOCKET_IFNAME": "^lo,docker,veth"}
