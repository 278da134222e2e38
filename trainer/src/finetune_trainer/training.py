"""The one training loop, for every backend: steps, loss, schedule, log, checkpoints, resume.

stages/train_worker.py runs it in each rank. It drives a Backend and knows neither torch nor a device. Everything that
decides the result is a function of the job and the step number: rows by prepare's order, dropout by (seed, step,
chunk), so a run that was killed and resumed ends bit for bit where an uninterrupted one ends.

The loss of a step is the sum over all supervised tokens of the global batch divided by their number, which every rank
knows from the rows alone. Gradients of micro steps and ranks are summed, never averaged, so the gradient does not
depend on how the batch is split.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune_trainer.backends import Backend, MicroBatch, Number, Tokens
from finetune_trainer.batches import PreparedRows, held_out_batches
from finetune_trainer.checkpoint_writing import CheckpointWriter, Saved
from finetune_trainer.checkpoints import (
    FORMAT_VERSION,
    Checkpoint,
    checkpoint_folder,
    differences,
    find_last_checkpoint,
    read_checkpoint,
)
from finetune_trainer.errors import CorruptArtifact, Interrupted, RetryableError, UserError
from finetune_trainer.progress import Progress
from finetune_trainer.throughput import Speed, peak_host_memory, utilisation
from finetune_trainer.training_log import LOG_NAME, TrainingLog, read_losses

CHECKPOINTS_FOLDER = "checkpoints"

SCHEDULES = ("linear", "cosine", "constant")

_PACKING_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest relative difference of a document's logits packed against alone: other shapes round differently."""
_NEIGHBOUR_TOLERANCE = 1e-6
"""The same against other neighbours: equal shapes, so equal but for a kernel that orders its sums freely."""
_ROWS_SHOWN = 12


@dataclass(frozen=True)
class TrainingPlan:
    """The numbers of the run. Batch sizes count rows; `precision` is bf16 or fp32; `schedule` one of SCHEDULES.

    `identity` is what a checkpoint must share with the job that resumes it, as JSON: data, base model, method, and of
    the training fields those that change the result. Split of the batch and world size are no part of it.
    """

    total_steps: int
    global_batch_size: int
    micro_batch_size: int
    learning_rate: float
    schedule: str
    warmup_steps: int
    max_gradient_norm: float
    seed: int
    precision: str
    checkpoint_every_steps: int
    keep_checkpoints: int
    log_every_steps: int
    identity: Mapping[str, Any]
    evaluate_every_steps: int | None = None
    """Steps between measurements of the held-out loss; the last step has one too. None measures none."""

    def micro_steps(self, backend: Backend) -> int:
        """Micro steps of each rank in an optimizer step."""
        return self.global_batch_size // self.micro_batch_size // backend.data_parallel_size


@dataclass
class Timings:
    """Seconds of this attempt by what they were spent on, and its tokens (all ranks).

    `data_seconds` are those of step_seconds in which rows were read; `flops` is the arithmetic that the steps needed by
    throughput.ModelSize, all ranks, 0 where the model's size cannot be told. In `checkpoint_seconds` training stood
    still for checkpoints; `writing_seconds` is how long their writing took, most of it beside training.
    """

    step_seconds: float = 0.0
    data_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    writing_seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    steps: int = 0
    checkpoints: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds if self.step_seconds else 0.0


@dataclass(frozen=True)
class Outcome:
    """How training ended: the final checkpoint's folder, the losses of the first and last log line, times."""

    checkpoint: Path
    first_loss: float
    loss: float
    timings: Timings


@dataclass
class _Window:
    """Loss since the last log line, so that it survives a checkpoint between two lines."""

    loss_sum: float = 0.0
    supervised: int = 0
    tokens: int = 0

    def add(self, loss: float, supervised: int, tokens: int) -> None:
        self.loss_sum += loss * supervised
        self.supervised += supervised
        self.tokens += tokens

    def as_json(self) -> dict[str, Any]:
        return {"lossSum": self.loss_sum, "supervisedTokens": self.supervised, "tokens": self.tokens}


