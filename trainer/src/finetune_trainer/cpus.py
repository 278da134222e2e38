"""How many processors this process may really use, which is what thread pools are sized by.

In a pod the node's processor count says nothing: the affinity mask and the control group's quota do.
"""

from __future__ import annotations

import os
from pathlib import Path

_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


def available_cpus(quota_file: Path = _QUOTA_FILE) -> int:
    """Whole processors by affinity and by the control group's quota (version 2), at least 1."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = quota_file.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return count
    if quota == "max":
        return count
    return max(1, min(count, int(quota) // int(period)))
