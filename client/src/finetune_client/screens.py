"""What people see: status, list, why, plan and report for a terminal of any width from 80 columns, light or dark. Pure.

commands.py prints what these functions return. A job and the time go in, a renderable of rich comes out. Colours are
the terminal's own and never the only sign: every state has its word. Where the terminal cannot show the signs, letters
stand in their place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_client.doctor import Diagnosis, Standing, diagnose, unusual_conditions
from finetune_client.job import Job, JobList, JobReport, duration_text
from finetune_operator.api.constants import Phase, StageState
from finetune_operator.api.status import EvaluationStatus, MemoryParts, PlanStatus, StageStatus, TrainingStatus
from finetune_trainer import contract

GOOD, BAD, BUSY, HOLDS, FAINT, STRONG = "green", "bold red", "cyan", "dark_orange3", "dim", "bold"
"""Dark orange is the one that is not of the terminal's own sixteen: their yellow cannot be read on white."""
CODE = "cyan"
BAR_WIDTH = 36
_LOG_LINES = 12
_QUOTED = re.compile(r"`([^`]+)`")

_SIGNS = {
    StageState.SUCCEEDED: ("✓", "+", GOOD),
    StageState.REUSED: ("✓", "+", GOOD),
    StageState.RUNNING: ("▸", ">", BUSY),
    StageState.STARTING: ("…", "~", BUSY),
    StageState.QUEUED: ("‖", "=", HOLDS),
    StageState.RETRYING: ("↻", "@", HOLDS),
    StageState.SUSPENDED: ("‖", "=", HOLDS),
    StageState.FAILED: ("✗", "x", BAD),
    StageState.SKIPPED: ("-", "-", FAINT),
    StageState.WAITING: ("·", ".", FAINT),
}
_PHASES = {
    Phase.SUCCEEDED: f"bold {GOOD}",
    Phase.FAILED: BAD,
    Phase.QUEUED: f"bold {HOLDS}",
    Phase.SUSPENDED: f"bold {HOLDS}",
    Phase.PENDING: STRONG,
}
_STANDINGS = {
    Standing.FAILED: BAD,
    Standing.RETRIES: f"bold {HOLDS}",
    Standing.WAITS: f"bold {HOLDS}",
    Standing.SUSPENDED: f"bold {HOLDS}",
    Standing.DONE: f"bold {GOOD}",
}


# ---- status


def status_screen(job: Job, now: datetime) -> RenderableType:
    """One job on one screen."""
    status = job.status
    parts: list[RenderableType] = [_head(job, now)]
    if status.stages:
        parts += [Text(), _stages(job, now)]
        parts += [Text(), _progress(job, now)]
    if status.evaluation is not None:
        parts += [Text(), _comparison(status.evaluation)]
    if status.attempts:
        parts += [Text(), _section("Attempts that ended without a result"), _attempts(job, now)]
    diagnosis = diagnose(job)
    unusual = list(unusual_conditions(job))
    if unusual:
        parts += [Text(), _section("Not as it should be")]
        parts += [_indented(_condition(*each, diagnosis.message)) for each in unusual]
    if status.plan is not None:
        parts += [Text(), _section("Plan"), _indented(_plan_figures(status.plan))]
    parts += [Text(), _what_now(job, diagnosis)]
    return Group(*parts)


def _head(job: Job, now: datetime) -> RenderableType:
    """Name and namespace at the left, phase at the right; underneath what is trained on what, and how old it is."""
    row = Table.grid(expand=True)
    row.add_column(ratio=1, overflow="fold")
    row.add_column(justify="right", no_wrap=True)
    name = Text.assemble((job.name, STRONG), ("  ", ""), (f"namespace {job.namespace}", FAINT))
    row.add_row(name, Text(job.phase, _phase_style(job)))
    age = "" if job.created_at is None else f"{duration_text((now - job.created_at).total_seconds())} old"
    started, ended = job.status.start_time, job.status.completion_time
    if started is not None and ended is not None:
        age = f"took {duration_text((ended - started).total_seconds())}, ended {_ago(ended, now)}"
    row.add_row(Text(_wish(job), FAINT), Text(age, FAINT))
    return row


