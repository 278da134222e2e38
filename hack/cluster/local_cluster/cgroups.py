"""The cluster's own control groups, on version 1, hybrid and version 2 mounts alike.

Every process of the cluster lives below one group, `finetune-cluster`: our parts in `parts/<name>`, pods in
`kubepods`, image builds in `buildkit`. So what belongs to us can be found and ended without asking for names, also
after the process that knew it has died. On version 1 the group exists in every hierarchy, since the kubelet wants
that; processes are looked up in one of them.
"""

import os
import signal
import time
from pathlib import Path

from .problem import ClusterProblem
from .settings import CGROUP

_ROOT = Path("/sys/fs/cgroup")
_KUBELET_CONTROLLERS = ("cpuset", "cpu", "io", "memory", "pids", "hugetlb")


def hierarchies(mounts: str) -> list[Path]:
    """The mounted hierarchies, from the text of /proc/mounts: one on version 2, one a controller on version 1.

    On a hybrid machine version 2 is mounted beside version 1 and listed last: runc enters it, if without controllers.
    """
    found: dict[str, set[Path]] = {"cgroup": set(), "cgroup2": set()}
    for line in mounts.splitlines():
        _, point, kind = line.split()[:3]
        if kind in found and Path(point).is_relative_to(_ROOT):
            found[kind].add(Path(point))
    return [*sorted(found["cgroup"]), *sorted(found["cgroup2"])]


def _mounted() -> list[Path]:
    return hierarchies(Path("/proc/mounts").read_text())


def _tracking_hierarchy() -> Path:
    mounted = _mounted()
    if not mounted:
        raise ClusterProblem("no cgroup hierarchy is mounted below /sys/fs/cgroup; mount one, or use another machine")
    by_name = {point.name: point for point in mounted}
    return by_name.get("pids", mounted[0])


def create_root() -> None:
    """Make the group in every hierarchy, with what its children need handed down. Safe to repeat."""
    for point in _mounted():
        group = point / CGROUP
        group.mkdir(exist_ok=True)
        for name in ("cpuset.cpus", "cpuset.mems"):
            # Version 1 starts a cpuset empty, and an empty one takes no process.
            ours = group / name
            if (point / "cgroup.clone_children").exists() and ours.exists() and not ours.read_text().strip():
                ours.write_text((point / name).read_text())
        if (point / "cgroup.controllers").exists():
            for parent in (point, group):
                _delegate(parent)


def _delegate(group: Path) -> None:
    """Version 2: let children of the group have the controllers that the kubelet asks for."""
    available = (group / "cgroup.controllers").read_text().split()
    for controller in (name for name in _KUBELET_CONTROLLERS if name in available):
        try:
            (group / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError as error:
            raise ClusterProblem(
                f"{group}: the cgroup controller {controller} cannot be handed to the cluster ({error}); "
                "in a container, start it with its own cgroup namespace and --privileged"
            ) from error


def create_part(name: str) -> Path:
    """The group of one of our own processes; the path of its cgroup.procs."""
    group = _tracking_hierarchy() / CGROUP / "parts" / name
    group.mkdir(parents=True, exist_ok=True)
    return group / "cgroup.procs"


def processes(below: str = "") -> set[int]:
    """Pids of every process in the cluster's group, or in one of its subgroups such as `kubepods`."""
    found: set[int] = set()
    for point in _mounted():
        for file in (point / CGROUP / below).glob("**/cgroup.procs"):
            try:
                found.update(int(pid) for pid in file.read_text().split())
            except OSError:  # the group went away while we read it
                continue
    return found - {os.getpid()}


def end_processes(below: str = "", deadline_s: float = 20.0) -> set[int]:
    """SIGKILL everything in the group until it stays empty. Returns what is still there at the deadline."""
    end = time.monotonic() + deadline_s
    while left := processes(below):
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > end:
            return left
        time.sleep(0.05)
    return set()


def existing() -> list[Path]:
    """The cluster's groups that are there now, innermost first."""
    groups: list[Path] = []
    for point in _mounted():
        root = point / CGROUP
        if root.is_dir():
            groups += sorted((path for path in root.glob("**/") if path.is_dir()), reverse=True)
    return groups


def remove(deadline_s: float = 5.0) -> None:
    """Delete the groups. A group whose last process has just died is busy for a moment, so it is tried for a while."""
    end = time.monotonic() + deadline_s
    while groups := existing():
        for group in groups:
            try:
                group.rmdir()
            except OSError:
                continue  # what stays is named by leftovers.py
        if time.monotonic() > end:
            return
        time.sleep(0.02)
