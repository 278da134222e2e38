"""The process from which train_runs.Ranks forks ranks: one JSON request a line on stdin, one number a line on stdout.

{"environment", "arguments", "output"} starts a rank and answers its process id; {"wait": pid} answers its exit code.
Nothing here runs tensors, so that the forked ranks start torch's thread pools themselves.
"""

from __future__ import annotations

import json
import os
import sys

import peft  # noqa: F401
import torch._dynamo  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import finetune_trainer.backends.torch
import finetune_trainer.training  # noqa: F401
from finetune_trainer.stages import train_worker


def run_rank(environment: dict[str, str], arguments: list[str], output: str) -> None:
    """What `python -m finetune_trainer.stages.train_worker` does, in this forked process. Does not return."""
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.close(0)
        os.environ.update(environment)
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
