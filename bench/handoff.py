#!/usr/bin/env python3
"""Seconds between one stage's end and the next stage's pod, over several runs of one job on the current cluster.

    python bench/handoff.py --namespace finetune-demo --job tiny-cpu --runs 5

A stage ends when the watch first shows the containers of all its pods terminated (a pod's phase follows about a second
later); the next begins when the watch first shows a pod of it. Both times are this process's own, from one watch, so no
clock's resolution or skew enters. For each run the job is deleted and applied again: its stages then run as pods that
find their artifact complete and end at once, which is what makes many hand-offs measurable in a minute.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import kube

STAGE = "finetune-operator.io/stage"


def hand_offs(namespace: str, job: str, deadline: float) -> dict[str, float]:
    """Seconds from the end of a stage to the first pod of the next, by the next stage's name, until the job ends."""
    finished: dict[str, set[str]] = {}
    first_seen: dict[str, float] = {}
    all_seen: dict[str, set[str]] = {}
    ended: dict[str, float] = {}
    order: list[str] = []
    for pod in kube.watch("pods", "-n", namespace, "-l", f"finetune-operator.io/job-name={job}", seconds=deadline):
        now = time.monotonic()
        stage, name = pod["metadata"]["labels"][STAGE], pod["metadata"]["name"]
        if stage not in first_seen:
            first_seen[stage] = now
            order.append(stage)
        all_seen.setdefault(stage, set()).add(name)
        containers = pod["status"].get("containerStatuses") or []
        if any("terminated" in container["state"] for container in containers):
            finished.setdefault(stage, set()).add(name)
            if finished[stage] == all_seen[stage]:
                ended.setdefault(stage, now)
        if stage == "evaluate" and stage in ended:
            break
    return {after: first_seen[after] - ended[before] for before, after in itertools.pairwise(order)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--deadline", type=float, default=300.0, help="seconds for one run")
    args = parser.parse_args()
    manifest = kube.get("finetunejob", args.job, "-n", args.namespace)
    clean = {
        "apiVersion": manifest["apiVersion"],
        "kind": manifest["kind"],
        "metadata": {"name": args.job, "namespace": args.namespace},
        "spec": manifest["spec"],
    }
    seconds: list[float] = []
    for run in range(args.runs):
        kube.kubectl("delete", "finetunejob", args.job, "-n", args.namespace, "--cascade=foreground")
        kube.apply(json.dumps(clean))
        found = hand_offs(args.namespace, args.job, args.deadline)
        seconds += found.values()
        print(f"run {run + 1}: " + "  ".join(f"-> {stage} {value:.2f} s" for stage, value in found.items()), flush=True)
    print(
        f"hand-off over {len(seconds)}: median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s, "
        f"best {min(seconds):.2f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