def _wish(job: Job) -> str:
    """`lora of tiny-llama on 2 x cpu`: the spec in a line, as far as it can be read."""
    model, method, accelerator = (_part(job, name) for name in ("model", "method", "accelerator"))
    named = str(model.get("source") or "?").rstrip("/").rpartition("/")[2]
    where = accelerator.get("instanceType") or accelerator.get("type") or "?"
    how = "full fine-tuning" if method.get("type") == "full" else "lora"
    return f"{how} of {named} on {accelerator.get('nodes') or 1} x {where}"


def _part(job: Job, name: str) -> Mapping[str, Any]:
    part = job.plain_spec.get(name)
    return part if isinstance(part, Mapping) else {}


def _stages(job: Job, now: datetime) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True, header_style=FAINT)
    table.add_column("", width=1)
    table.add_column("stage", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("attempt", justify="right", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("", ratio=1, no_wrap=True, overflow="ellipsis")
    for stage in job.status.stages:
        _, _, style = _sign(stage.state)
        faint = FAINT if stage.state in (StageState.WAITING, StageState.SKIPPED) else ""
        table.add_row(
            _Sign(stage.state),
            Text(stage.name, faint),
            Text(stage.state, style),
            Text(str(stage.attempt) if stage.attempt else "", faint),
            Text(duration_text(_seconds(stage, now)), faint),
            Text(_stage_note(stage), FAINT),
        )
    return table


def _stage_note(stage: StageStatus) -> str:
    if stage.state in (StageState.FAILED, StageState.RETRYING, StageState.QUEUED) or (
        stage.state in (StageState.STARTING, StageState.WAITING) and stage.reason not in (None, "Starting", "Waiting")
    ):
        return (stage.reason or "") if stage.reason != stage.state else ""
    if stage.state in (StageState.RUNNING, StageState.STARTING) and stage.nodes:
        shown = ", ".join(stage.nodes[:2])
        return f"on {shown}" + (f" and {len(stage.nodes) - 2} more" if len(stage.nodes) > 2 else "")
    if stage.state == StageState.REUSED:
        return "found complete"
    return ""


def _seconds(stage: StageStatus, now: datetime) -> float | None:
    if stage.duration_seconds is not None:
        return None if stage.state == StageState.SKIPPED else float(stage.duration_seconds)
    if stage.start_time is not None and stage.state in (StageState.RUNNING, StageState.STARTING, StageState.QUEUED):
        return (now - stage.start_time) / timedelta(seconds=1)
    return None


def _progress(job: Job, now: datetime) -> RenderableType:
    share = job.progress or 0.0
    line = Table.grid(padding=(0, 2, 0, 0))
    style = GOOD if job.succeeded else BAD if job.failed else BUSY
    eta = f"about {job.status.eta} left" if job.status.eta else ""
    line.add_row(_Bar(share, style), Text(f"{round(100 * share)}%", STRONG), Text(eta))
    parts: list[RenderableType] = [line]
    if job.status.training is not None:
        parts += [Text(_training_text(job.status.training)), Text(_checkpoint_text(job.status.training, now))]
    return Group(*parts)


def _training_text(training: TrainingStatus) -> str:
    said = []
    if training.step is not None:
        said.append(f"step {training.step:,}" + (f" of {training.total_steps:,}" if training.total_steps else ""))
    if training.loss is not None:
        said.append(f"loss {training.loss:.4g}")
    if training.tokens_per_second is not None:
        said.append(f"{training.tokens_per_second:,.0f} tokens/s")
    if training.mfu is not None:
        said.append(f"MFU {training.mfu:.0%}")
    return ", ".join(said)


def _checkpoint_text(training: TrainingStatus, now: datetime) -> str:
    checkpoint = training.last_checkpoint
    if checkpoint is None:
        return "no checkpoint yet"
    return f"last checkpoint: step {checkpoint.step:,}" + (f", {_ago(checkpoint.time, now)}" if checkpoint.time else "")


def _comparison(evaluation: EvaluationStatus) -> RenderableType:
    """Base against tuned in figures, as far as they were measured: a line for the losses, one for the answers."""
    return Group(*(line for line in (_losses(evaluation), _answers(evaluation)) if line.plain))


def _answers(evaluation: EvaluationStatus) -> Text:
    number, said = evaluation.prompts_compared or 0, []
    for name, base, tuned, form in (
        ("exact match", evaluation.base_exact_match, evaluation.tuned_exact_match, "{:.0%}"),
        ("ROUGE-L", evaluation.base_rouge_l, evaluation.tuned_rouge_l, "{:.2f}"),
    ):
        if base is not None and tuned is not None:
            said.append(f"{name} {form.format(base)} to {form.format(tuned)}")
    return Text(f"expected answers ({number}): {', '.join(said)}" if number and said else "")


def _losses(evaluation: EvaluationStatus) -> Text:
    base, tuned = evaluation.base_loss, evaluation.tuned_loss
    if base is None or tuned is None:
        return Text("")
    text = Text.assemble("held-out loss: base ", (f"{base:.4g}", STRONG), ", tuned ", (f"{tuned:.4g}", STRONG))
    if base > 0:
        change = (tuned - base) / base
        text.append(f" ({change:+.0%})", GOOD if change < 0 else BAD)
    return text


def _attempts(job: Job, now: datetime) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style=HOLDS)
    table.add_column(ratio=1, style=FAINT)
    for attempt in job.status.attempts[-6:]:
        facts = [_ago(attempt.end_time, now) if attempt.end_time is not None else ""]
        facts.append(f"on {attempt.node}" if attempt.node else "")
        facts.append(f"exit {attempt.exit_code}" if attempt.exit_code is not None else "")
        if attempt.lost_steps is not None:
            facts.append(f"{attempt.lost_steps} steps lost")
        if attempt.recovery_seconds is not None:
            facts.append(f"back after {duration_text(attempt.recovery_seconds)}")
        facts.append("" if attempt.counted or job.failed else "not counted")
        table.add_row(
            f"  {attempt.stage} {attempt.attempt}", attempt.reason, Text(", ".join(fact for fact in facts if fact))
        )
    hidden = len(job.status.attempts) - 6
    return table if hidden <= 0 else Group(_indented(Text(f"… and {hidden} before these", FAINT)), table)


def _condition(kind: str, status: str, reason: str, message: str, told: str) -> Text:
    """The condition in a line; its message is left out where it is `told` further below."""
    colour = HOLDS if status == "Unknown" or (kind == "Validated" and status == "True") else BAD
    rest = f" ({reason})" if told.endswith(message) else f" ({reason}): {message}"
    return Text.assemble((f"{kind} is {status}", colour), rest)


def _what_now(job: Job, diagnosis: Diagnosis) -> RenderableType:
    """Two or three sentences: how it stands, why, and what to do."""
    head = _standing_line(diagnosis)
    parts: list[RenderableType] = [head]
    words = "" if _is_uneventful(diagnosis) else _own_words(diagnosis)
    parts += [_indented(Text(each)) for each in (words, diagnosis.follows) if each]
    if diagnosis.standing in (Standing.FAILED, Standing.RETRIES, Standing.WAITS):
        parts.append(_indented(_quoted(f"`finetune why {job.name}` has the evidence and the cure.", job, diagnosis)))
    elif diagnosis.command:
        parts.append(_indented(_quoted(diagnosis.command, job, diagnosis)))
    return Group(*parts)


def _standing_line(diagnosis: Diagnosis) -> Text:
    line = Text.assemble((f"It {_verb(diagnosis.standing)}", _STANDINGS.get(diagnosis.standing, STRONG)))
    if diagnosis.reason and not _is_uneventful(diagnosis):
        line.append(f": {diagnosis.reason}", STRONG)
    return line


def _verb(standing: Standing) -> str:
    if standing in (Standing.WAITS, Standing.RETRIES, Standing.FAILED, Standing.RUNS):
        return str(standing)
    return f"is {standing}"


def _is_uneventful(diagnosis: Diagnosis) -> bool:
    return diagnosis.standing in (Standing.RUNS, Standing.DONE, Standing.NEW, Standing.SUSPENDED)


def _own_words(diagnosis: Diagnosis) -> str:
    """The operator's message, without the stage that the head names; of a plan what its figures do not tell."""
    if diagnosis.standing is Standing.PLANNED:
        return _beyond_the_table(diagnosis.message)
    stage = diagnosis.stage
    return diagnosis.message.removeprefix(f"Stage {stage.name}: ") if stage is not None else diagnosis.message


# ---- why


def why_screen(job: Job, now: datetime) -> RenderableType:
    """The failure doctor in words."""
    diagnosis = diagnose(job)
    about = _about(job, diagnosis)
    head = Text.assemble((f"{about} {_verb(diagnosis.standing)}", _STANDINGS.get(diagnosis.standing, STRONG)))
    if diagnosis.reason:
        head.append(f": {diagnosis.reason}", STRONG)
    parts: list[RenderableType] = [head]
    if _own_words(diagnosis):
        parts.append(_indented(Text(_own_words(diagnosis))))
    if not _is_uneventful(diagnosis):
        parts += list(_causes(job, diagnosis))
        parts += list(_evidence(job, diagnosis, now))
    if diagnosis.log:
        parts += [Text(), _section("Last lines of its log"), *_log_lines(diagnosis.log)]
    parts += [Text(), _section("What happens next"), _indented(Text(diagnosis.follows))]
    advice = [each for each in (*diagnosis.cures, diagnosis.command) if each]
    if advice:
        parts += [Text(), _section("What you can do")]
        parts += [_listed(number, _quoted(each, job, diagnosis)) for number, each in enumerate(advice, 1)]
    return Group(*parts)


def _about(job: Job, diagnosis: Diagnosis) -> str:
    standings = (Standing.FAILED, Standing.RETRIES, Standing.WAITS, Standing.RUNS)
    if diagnosis.stage is None or diagnosis.standing not in standings:
        return job.name
    return f"Stage {diagnosis.stage.name} of {job.name}"


def _causes(job: Job, diagnosis: Diagnosis) -> Iterator[RenderableType]:
    if not any(entry.cause for entry in diagnosis.entries):
        return
    yield Text()
    yield _section("What that means")
    for entry in diagnosis.entries:
        text = Text.assemble((f"{entry.reason}: ", STRONG), _quoted(entry.cause, job, diagnosis))
        yield _indented(text)


def _evidence(job: Job, diagnosis: Diagnosis, now: datetime) -> Iterator[RenderableType]:
    facts = []
    attempt, stage = diagnosis.attempt, diagnosis.stage
    if attempt is not None:
        facts.append(
            f"attempt {attempt.attempt} of {attempt.stage} ended"
            + (f" {_ago(attempt.end_time, now)}" if attempt.end_time is not None else "")
            + (f" with exit code {attempt.exit_code}" if attempt.exit_code is not None else "")
            + (f" on node {attempt.node}" if attempt.node else "")
        )
        if attempt.lost_steps is not None:
            facts.append(f"{attempt.lost_steps} steps were lost since the last checkpoint")
        before = [each for each in job.status.attempts if each.stage == attempt.stage and each is not attempt]
        if before:
            facts.append("before that: " + ", ".join(f"{each.attempt} {each.reason}" for each in before[-5:]))
        if job.status.attempts and diagnosis.standing is Standing.RETRIES:
            counted = sum(each.counted for each in job.status.attempts if each.stage == attempt.stage)
            most = _part(job, "retryPolicy").get("maxRetries", 3)
            facts.append(f"{counted} of {most} retries are used")
    if attempt is not None and attempt.job_name:
        facts.append(f"its Job is {attempt.job_name}")
    elif stage is not None and stage.job_name and diagnosis.standing in (Standing.WAITS, Standing.FAILED):
        facts.append(f"its Job is {stage.job_name}")
    facts += [f"condition {kind} is {status} ({reason})" for kind, status, reason, _ in unusual_conditions(job)]
    if diagnosis.standing in (Standing.WAITS, Standing.FAILED):
        commands = [each for entry in diagnosis.entries for each in _QUOTED.findall(entry.evidence)]
        facts += [f"look with `{each}`" for each in commands if each.startswith("kubectl ")]
    if facts:
        yield Text()
        yield _section("What shows it")
        yield from (_indented(_quoted(fact, job, diagnosis)) for fact in facts)


def _log_lines(lines: Iterable[str]) -> Iterator[RenderableType]:
    shown = list(lines)[-_LOG_LINES:]
    for line in shown:
        yield Padding(Text(_printable(line), overflow="fold"), (0, 0, 0, 4))


def _printable(text: str) -> str:
    """Control characters written out: nothing of a log may drive the terminal."""
    return "".join(each if each.isprintable() or each == "\t" else repr(each)[1:-1] for each in text)


# ---- list


def list_table(jobs: JobList, now: datetime, *, namespaces: bool = False, wide: bool = False) -> RenderableType:
    """A line a job; where the terminal is too narrow for all columns the least needed ones are left out."""
    columns = [
        _Column("NAME", [job.name for job in jobs], shrinks=True),
        _Column("PHASE", [job.phase for job in jobs], styles=[_phase_style(job) for job in jobs]),
        _Column("STAGE", [job.status.stage or "" for job in jobs], drop=3),
        _Column("DONE", [job.status.progress or "" for job in jobs], right=True, drop=4),
        _Column("LEFT", [_without_seconds(job.status.eta or "") for job in jobs], right=True, drop=1),
        _Column("REASON", [job.status.reason or "" for job in jobs], shrinks=True),
        _Column("AGE", [_job_age(job, now) for job in jobs], right=True, drop=2),
    ]
    if namespaces:
        columns.insert(0, _Column("NAMESPACE", [job.namespace for job in jobs], shrinks=True))
    if wide:
        trainings = [job.status.training for job in jobs]
        columns += [
            _Column("STEP", ["" if each is None else str(each.step or "") for each in trainings], right=True),
            _Column("LOSS", [_loss_text(each) for each in trainings], right=True),
            _Column("RESTARTS", [str(job.status.restarts or 0) for job in jobs], right=True),
            _Column("WHAT", [_wish(job) for job in jobs], shrinks=True),
        ]
    return _Columns(columns)


def _phase_style(job: Job) -> str:
    return next((style for phase, style in _PHASES.items() if phase == job.phase), f"bold {BUSY}")


def _loss_text(training: TrainingStatus | None) -> str:
    return "" if training is None or training.loss is None else f"{training.loss:.4g}"


def _without_seconds(eta: str) -> str:
    return re.sub(r"m\d\ds$", "m", eta)


def _job_age(job: Job, now: datetime) -> str:
    return "" if job.created_at is None else _age((now - job.created_at).total_seconds())


@dataclass(frozen=True)
class _Column:
    """One column. `shrinks`: may be cut to _LEAST characters; `drop`: left out for want of room, 1 first, 0 never."""

    title: str
    cells: list[str]
    styles: list[str] | None = None
    right: bool = False
    shrinks: bool = False
    drop: int = 0

    @property
    def width(self) -> int:
        return max(cell_len(each) for each in (self.title, *self.cells))


_LEAST, _GAP = 12, 2


class _Columns:
    """Columns side by side in what width there is."""

    def __init__(self, columns: list[_Column]) -> None:
        self._columns = columns

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = list(self._columns)
        while _needs(columns) > options.max_width and any(each.drop for each in columns):
            columns.remove(min((each for each in columns if each.drop), key=lambda each: each.drop))
        widths = _widths(columns, options.max_width)
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style=FAINT)
        for column, width in zip(columns, widths, strict=True):
            justify: Literal["left", "right"] = "right" if column.right else "left"
            table.add_column(column.title, width=width, justify=justify, no_wrap=True, overflow="ellipsis")
        for row in range(len(columns[0].cells)):
            table.add_row(
                *(Text(each.cells[row], each.styles[row] if each.styles is not None else "") for each in columns)
            )
        yield table