def learning_rate(plan: TrainingPlan, step: int) -> float:
    """The rate of `step` (from 0): transformers' schedules of the same names, so that curves can be compared."""
    if step < plan.warmup_steps:
        return plan.learning_rate * step / plan.warmup_steps
    left = max(1, plan.total_steps - plan.warmup_steps)
    done = (step - plan.warmup_steps) / left
    if plan.schedule == "linear":
        return plan.learning_rate * max(0.0, 1.0 - done)
    if plan.schedule == "cosine":
        return plan.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    if plan.schedule == "constant":
        return plan.learning_rate
    raise UserError(
        "InvalidTraining", f"training.learningRateSchedule is {plan.schedule!r}: use one of {', '.join(SCHEDULES)}"
    )


def chunk_seed(seed: int, step: int, chunk: int) -> int:
    """The seed of one micro batch's dropout: the same on whichever rank and in whichever attempt it runs."""
    digest = hashlib.sha256(f"{seed}/{step}/{chunk}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def resume(backend: Backend, plan: TrainingPlan, root: Path) -> Checkpoint | None:
    """Load the newest checkpoint under `root` that verifies into the built backend; None when there is none. All ranks.

    Damaged newer ones are named in the log. UserError lists each field in which the checkpoint is another job's, or
    was written by ranks that share the model otherwise.
    RetryableError when it changed or went away meanwhile, as it does where an attempt before this one still writes.
    """
    choice: tuple[str, str] | None = None
    if backend.rank == 0:
        found, damaged = find_last_checkpoint(root)
        for damage in damaged:
            print(f"checkpoint {damage.path.name} is damaged and not used: {damage.reason}", flush=True)
        choice = (found.path.name, found.digest) if found else None
    choice = backend.broadcast(choice)
    if choice is None:
        return None
    name, digest = choice
    try:
        checkpoint = read_checkpoint(root / name, contents=False)
        if checkpoint.digest != digest:
            raise CorruptArtifact(f"it has digest {checkpoint.digest}, rank 0 verified {digest}")
        _check_identity(backend, plan, checkpoint)
        backend.load(checkpoint)
    except CorruptArtifact as error:
        raise RetryableError(
            "CheckpointChanged",
            f"{root / name} changed while training started, as an earlier attempt that still writes there would do: "
            f"{error.message}",
        ) from error
    if checkpoint.world_size != backend.world_size and backend.rank == 0:
        print(
            f"checkpoint {name} was written by {checkpoint.world_size} ranks, going on with {backend.world_size}: "
            "the same batches, rounding may differ",
            flush=True,
        )
    return checkpoint


def check_packing(backend: Backend, plan: TrainingPlan, rows: PreparedRows, row: int) -> None:
    """Prove on `row`, which holds several documents, that they do not see each other; UserError when they do.

    ValueError when the row holds one document only: nothing would be proved.
    """
    batch = rows.batch(np.array([row], dtype=np.int32), whole=backend.whole_rows)
    if int(batch.segment_ids.max(initial=0)) < 2:
        raise ValueError(f"row {row} holds fewer than two documents")
    try:
        alone, neighbours = backend.packing_error(batch, 2)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise UserError(
            "PackingNotSupported", f"the model cannot keep packed documents apart ({error}): set dataset.packing: none"
        ) from error
    # On a GPU int8 layers round activations to 8 bits, and the last bits of a shape decide to which side.
    is_rounded = plan.identity.get("method", {}).get("quantization") == "int8"
    limit = _PACKING_TOLERANCE["bf16" if is_rounded else plan.precision]
    neighbour_limit = limit if backend.rounds_at_random else _NEIGHBOUR_TOLERANCE
    if backend.is_tracing:
        return
    if not (alone <= limit and neighbours <= neighbour_limit):
        raise UserError(
            "PackingContaminates",
            f"logits of the second document of row {row} differ by {alone:.2g} from the document alone (limit "
            f"{limit:g}) and by {neighbours:.2g} with other neighbours (limit {neighbour_limit:g}), relative to "
            "the largest: the model's attention mixes packed documents, set dataset.packing: none",
        )
    if backend.rank == 0:
        print(
            f"packed documents do not see each other: {alone:.1e} against alone, {neighbours:.1e} with others",
            flush=True,
        )


def train(
    backend: Backend,
    plan: TrainingPlan,
    rows: PreparedRows,
    work: Path,
    start: Checkpoint | None,
    progress: Progress,
    *,
    should_stop: Callable[[], bool],
    attempt: int = 1,
    held_out: PreparedRows | None = None,
) -> Outcome:
    """Train from `start` (already loaded) to the last step and leave its checkpoint under `work`. All ranks.

    `held_out` are the rows whose loss is measured every plan.evaluate_every_steps. Interrupted when should_stop() was
    true on any rank: a checkpoint is written first. UserError when loss or gradient is no finite number.
    """
    first = start.step if start else 0
    window = _Window()
    if start:
        window = _Window(
            start.state["window"]["lossSum"], start.state["window"]["supervisedTokens"], start.state["window"]["tokens"]
        )
    log = TrainingLog(work, first, attempt) if backend.rank == 0 else None
    writer = CheckpointWriter(
        backend, work / CHECKPOINTS_FOLDER, plan.keep_checkpoints, before=log.sync_lines if log else None
    )
    run = _Run(backend, plan, rows, writer, window, progress, log, held_out)
    with closing(log) if log else nullcontext():
        if backend.rank == 0:
            progress.started(first)
        try:
            saved = _steps(run, first, should_stop)
        except RetryableError:
            raise  # a peer is lost, and with it what its thread would write
        except BaseException:
            writer.close()
            raise
    first_loss, loss = backend.broadcast(read_losses(work / LOG_NAME) if backend.rank == 0 else None)
    return Outcome(checkpoint_folder(work / CHECKPOINTS_FOLDER, saved), first_loss, loss, run.timings)


def trace(
    backend: Backend, plan: TrainingPlan, rows: PreparedRows, steps: int, held_out: PreparedRows | None = None
) -> int:
    """Take `steps` steps and one measurement of the held-out loss for their programs only; the steps taken. All ranks.

    Nothing is read, checked or written: of a backend that is tracing no number means anything.
    """
    for step in range(min(steps, plan.total_steps)):
        _take_step(backend, plan, rows, step, rows.counts(step).supervised)
        backend.update(learning_rate(plan, step), plan.max_gradient_norm)
    if held_out is not None:
        backend.held_out_loss(_held_out_share(backend, plan, held_out))
    return min(steps, plan.total_steps)


def _steps(run: _Run, first: int, should_stop: Callable[[], bool]) -> int:
    """All steps from `first` to the last; returns the step of the last checkpoint, which is complete then."""
    plan = run.plan
    for step in range(first, plan.total_steps):
        stop = run.step(step, should_stop())
        done = step + 1
        last = done == plan.total_steps
        if plan.evaluate_every_steps and (last or done % plan.evaluate_every_steps == 0):
            # Before the checkpoint: whoever resumes from that must find this line in the log.
            run.evaluate(done)
        if last or stop or done % plan.checkpoint_every_steps == 0:
            run.save(done, wait=last or stop)
        else:
            run.hear_of_checkpoint()
        if stop and not last:
            raise Interrupted(
                "Interrupted",
                f"a pod of the training was asked to stop (SIGTERM): the checkpoint of step {done} of "
                f"{plan.total_steps} is written, the next attempt goes on from it",
            )
    return plan.total_steps


@dataclass(frozen=True)
class _Taken:
    """A step (numbered from 0) whose loss and norm are not read yet."""

    step: int
    loss: Number
    norm: Number
    rate: float
    supervised: int
    tokens: int


@dataclass
class _Run:
    """One attempt's state in one rank."""

    backend: Backend
    plan: TrainingPlan
    rows: PreparedRows
    writer: CheckpointWriter
    window: _Window
    progress: Progress
    log: TrainingLog | None
    held_out: PreparedRows | None = None
    unread: list[_Taken] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    logged: Timings = field(default_factory=Timings)
    """The timings at the last log line."""

    def step(self, step: int, stop: bool) -> bool:
        """One optimizer step (numbered from 0). Returns whether any rank wants to stop."""
        backend, plan = self.backend, self.plan
        began = time.monotonic()
        supervised, tokens, attended = self.rows.counts(step)
        if not supervised:
            raise UserError(
                "NothingSupervised",
                f"no token of the global batch of step {step + 1} is supervised: raise dataset.maxLength or the batch",
            )
        self.timings.data_seconds += time.monotonic() - began
        loss, (stopping,) = _take_step(backend, plan, self.rows, step, supervised, [float(stop)], self._timed)
        rate = learning_rate(plan, step)
        # Of a backend that reads late nobody knows yet whether the loss is finite.
        is_safe = backend.reads_late or math.isfinite(loss)
        norm = backend.update(rate, plan.max_gradient_norm) if is_safe else math.nan
        self.unread.append(_Taken(step, loss, norm, rate, supervised, tokens))
        done = step + 1
        is_logged = done == 1 or done % plan.log_every_steps == 0 or done == plan.total_steps
        if is_logged or not backend.reads_late:
            norm = self._read()
        self.timings.step_seconds += time.monotonic() - began
        self.timings.tokens += tokens
        self.timings.steps += 1
        if backend.model_size:
            self.timings.flops += backend.model_size.training_flops(tokens, attended)
        if is_logged:
            self._log(done, rate, norm)
        elif self.log:
            self.progress.stepped(done)
        return stopping > 0

    def evaluate(self, done: int) -> None:
        """Measure the held-out loss after `done` steps and write it to the log; UserError when it is not finite."""
        if self.held_out is None or not (supervised := self.held_out.supervised_in_all()):
            return
        if self.log:
            # No step is told of meanwhile.
            self.progress.evaluating(done)
        share = _held_out_share(self.backend, self.plan, self.held_out)
        loss = self.backend.held_out_loss(share) / supervised
        if not math.isfinite(loss):
            raise UserError(
                "LossNotFinite",
                f"step {done} of {self.plan.total_steps}: held-out loss {loss}: lower training.learningRate, raise "
                "warmupSteps, or use precision fp32; earlier checkpoints stay as they are",
            )
        if self.log:
            line = {"step": done, "validationLoss": loss, "validationTokens": supervised}
            self.log.write_held_out(line)
            self.progress.evaluated(line)

    def save(self, done: int, *, wait: bool) -> None:
        """Begin to write the checkpoint after `done` steps, once the one before is written; with `wait` to its end."""
        self._read()  # nothing is kept before it is known to be finite
        began = time.monotonic()
        if self.log:
            # Until the next step is told of, training stands still for it.
            self.progress.saving(done)
            self.log.sync_curves()
        self._told(self.writer.wait())
        self.writer.start(done, self._state(done))
        self.timings.checkpoints += 1
        if wait:
            self._told(self.writer.wait())
        self.timings.checkpoint_seconds += time.monotonic() - began

    def hear_of_checkpoint(self) -> None:
        """Tell of the checkpoint that has become complete since, if any; raises what its writing raised."""
        self._told(self.writer.poll())

    def _read(self) -> float:
        """Take the loss of the steps since the last call into the window; the last one's norm, NaN where there is none.

        UserError names the first step of which either is no finite number.
        """
        taken, self.unread = self.unread, []
        norm = math.nan
        if taken:
            numbers = self.backend.read([(step.loss, step.norm) for step in taken])
            for step, (loss, norm) in zip(taken, numbers, strict=True):
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise self._not_finite(step, loss, norm)
                self.window.add(loss, step.supervised, step.tokens)
        return norm

    def _not_finite(self, taken: _Taken, loss: float, norm: float) -> UserError:
        return UserError(
            "LossNotFinite" if not math.isfinite(loss) else "GradientNotFinite",
            f"step {taken.step + 1} of {self.plan.total_steps}: loss {loss}, gradient norm {norm}, learning rate "
            f"{taken.rate:.3g}: lower training.learningRate, raise warmupSteps, or use precision fp32; look at the "
            f"rows of that step, {_shown(self.rows.rows_of(taken.step))} of prepare's; earlier checkpoints stay as "
            "they are",
        )

    def _told(self, saved: Saved | None) -> None:
        if saved is None:
            return
        self.timings.writing_seconds += saved.seconds
        if self.log:
            self.progress.saved(saved.step, saved.seconds)

    def _log(self, done: int, rate: float, norm: float) -> None:
        window, self.window = self.window, _Window()
        if not self.log:
            return
        line = {
            "step": done,
            "loss": window.loss_sum / window.supervised,
            "learningRate": rate,
            "gradientNorm": norm,
            "tokens": window.tokens,
            "supervisedTokens": window.supervised,
        }
        speed, self.logged = self._speed(), replace(self.timings)
        self.log.write(line, speed)
        self.progress.logged(line, speed, (self.plan.total_steps - done) * speed.step_seconds)

    def _speed(self) -> Speed:
        """What was measured since the last log line."""
        now, before, backend = self.timings, self.logged, self.backend
        seconds, steps = max(now.step_seconds - before.step_seconds, 1e-9), max(1, now.steps - before.steps)
        return Speed(
            seconds=seconds,
            tokens_per_second=(now.tokens - before.tokens) / seconds,
            step_seconds=seconds / steps,
            data_wait_seconds=(now.data_seconds - before.data_seconds) / steps,
            mfu=utilisation(now.flops - before.flops, seconds, backend.peak_flops, backend.world_size),
            host_memory_bytes=peak_host_memory(),
            device_memory_bytes=backend.device_memory(),
        )

    def _timed(self, chunks: Iterator[tuple[int, MicroBatch]]) -> Iterator[tuple[int, MicroBatch]]:
        """The chunks, with the time that reading each takes."""
        while True:
            began = time.monotonic()
            chunk = next(chunks, None)
            self.timings.data_seconds += time.monotonic() - began
            if chunk is None:
                return
            yield chunk

    def _state(self, done: int) -> dict[str, Any]:
        plan = self.plan
        return {
            "version": FORMAT_VERSION,
            "step": done,
            "totalSteps": plan.total_steps,
            "rowsConsumed": done * plan.global_batch_size,
            "globalBatchSize": plan.global_batch_size,
            "microBatchSize": plan.micro_batch_size,
            "worldSize": self.backend.world_size,
            "seed": plan.seed,
            "scheduler": {
                "type": plan.schedule,
                "learningRate": plan.learning_rate,
                "warmupSteps": plan.warmup_steps,
                "step": done,
            },
            "optimizer": {"type": "adamw", "step": done},
            "identity": dict(plan.identity),
            "window": self.window.as_json(),
            "parameters": {
                name: {"shape": list(facts.shape), "dtype": facts.dtype, "decays": facts.decays}
                for name, facts in self.backend.parameters().items()
            },
        }


def _take_step(
    backend: Backend,
    plan: TrainingPlan,
    rows: PreparedRows,
    step: int,
    supervised: int,
    extras: Sequence[float] = (),
    timed: Callable[[Iterator[tuple[int, MicroBatch]]], Iterator[tuple[int, MicroBatch]]] = iter,
) -> tuple[Number, list[float]]:
    """The gradient of the global batch of `step`, which has `supervised` targets: what Backend.reduce returns."""
    chunks = rows.micro_batches(
        step, plan.micro_batch_size, backend.data_parallel_rank, backend.data_parallel_size, whole=backend.whole_rows
    )
    for number, (chunk, batch) in enumerate(timed(chunks), start=1):
        seed = chunk_seed(plan.seed, step, chunk)
        backend.micro_step(batch, 1.0 / supervised, seed, last=number == plan.micro_steps(backend))
    return backend.reduce(extras)


def _held_out_share(backend: Backend, plan: TrainingPlan, held_out: PreparedRows) -> Iterator[MicroBatch]:
    return held_out_batches(
        held_out,
        plan.micro_batch_size,
        backend.data_parallel_rank,
        backend.data_parallel_size,
        whole=backend.whole_rows,
    )


def _check_identity(backend: Backend, plan: TrainingPlan, checkpoint: Checkpoint) -> None:
    own = {name: [list(facts.shape), facts.dtype] for name, facts in backend.parameters().items()}
    different = differences(plan.identity, checkpoint.state["identity"])
    different += differences(backend.checkpoint_format, checkpoint.format, "format")
    different += differences(backend.layout(), checkpoint.state.get("layout", {}), "parallelism")
    different += differences(own, checkpoint.parameter_facts(), "parameters")
    if different:
        shown = "; ".join(different[:8]) + (f"; and {len(different) - 8} more" if len(different) > 8 else "")
        raise UserError(
            "CheckpointOfAnotherJob",
            f"{checkpoint.path.name} cannot be resumed: {shown}. Restore those fields, or delete the checkpoints to "
            "start over",
        )


def _shown(rows: Tokens) -> str:
    """The first of these row numbers, and how many more there are."""
    first = ", ".join(str(row) for row in rows[:_ROWS_SHOWN])
    return first if len(rows) <= _ROWS_SHOWN else f"{first} and {len(rows) - _ROWS_SHOWN} more"
