"""`status`: which parts run and answer, versions, images, disk. Reads only."""

import os
from pathlib import Path

from . import binaries, images, kubectl, leftovers, lifecycle, probes, processes
from .parts import Part, cluster_parts, kueue_part, kwok_part
from .problem import ClusterProblem
from .settings import KUBERNETES_VERSION, Settings
from .terminal import table

# What to do about an add-on that died; of the other parts `up` is the known remedy.
_REMEDIES = {
    "kueue": "not running, so no Job can be created or changed: run `cluster.py kueue up`, or `cluster.py kueue down`",
    "kwok": "not running, so its nodes become unready: run `cluster.py up`, or `cluster.py kwok down`",
}


def disk_bytes(folder: Path) -> int:
    """What the folder's files take on disk, not following links and not counting a file with two names twice."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            try:
                found = os.lstat(os.path.join(parent, name))  # noqa: PTH118 - hundreds of thousands of files
            except FileNotFoundError:
                continue
            if (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))
                total += found.st_blocks * 512
    return total


def report(settings: Settings) -> tuple[str, bool]:
    """The text to print, and whether every part runs and is ready."""
    rows: list[tuple[str, ...]] = [("PART", "PID", "STATE")]
    healthy = True
    for part in (*cluster_parts(settings, binaries.programs(settings)), *_add_ons(settings)):
        running = processes.find_running(settings, part.name)
        reason = probes.probe(settings, part.probe) if running else None
        if running is None:
            state = _REMEDIES.get(part.name, "not running")
        else:
            state = "ready" if reason is None else f"not ready: {reason}"
        healthy = healthy and state == "ready"
        rows.append((part.name, str(running.pid) if running else "-", state))
    text = [f"Kubernetes {KUBERNETES_VERSION}", table(rows)]
    if healthy:
        text += [kubectl.run(settings, "get", "nodes", "-o", "wide").rstrip(), _images(settings)]
    elif not any(row[1] != "-" for row in rows[1:]):
        left = leftovers.find(settings) or ["nothing"]
        text.append("left of an earlier run:\n  " + "\n  ".join(left))
    text.append(_disk(settings))
    return "\n\n".join(text), healthy


def _add_ons(settings: Settings) -> list[Part]:
    """The add-ons that ought to run."""
    programs = binaries.programs(settings)
    parts = {"kueue": kueue_part(settings, programs["kueue"]), "kwok": kwok_part(settings, programs["kwok"], ())}
    return [parts[name] for name in lifecycle.wanted_add_ons(settings)]


def _images(settings: Settings) -> str:
    try:
        return "images:\n  " + "\n  ".join(images.stored(settings))
    except ClusterProblem as problem:
        return f"images: {problem}"


def _disk(settings: Settings) -> str:
    folders = {
        "binaries": settings.cache / "bin",
        "base image": settings.cache / "images",
        "image store": settings.state / "containerd",
        "build cache records": settings.state / "buildkit",
        "workspace": settings.workspace,
        "this cluster": settings.cluster,
        "logs": settings.logs,
    }
    rows = [(name, f"{disk_bytes(folder) / 1024**2:.0f} MiB", str(folder)) for name, folder in folders.items()]
    return "disk:\n" + table(rows)