def _needs(columns: list[_Column]) -> int:
    """Least width of all, gaps included."""
    return sum(min(each.width, _LEAST) if each.shrinks else each.width for each in columns) + _GAP * len(columns)


def _widths(columns: list[_Column], room: int) -> list[int]:
    """Every column's width: what shrinks gives way, the widest of it first."""
    widths = [each.width for each in columns]
    while sum(widths) + _GAP * len(columns) > room:
        widest = max((i for i, each in enumerate(columns) if each.shrinks), key=lambda i: widths[i])
        if widths[widest] <= _LEAST // 2:
            break
        widths[widest] -= 1
    return widths


# ---- plan and report


def plan_screen(name: str, plan: PlanStatus, *, note: str = "") -> RenderableType:
    """What a job would take."""
    parts: list[RenderableType] = [Text.assemble((name, STRONG), (", nothing is started", FAINT)), Text()]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=FAINT)
    table.add_column("stage", no_wrap=True)
    table.add_column("pods", justify="right")
    table.add_column("each asks for", no_wrap=False)
    table.add_column("on", no_wrap=True)
    for stage in plan.stages:
        asks = ", ".join(f"{kind} {amount}" for kind, amount in stage.requests.items())
        table.add_row(stage.name, str(stage.pods), asks, stage.instance_type or "any node")
    parts += [table, Text(), _plan_figures(plan)]
    said = _beyond_the_table(plan.message)
    if said:
        parts += [Text(), Text(said)]
    if plan.estimate is not None and plan.estimate.assumptions:
        parts += [Text(), Text(plan.estimate.assumptions, FAINT)]
    if note:
        parts += [Text(), Text(note, FAINT)]
    return Group(*parts)


