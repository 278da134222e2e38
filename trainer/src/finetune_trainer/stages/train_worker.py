"""One rank of train, started by torchrun (or by the launcher where it is the only one): `python -m` this module.

It leaves its process id and at the end its report in the scratch folder, where stages/train.py finds them. It decides
the order of things (join, build, resume, check, train, write the artifact); how is in the modules it calls.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from finetune_trainer import contract
from finetune_trainer.artifacts import new_artifact, open_input, read_manifest
from finetune_trainer.contract import ExitCode, Report, StageConfig
from finetune_trainer.errors import StageError
from finetune_trainer.stage import failure_report, finished_report, keep_report
from finetune_trainer.stages.train import report_path, started_path
from finetune_trainer.stages.train_args import TrainArgs, parse_args
from finetune_trainer.tokenizer_files import carried_digests

if TYPE_CHECKING:
    from finetune_trainer.backends import Backend, Placement
    from finetune_trainer.training import Timings

CHECKPOINT_FOLDER = "checkpoint"
ADAPTER_CONFIG_NAME = "adapter_config.json"
TRAIN_KIND = "train"


@dataclass
class StopFlag:
    """Set by SIGTERM; the loop asks it once a step."""

    asked: bool = field(default=False)

    def install(self) -> None:
        def handle(_signal: int, _frame: FrameType | None) -> None:
            self.asked = True

        signal.signal(signal.SIGTERM, handle)

    def __call__(self) -> bool:
        return self.asked


def work_folder(config: StageConfig) -> Path:
    """Where training keeps checkpoints and logs until, and after, its artifact is written."""
    return config.output_path.with_name(config.output_path.name + ".work")


def main(argv: Sequence[str] | None = None) -> int:
    """Run this rank to its end; returns its exit code after its report is written."""
    stop = StopFlag()
    stop.install()
    parser = argparse.ArgumentParser(description="One rank of train.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument(
        "--trace-steps", type=int, default=0, help="take so many steps for their programs only and write nothing"
    )
    arguments = parser.parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))

    def end(report: Report) -> int:
        _write(report_path(arguments.scratch, rank), contract.encode_report(report))
        return report.exit_code

    def end_stuck(error: StageError) -> None:
        """The main thread stands in native code for good: this one ends the process."""
        code = end(failure_report(contract.TRAIN, error))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    _write(started_path(arguments.scratch, rank), str(os.getpid()).encode())
    try:
        report = run_rank(contract.load_stage_config(arguments.config), stop, end_stuck, arguments.trace_steps)
    except Exception as error:  # noqa: BLE001 - the rank's last line of defence: every failure becomes its report
        report = failure_report(contract.TRAIN, error)
    return end(report)


def run_rank(config: StageConfig, stop: StopFlag, stuck: Callable[[StageError], None], trace_steps: int = 0) -> Report:
    """Train as one rank of the gang; the report of the finished stage, the same in every rank.

    `stuck` is told, in another thread, that a collective waits in vain, and must end the process. With `trace_steps`
    that many steps are taken from the start for their programs only: compile runs this, and writes the artifact.
    """
    began = time.monotonic()
    args = parse_args(config)
    with ThreadPoolExecutor(max_workers=1) as pool:
        # Reading the inputs once to verify them also warms the page cache for the load below.
        verified = pool.submit(_verify_inputs, config)
        return _run(config, args, stop, stuck, verified, began, trace_steps)


def _run(
    config: StageConfig,
    args: TrainArgs,
    stop: StopFlag,
    stuck: Callable[[StageError], None],
    verified: Future[None],
    began: float,
    trace_steps: int,
) -> Report:
    from finetune_trainer import training
    from finetune_trainer.backends import ModelPlan, open_backend
    from finetune_trainer.batches import open_rows, open_validation_rows, read_data
    from finetune_trainer.progress import Progress, ProgressPoster
    from finetune_trainer.training_log import LOG_NAME, repeated_steps

    backend = open_backend(_placement(args), stuck)
    backend.start()
    verified.result()
    prepared = config.input_path(contract.PREPARE)
    rows = open_rows(prepared, args.global_batch_size)
    held_out = open_validation_rows(prepared) if args.evaluate_every_steps else None
    packed_row = backend.broadcast(rows.first_packed_row() if backend.rank == 0 else None)
    data = read_data(prepared)
    model = config.input_path(contract.MODEL_INPUT)
    backend.build(
        ModelPlan(
            folder=model,
            method=args.method,
            precision=args.precision,
            weight_decay=args.weight_decay,
            seed=args.seed,
            keep_masks=packed_row is not None,
            trust_remote_code=bool(data.get("trustRemoteCode")),
            gradient_checkpointing=args.gradient_checkpointing,
            packing=str(data.get("packing", "none")),
            row_length=rows.input_ids.shape[1],
            micro_batch_size=args.micro_batch_size,
            micro_steps=args.gradient_accumulation_steps,
            max_gradient_norm=args.max_gradient_norm,
        )
    )
    if backend.rank == 0:
        print(f"{_count(backend.parameters())} parameters train", flush=True)
    plan = _training_plan(args, rows.max_steps)
    packed_row = packed_row if backend.keeps_documents_apart else None
    if trace_steps:
        if packed_row is not None:
            training.check_packing(backend, plan, rows, packed_row)
        taken = training.trace(backend, plan, rows, trace_steps, held_out)
        backend.stop()
        print(f"{taken} steps traced", flush=True)
        return Report(contract.TRAIN, ExitCode.SUCCESS)
    work = work_folder(config)
    start = training.resume(backend, plan, work / training.CHECKPOINTS_FOLDER)
    repeated = repeated_steps(work, start.step if start else 0)
    if packed_row is not None:
        training.check_packing(backend, plan, rows, packed_row)
    start_seconds = time.monotonic() - began
    progress = Progress(ProgressPoster(config.progress if backend.rank == 0 else {}), rows.max_steps)
    try:
        outcome = training.train(
            backend,
            plan,
            rows,
            work,
            start,
            progress,
            should_stop=stop,
            attempt=config.attempt,
            held_out=held_out,
        )
    finally:
        progress.close()
    metrics = {
        "step": rows.max_steps,
        "totalSteps": rows.max_steps,
        "loss": outcome.loss,
        "firstLoss": outcome.first_loss,
        "trainableParameters": _count(backend.parameters()),
    }
    times = {
        "tokensPerSecond": round(outcome.timings.tokens_per_second, 1),
        "resumedFromStep": start.step if start else 0,
        "repeatedSteps": repeated,
        "startSeconds": round(start_seconds, 3),
        "stepSeconds": round(outcome.timings.step_seconds, 3),
        "checkpointSeconds": round(outcome.timings.checkpoint_seconds, 3),
        "checkpointWritingSeconds": round(outcome.timings.writing_seconds, 3),
    }
    times.update(_measured(outcome.timings, backend))
    if backend.rank == 0:
        _write_artifact(config, outcome.checkpoint, work / LOG_NAME, backend.adapter_config(_source(model)), metrics)
        report = finished_report(config, times)
    else:
        report = Report(contract.TRAIN, ExitCode.SUCCESS)
    agreed: Report = backend.broadcast(report)
    backend.stop()
    return agreed


def _measured(timings: Timings, backend: Backend) -> dict[str, float]:
    """What the report says of the machine: utilisation, waiting for rows, the most memory of any rank. All ranks."""
    from finetune_trainer.throughput import peak_host_memory, utilisation

    mfu = utilisation(timings.flops, timings.step_seconds, backend.peak_flops, backend.world_size)
    memory = backend.gather((peak_host_memory(), backend.device_memory()))
    found = {
        "dataWaitSeconds": round(timings.data_seconds, 3),
        "mfu": None if mfu is None else round(mfu, 5),
        "hostMemoryBytes": max((host for host, _ in memory if host is not None), default=None),
        "deviceMemoryBytes": max((device for _, device in memory if device is not None), default=None),
    }
    return {name: value for name, value in found.items() if value is not None}


def _training_plan(args: TrainArgs, max_steps: int) -> Any:
    from finetune_trainer.training import TrainingPlan

    return TrainingPlan(
        total_steps=max_steps,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        learning_rate=args.learning_rate,
        schedule=args.schedule,
        warmup_steps=args.warmup_steps,
        max_gradient_norm=args.max_gradient_norm,
        seed=args.seed,
        precision=args.precision,
        checkpoint_every_steps=args.checkpoint_every_steps,
        keep_checkpoints=args.keep_checkpoints,
        log_every_steps=args.log_every_steps,
        identity={**args.identity, "maxSteps": max_steps},
        evaluate_every_steps=args.evaluate_every_steps,
    )


def _verify_inputs(config: StageConfig) -> None:
    """Check the inputs against their digests; contents once a pod, by its first rank, names and sizes in the others."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    for name in (contract.MODEL_INPUT, contract.PREPARE):
        open_input(config, name, contents=first)


