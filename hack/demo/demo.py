#!/usr/bin/env python3
"""The demo: fine-tunes a small model on a real cluster, from `kubectl apply` to its answers. Called by `make demo`.

Expects a cluster that kubectl reaches, with the operator installed. Makes a namespace, a workspace, a base model and a
dataset on it, applies examples/tiny-cpu.yaml, shows how it goes, and ends in both models' answers and the line
`demo: Succeeded`. Run again, it reuses what is there. Ctrl-C leaves the job running.
"""

from __future__ import annotations

import argparse
import os
import sys

from finetune_demo.problem import DemoProblem
from finetune_demo.steps import Options, run_demo
from rich.console import Console

INTERRUPTED = 130


def main() -> int:
    options = parse_options(sys.argv[1:])
    console = Console()
    try:
        run_demo(options, console)
    except DemoProblem as problem:
        console.print(f"demo: Failed: {problem}", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        print(
            f"\ndemo: stopped looking; the job goes on. Follow it with `kubectl -n {options.namespace} get ftj -w`, "
            "or run the demo again"
        )
        return INTERRUPTED
    print("demo: Succeeded")
    return 0


def parse_options(arguments: list[str]) -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--namespace", default="finetune-demo", help="made when it is not there (%(default)s)")
    parser.add_argument("--trainer-image", required=True, help="image that the base model is made in")
    parser.add_argument("--existing-cluster", action="store_true", help="a cluster that hack/cluster did not start")
    parser.add_argument("--fresh", action="store_true", help="delete the job and its artifacts first")
    parser.add_argument(
        "--claim",
        default=os.environ.get("DEMO_CLAIM"),
        help="ReadWriteMany claim for the workspace, made when it is not there (DEMO_CLAIM; the example's name)",
    )
    parser.add_argument(
        "--storage-class",
        default=os.environ.get("DEMO_STORAGE_CLASS"),
        help="class of a claim made on an existing cluster (DEMO_STORAGE_CLASS; the cluster's default class)",
    )
    parser.add_argument(
        "--storage-size",
        default=os.environ.get("DEMO_STORAGE_SIZE", "10Gi"),
        help="size of a claim made on an existing cluster (DEMO_STORAGE_SIZE; 10Gi; FSx for Lustre needs 1200Gi)",
    )
    parser.add_argument("--deadline", type=int, default=1800, help="seconds for everything (%(default)s)")
    given = parser.parse_args(arguments)
    return Options(
        namespace=given.namespace,
        trainer_image=given.trainer_image,
        existing_cluster=given.existing_cluster,
        fresh=given.fresh,
        claim=given.claim,
        storage_class=given.storage_class,
        storage_size=given.storage_size,
        deadline_seconds=given.deadline,
    )


if __name__ == "__main__":
    sys.exit(main())