_DRY_RUN = "Nothing is started: spec.dryRun is true. "
_STAGES_IN_WORDS = re.compile(r"The job would (then )?run [^.]*\. ?")
_TO_START = "Set spec.dryRun to false to start it."


def _beyond_the_table(message: str) -> str:
    """What the plan's message says beside its stages: why it would be refused or wait, and doubts."""
    return _STAGES_IN_WORDS.sub("", message.removeprefix(_DRY_RUN).removesuffix(_TO_START), count=1).strip()


def _plan_figures(plan: PlanStatus) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style=FAINT)
    grid.add_column()
    grid.add_row(
        "training",
        f"{plan.world_size} processes, {plan.data_parallel_size} copies of the model, "
        f"{plan.global_batch_size} rows a step",
    )
    if plan.trainable_parameters is not None:
        grid.add_row("trains", f"{plan.trainable_parameters:,} parameters")
    estimate = plan.estimate
    memory = None if estimate is None else estimate.memory_gib_per_device
    there = None if estimate is None else estimate.device_memory_gib
    if memory is None:
        grid.add_row("memory", "not known before prepare" + ("" if there is None else f"; {there:g} GiB are there"))
    else:
        parts = "" if estimate is None or estimate.parts is None else f" ({_memory_parts(estimate.parts)})"
        room = "" if there is None else f" of {there:g} GiB"
        style = BAD if there is not None and memory > there else ""
        grid.add_row("memory", Text.assemble((f"{memory:g} GiB{room}", style), f" for each process{parts}"))
    hours = None if estimate is None else estimate.train_hours
    grid.add_row("time", "not known" if hours is None else f"about {duration_text(hours * 3600)} of training")
    cost = "not known" if plan.cost is None else f"about {plan.cost.amount:,.2f} {plan.cost.currency}"
    grid.add_row("cost", cost)
    return grid


