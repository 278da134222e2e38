"""What a FineTuneJob's status looks like while it runs: a table for a terminal, lines of changes for a log file.

Pure: a status, the last event and the time in, text out. Fits 80 columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BAR_WIDTH = 12

_SIGNS = {
    "Succeeded": ("✓", "green"),
    "Reused": ("✓", "green"),
    "Starting": ("…", "yellow"),
    "Running": ("▸", "cyan"),
    "Retrying": ("↻", "yellow"),
    "Suspended": ("‖", "yellow"),
    "Failed": ("✗", "red"),
    "Skipped": ("-", "bright_black"),
    "Waiting": ("·", "bright_black"),
}


@dataclass(frozen=True)
class Outcome:
    """How the job ended; `stage` is the one that failed, "" where none did."""

    succeeded: bool
    reason: str
    message: str
    stage: str


def outcome(job: Mapping[str, Any]) -> Outcome | None:
    """The end of the job's present generation; None while it is under way."""
    status = job.get("status") or {}
    generation = job["metadata"].get("generation", 0)
    conditions = {condition["type"]: condition for condition in status.get("conditions") or ()}
    for name, ended in (("Succeeded", ("True", "False")), ("Validated", ("False",))):
        found = conditions.get(name, {})
        if found.get("status") in ended and found.get("observedGeneration", 0) >= generation:
            failed = [stage["name"] for stage in status.get("stages") or () if stage.get("state") == "Failed"]
            good = name == "Succeeded" and found["status"] == "True"
            return Outcome(good, found.get("reason", ""), found.get("message", ""), failed[0] if failed else "")
    return None


def seconds(value: float) -> str:
    """A duration as people say it: `9 s`, `2 min 5 s`."""
    whole = max(0, round(value))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def stage_seconds(stage: Mapping[str, Any], now: datetime) -> float | None:
    """How long the stage took, or takes so far; None before its start."""
    if stage.get("durationSeconds") is not None:
        return float(stage["durationSeconds"])
    if stage.get("startTime") and stage.get("state") in ("Starting", "Running"):
        started = datetime.fromisoformat(stage["startTime"].replace("Z", "+00:00"))
        return max(0.0, (now - started).total_seconds())
    return None


def render(job: Mapping[str, Any], event: str, elapsed: float, now: datetime) -> RenderableType:
    """The whole view: a headline, one row a stage, the reason, the last event. `elapsed` is the demo's, in seconds."""
    status = job.get("status") or {}
    metadata = job["metadata"]
    parts = [f"{metadata['namespace']}/{metadata['name']}", status.get("phase") or "Pending", status.get("progress")]
    head = Text("  ".join(part for part in parts if part), style="bold")
    if status.get("eta") and outcome(job) is None:
        head.append(f"  about {status['eta']} left")
    head.append(f"  {seconds(elapsed)}", style="bright_black")
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(width=11)
    table.add_column(width=9)
    table.add_column(width=11, justify="right")
    table.add_column()
    for stage in status.get("stages") or ():
        sign, style = _SIGNS.get(stage["state"], ("?", ""))
        taken = stage_seconds(stage, now)
        table.add_row(
            Text(sign, style),
            Text(stage["name"]),
            Text(stage["state"], style),
            Text("" if taken is None or stage["state"] == "Skipped" else seconds(taken)),
            _stage_note(stage, status.get("training") or {}),
        )
    rows: list[RenderableType] = [head, table]
    if status.get("message"):
        rows.append(Text(f"{status.get('reason', '')}: {status['message']}", overflow="fold"))
    if event:
        rows.append(Text(f"last event: {event}", style="bright_black", overflow="ellipsis", no_wrap=True))
    return Group(*rows)


def _stage_note(stage: Mapping[str, Any], training: Mapping[str, Any]) -> RenderableType:
    attempt = f"attempt {stage['attempt']}" if stage.get("attempt", 0) > 1 else ""
    if stage["name"] != "train" or not training.get("totalSteps") or stage["state"] in ("Waiting", "Skipped"):
        return Text(attempt)
    text = Text(" ".join(part for part in (training_text(training), attempt) if part), no_wrap=True)
    if stage["state"] != "Running":
        return text
    line = Table.grid(padding=(0, 1))
    line.add_row(ProgressBar(total=training["totalSteps"], completed=training.get("step") or 0, width=BAR_WIDTH), text)
    return line


def training_text(training: Mapping[str, Any]) -> str:
    """`120/240 loss 0.412`, as far as it is known."""
    loss = training.get("loss")
    parts = [f"{training.get('step') or 0}/{training['totalSteps']}", "" if loss is None else f"loss {loss:.3g}"]
    return " ".join(part for part in parts if part)


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """One line for each thing that is new in the status `after`: stages that moved, and each tenth of the training."""
    training = after.get("training") or {}
    if training.get("totalSteps") and _tenth(training) > _tenth(before.get("training") or {}):
        yield f"train: step {training_text(training)}"
    known = {stage["name"]: stage for stage in before.get("stages") or ()}
    for stage in after.get("stages") or ():
        earlier = known.get(stage["name"], {"state": "Waiting", "attempt": 0})
        if (stage["state"], stage.get("attempt", 0)) != (earlier["state"], earlier.get("attempt", 0)):
            taken = stage.get("durationSeconds")
            note = f" in {seconds(taken)}" if taken is not None and stage["state"] in ("Succeeded", "Failed") else ""
            again = f" (attempt {stage['attempt']})" if stage.get("attempt", 0) > 1 else ""
            why = f": {stage['message']}" if stage["state"] in ("Retrying", "Failed") and stage.get("message") else ""
            yield f"{stage['name']}: {stage['state']}{note}{again}{why}"
    if after.get("reason") and after.get("reason") != before.get("reason") and not after.get("stages"):
        yield f"{after['reason']}: {after.get('message', '')}"


def _tenth(training: Mapping[str, Any]) -> int:
    return 10 * (training.get("step") or 0) // training["totalSteps"] if training.get("totalSteps") else 0
