"""Numbers of a run: quantiles, what /metrics and /proc say, and the result that compares both arms."""

from __future__ import annotations

import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_REQUESTS = "apiserver_request_total"
_SAMPLE = re.compile(r"^apiserver_request_total\{([^}]*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
NOISE_RESOURCES = frozenset(
    {"", "leases", "nodes", "subjectaccessreviews", "tokenreviews", "endpointslices", "endpoints"}
)
"""What goes on without any job: health checks and /metrics itself (no resource), leases and heartbeats of nodes, the
API server's own endpoints."""
NOISE_VERBS = frozenset({"WATCH", "CONNECT"})
"""Watches are counted by the API server at their end: when one ends is no work of a run."""
COMPONENTS = frozenset({"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kueue", "kwok"})


def quantile(values: Sequence[float], share: float) -> float:
    """The nearest-rank quantile; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def parse_requests(metrics: str) -> Counter[str]:
    """Requests that the API server has answered so far, by "VERB resource[/subresource]", without the noise."""
    counts: Counter[str] = Counter()
    for labels, value in _SAMPLE.findall(metrics):
        found = dict(_LABEL.findall(labels))
        if found["verb"] in NOISE_VERBS or found["resource"] in NOISE_RESOURCES or found.get("dry_run"):
            continue
        sub = f"/{found['subresource']}" if found.get("subresource") else ""
        group = f".{found['group']}" if found["resource"] == "events" and found.get("group") else ""
        counts[f"{found['verb']} {found['resource']}{group}{sub}"] += int(float(value))
    return counts


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def component_seconds() -> Counter[str]:
    """Processor time so far of the cluster's parts that run on this machine, by name; empty for a cluster elsewhere."""
    spent: Counter[str] = Counter()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace").rpartition("/")[2]
            if name in COMPONENTS:
                spent[name] += cpu_seconds(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return spent


def peak_memory_mb(pid: int) -> float:
    """Largest resident set of a process so far, in MB (1024 kB)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/{pid}/status has no VmHWM")
    return int(found[1]) / 1024


@dataclass(frozen=True)
class Run:
    """One arm at one size, once.

    `hand_offs_after_end`: seconds from the end of a stage's last container to the next stage's Job.
    `hand_offs_after_complete`: from the Job controller's condition Complete; negative where the next came before it.
    """

    arm: str
    jobs: int
    seconds: float
    hand_offs_after_end: tuple[float, ...]
    hand_offs_after_complete: tuple[float, ...]
    requests: Mapping[str, int]
    cpu_seconds: float
    memory_mb: float
    errors: int
    components: Mapping[str, float] = field(default_factory=dict)
    """Processor seconds of each part of the cluster on this machine during the run."""
    notes: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        """Jobs (chains) per second, from the first submission to the last one's end."""
        return self.jobs / self.seconds

    @property
    def own_hand_offs(self) -> tuple[float, ...]:
        """Seconds from what the arm acts on to the next Job: the end of the container, or the floor's Complete."""
        return self.hand_offs_after_complete if self.arm == "floor" else self.hand_offs_after_end

    def as_json(self) -> dict[str, Any]:
        """The line that is printed for the run."""
        return {
            "arm": self.arm,
            "jobs": self.jobs,
            "seconds": round(self.seconds, 2),
            "jobs_per_s": round(self.rate, 3),
            "handoff_p50_s": round(quantile(self.own_hand_offs, 0.5), 3),
            "handoff_p95_s": round(quantile(self.own_hand_offs, 0.95), 3),
            "after_container_end_p50_s": round(quantile(self.hand_offs_after_end, 0.5), 3),
            "after_container_end_p95_s": round(quantile(self.hand_offs_after_end, 0.95), 3),
            "after_job_complete_p50_s": round(quantile(self.hand_offs_after_complete, 0.5), 3),
            "after_job_complete_p95_s": round(quantile(self.hand_offs_after_complete, 0.95), 3),
            "requests_per_job": round(sum(self.requests.values()) / self.jobs, 2),
            "requests_per_job_by_verb": _per_job(_by_verb(self.requests), self.jobs),
            "cpu_s_per_job": round(self.cpu_seconds / self.jobs, 4),
            "cluster_cpu_s_per_job": {
                name: round(spent / self.jobs, 3) for name, spent in sorted(self.components.items())
            },
            "memory_mb": round(self.memory_mb, 1),
            "errors": self.errors,
            "notes": list(self.notes),
        }


def requests_table(floor: Run, operator: Run) -> str:
    """Requests per job by verb and resource, side by side, largest first."""
    lines = [f"{'requests per job':44} {'floor':>8} {'operator':>9}"]
    for name in sorted({*floor.requests, *operator.requests}, key=lambda key: -operator.requests.get(key, 0)):
        left, right = (run.requests.get(name, 0) / run.jobs for run in (floor, operator))
        if max(left, right) >= 0.05:
            lines.append(f"{name:44} {left:8.2f} {right:9.2f}")
    return "\n".join(lines)


def result(full: Sequence[Run], light: Sequence[Run]) -> dict[str, float | int]:
    """The benchmark's one line. Figures of several rounds are their median; memory and errors the worst and the sum.

    handoff_p95_to_floor holds the operator's time from the end of a container against the floor's from the later
    moment at which the Job is Complete; handoff_p95_from_container_end_to_floor has one span for both.
    """
    ours, floor = ([run for run in full if run.arm == arm] for arm in ("operator", "floor"))
    light_ours = [run for run in light if run.arm == "operator"]

    def p95(run: Run) -> float:
        return quantile(run.own_hand_offs, 0.95)

    def p95_after_end(run: Run) -> float:
        return quantile(run.hand_offs_after_end, 0.95)

    def requests(run: Run) -> float:
        return sum(run.requests.values()) / run.jobs

    return {
        "rate_to_floor": round(_median(run.rate for run in ours) / _median(run.rate for run in floor), 3),
        "requests_to_floor": round(_median(map(requests, ours)) / _median(map(requests, floor)), 3),
        "handoff_p95_to_floor": round(_median(map(p95, ours)) / _median(map(p95, floor)), 2),
        "handoff_p95_from_container_end_to_floor": round(
            _median(map(p95_after_end, ours)) / _median(map(p95_after_end, floor)), 2
        ),
        "handoff_p95_light_s": round(_median(map(p95, light_ours)), 3),
        "memory_mb": round(max(run.memory_mb for run in ours), 1),
        "cpu_s_per_job": round(_median(run.cpu_seconds / run.jobs for run in ours), 4),
        "errors": sum(run.errors for run in (*full, *light)),
    }


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else float("nan")


def _by_verb(requests: Mapping[str, int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name, count in requests.items():
        counts[name.split()[0]] += count
    return counts


def _per_job(counts: Mapping[str, int], jobs: int) -> dict[str, float]:
    return {name: round(count / jobs, 2) for name, count in sorted(counts.items())}