def _memory_parts(parts: MemoryParts) -> str:
    shown = {name: value for name, value in parts.model_dump().items() if value}
    return ", ".join(f"{name} {value:g}" for name, value in shown.items())


def report_screen(report: JobReport) -> RenderableType:
    """Where results lie, and how the tuned model compares."""
    parts: list[RenderableType] = [Text(report.job, STRONG)]
    if not report.artifacts:
        parts.append(_indented(Text(f"It has no artifact yet. They will lie in {report.folder} on the workspace.")))
        return Group(*parts)
    parts.append(_indented(Text(f"on the workspace, claim {report.claim or '?'}:", FAINT)))
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_column(style=STRONG, no_wrap=True)
    rows.add_column(overflow="fold")
    for name, artifact in report.artifacts.items():
        rows.add_row(name, artifact.path)
    if report.page_path is not None:
        rows.add_row("report", str(report.page or report.page_path))
    parts.append(Padding(rows, (0, 0, 0, 4)))
    if report.evaluation is not None:
        parts += [Text(), _comparison(report.evaluation)]
        for each in report.evaluation.prompts:
            parts += [Text(), Text(_printable(each.prompt), STRONG)]
            for who, answer in (("expected", each.expected), ("base", each.base), ("tuned", each.tuned)):
                if answer is not None:
                    line = Text.assemble((f"{who:<10}", FAINT), _printable(answer.strip()))
                    parts.append(_indented(line))
    return Group(*parts)


