"""Stands in for train's program where no backend is needed: its ranks ask for graphs and leave reports.

`python -m neuron_vendor.traced_program` takes the command lines of both the agent and the worker, and does what
finetune_trainer/stages/train_agent.py and train_worker.py do as far as compile and the launcher see it.

    FAKE_NEURON_GRAPHS    graphs that each rank asks for, comma-separated (default: first,later,update)
    FAKE_NEURON_MORE      graphs that only a run of all steps asks for, not a traced one
    FAKE_NEURON_ERROR     a reason: the first rank ends with it, as a user's error
    FAKE_NEURON_ONLY_NODE graphs of one node only, as "node:graph"
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from neuron_vendor import graphs

from finetune_trainer import contract
from finetune_trainer.artifacts import find_artifact, new_artifact
from finetune_trainer.contract import ExitCode, Report
from finetune_trainer.stage import finished_report, keep_report
from finetune_trainer.stages.train import report_path, started_path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--procs-per-node", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--trace-steps", type=int, default=0)
    arguments, _ = parser.parse_known_args()
    first = arguments.node_rank * arguments.procs_per_node
    ranks = range(first, first + arguments.procs_per_node)
    for rank in ranks:
        started_path(arguments.scratch, rank).write_text(str(os.getpid()))
    is_traced = os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY") == "1"
    if is_traced != (arguments.trace_steps > 0):
        raise ValueError(f"traced: {is_traced}, but --trace-steps {arguments.trace_steps}")
    config = contract.load_stage_config(arguments.config)
    if config.stage != contract.TRAIN:
        raise ValueError(f"the program was given a stage.json of {config.stage}")
    reason = os.environ.get("FAKE_NEURON_ERROR")
    if reason:
        for rank in ranks:
            leave(arguments.scratch, rank, Report(contract.TRAIN, ExitCode.USER_ERROR, reason, "as asked"))
        return 1
    wanted = os.environ.get("FAKE_NEURON_GRAPHS", "first,later,update").split(",")
    node, _, graph = os.environ.get("FAKE_NEURON_ONLY_NODE", "").partition(":")
    if node == str(arguments.node_rank):
        wanted.append(graph)
    if not is_traced:
        wanted += [name for name in os.environ.get("FAKE_NEURON_MORE", "").split(",") if name]
    for name in wanted:
        if name:
            graphs.run_graph(name)
    report = Report(contract.TRAIN, ExitCode.SUCCESS, metrics={"tracedSteps": arguments.trace_steps})
    if not is_traced:
        if find_artifact(config.output_path) is None:
            with new_artifact(config.output_path, "train") as writer:
                keep_report(writer, {"step": 1})
        report = finished_report(config)
    for rank in ranks:
        leave(arguments.scratch, rank, report)
    return 0


def leave(scratch: Path, rank: int, report: Report) -> None:
    path = report_path(scratch, rank)
    path.with_suffix(".tmp").write_bytes(contract.encode_report(report))
    path.with_suffix(".tmp").replace(path)


if __name__ == "__main__":
    raise SystemExit(main())
