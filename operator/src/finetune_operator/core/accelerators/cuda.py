"""accelerator.type: cuda. NVIDIA GPUs: one process a GPU, all GPUs of a node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from finetune_operator.core.accelerators.whole_node import WholeNode


@dataclass(frozen=True)
class CudaAccelerator(WholeNode):
    """NCCL finds GPUs and NVLink by itself; it is told the network only where nodes talk over EFA.

    Device RDMA is left to libfabric: g5 has none, and being told to use it there is an error. Huge pages are not used:
    a ClusterQueue of HyperPod covers no hugepages-2Mi, so a pod that asked for them would never be admitted, and
    libfabric's buffers in huge pages make fork() fail for lack of memory.
    """

    taint: ClassVar[str] = "nvidia.com/gpu"

    def all_env(self) -> Mapping[str, str]:
        efa = {"FI_PROVIDER": "efa", "FI_EFA_USE_HUGE_PAGE": "0", "NCCL_SOCKET_IFNAME": "^lo,docker,veth"}
        return {"OMP_NUM_THREADS": "1", **(efa if self.has_efa else {})}