def _placement(args: TrainArgs) -> Placement:
    from finetune_trainer.backends import Placement

    accelerator = args.accelerator
    if accelerator is None:
        import torch

        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    return Placement(
        accelerator, args.strategy, args.tensor_parallel_size, args.pipeline_parallel_size, args.instance_type
    )


def _source(model: Path) -> str:
    """What the model artifact was made from; of a hub's model the name alone, by which peft finds it there."""
    return str(read_manifest(model).metadata.get("source", model.name)).removeprefix("hf://")


def _count(parameters: Any) -> int:
    import math

    return sum(math.prod(facts.shape) for facts in parameters.values())


def _write_artifact(
    config: StageConfig, checkpoint: Path, log: Path, adapter_config: bytes | None, metrics: dict[str, Any]
) -> None:
    with new_artifact(config.output_path, TRAIN_KIND) as writer:
        for entry in read_manifest(checkpoint).files:
            _share(checkpoint / entry.path, writer.folder / CHECKPOINT_FOLDER / entry.path)
            writer.record(f"{CHECKPOINT_FOLDER}/{entry.path}", entry.size, entry.sha256)
        _share(checkpoint / contract.MANIFEST_NAME, writer.folder / CHECKPOINT_FOLDER / contract.MANIFEST_NAME)
        writer.write(log.name, log.read_bytes())
        if adapter_config is not None:
            writer.write(ADAPTER_CONFIG_NAME, adapter_config)
        writer.metadata.update(carried_digests(config.input_path(contract.PREPARE)))
        keep_report(writer, metrics)


def _share(source: Path, target: Path) -> None:
    """One file under two names, or a copy where the volume has no hard links. Artifacts are never written to again."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A rank that lost its peers has threads that wait for them; it has nothing left to do.
    os._exit(code)