# ---- parts


class _Sign:
    """A state's sign, or a letter where the terminal has no such sign."""

    def __init__(self, state: str) -> None:
        self._state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        sign, letter, style = _sign(self._state)
        yield Text(letter if options.ascii_only else sign, style)


class _Bar:
    """A bar that also shows its share where there are no colours."""

    def __init__(self, share: float, style: str) -> None:
        self._share, self._style = min(1.0, max(0.0, share)), style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.ascii_only or not console.is_terminal or console.no_color:
            done = round(BAR_WIDTH * self._share)
            full, empty = ("#", "-") if options.ascii_only else ("━", "╌")
            yield Text(full * done + empty * (BAR_WIDTH - done))
            return
        yield ProgressBar(
            total=100,
            completed=100 * self._share,
            width=BAR_WIDTH,
            style="bright_black",
            complete_style=self._style,
            finished_style=self._style,
        )

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> object:
        from rich.measure import Measurement

        return Measurement(BAR_WIDTH, BAR_WIDTH)


def _sign(state: str) -> tuple[str, str, str]:
    return next((signs for known, signs in _SIGNS.items() if known == state), ("?", "?", ""))


def _section(title: str) -> Text:
    return Text(title, STRONG)


def _indented(what: RenderableType) -> Padding:
    return Padding(what, (0, 0, 0, 2))


