"""The process from which train_runs.Ranks forks ranks: one JSON request a line on stdin, one number a line on stdout.

{"environment", "arguments", "output", "kill"} starts a rank and answers its process id; {"wait": pid} answers its exit
code. Nothing here runs tensors, so that the forked ranks start torch's thread pools themselves.

"kill" is "" or "<place>:<step>", where each rank kills itself with SIGKILL, so that a test knows the moment:

    step      in the middle of that step: gradients are exchanged, the optimizer has not stepped, no checkpoint is
              being written
    rush      the same, whatever is being written
    file      this rank's file of that step's checkpoint is written, none is published
    publish   everything of that step's checkpoint is written but its name (rank 0)
    term      at the beginning of that step, and in the last rank only: SIGTERM in place of SIGKILL
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import peft.tuners.lora.bnb  # noqa: F401
import torch._dynamo  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401

from finetune_trainer import artifacts, checkpoint_writing, training
from finetune_trainer.backends.torch import TorchBackend
from finetune_trainer.stages import train_worker


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arrange_kill(place: str, at: int) -> None:
    """Put the kill into this process, which is a fork that ends with its rank."""
    run_step, update = training._Run.step, TorchBackend.update
    write_file, publish = checkpoint_writing.write_rank_file, artifacts._publish
    now = 0

    def watched_step(run: training._Run, step: int, stop: bool) -> bool:
        nonlocal now
        now = step + 1
        if place == "term" and now == at and run.backend.rank == run.backend.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_step(run, step, stop)

    def killed_update(backend: TorchBackend, learning_rate: float, max_gradient_norm: float) -> float:
        if now == at:
            for thread in threading.enumerate():
                if place == "step" and thread.name == checkpoint_writing.THREAD_NAME:
                    thread.join()
            die()
        return update(backend, learning_rate, max_gradient_norm)

    def killed_file(folder: Path, rank: int, world_size: int, step: int, slices: Any) -> artifacts.FileEntry:
        entry = write_file(folder, rank, world_size, step, slices)
        if step == at:
            die()
        return entry

    def killed_publish(folder: Path, path: Path) -> None:
        if path.name == f"step-{at:08d}":
            die()
        publish(folder, path)

    if place == "term":
        training._Run.step = watched_step  # type: ignore[method-assign]
    elif place in ("step", "rush"):
        training._Run.step, TorchBackend.update = watched_step, killed_update  # type: ignore[method-assign]
    elif place == "file":
        checkpoint_writing.write_rank_file = killed_file  # type: ignore[assignment]
    elif place == "publish":
        artifacts._publish = killed_publish
    else:
        raise ValueError(place)


def run_rank(environment: dict[str, str], arguments: list[str], output: str, kill: str) -> None:
    """What `python -m finetune_trainer.stages.train_worker` does, in this forked process. Does not return."""
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.close(0)
        os.environ.update(environment)
        if kill:
            place, _, at = kill.partition(":")
            arrange_kill(place, int(at))
        sys.argv = ["train_worker", *arguments]
        code = train_worker.main()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        _, status = os.waitpid(request["wait"], 0)
        answer = os.waitstatus_to_exitcode(status)
    else:
        answer = os.fork()
        if not answer:
            run_rank(**request)
    print(answer, flush=True)