def _listed(number: int, text: Text) -> RenderableType:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=4, justify="right")
    grid.add_column()
    grid.add_row(f"{number}.", text)
    return grid


def _quoted(text: str, job: Job, diagnosis: Diagnosis) -> Text:
    """Text with what stands in backquotes as something to type, for this job and stage."""
    out, at = Text(), 0
    for match in _QUOTED.finditer(text):
        out.append(text[at : match.start()])
        out.append(f"`{_for_this(match[1], job, diagnosis)}`", CODE)
        at = match.end()
    out.append(text[at:])
    return out


def _for_this(code: str, job: Job, diagnosis: Diagnosis) -> str:
    """The runbook's placeholders filled in where they can only mean this job."""
    stage = diagnosis.stage.name if diagnosis.stage is not None else contract.TRAIN
    code = code.replace("stages.<name>", f"stages.{stage}").replace("-n NAMESPACE", f"-n {job.namespace}")
    return re.sub(r"\bftj NAME\b", f"ftj {job.name}", code)


def _ago(moment: datetime, now: datetime) -> str:
    return f"{_age((now - moment).total_seconds())} ago"


def _age(seconds: float) -> str:
    """The larger half of a duration: 45s, 3m, 2h, 5d."""
    text = duration_text(seconds)
    match = re.match(r"\d+[dhms]", text)
    return match[0] if match else text
