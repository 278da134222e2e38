"""A FineTuneJob as the API server gives it, in the operator's own types, with a table for notebooks.

Made by client.py. A job is shown even where its spec is one that this release refuses: that is when somebody wants to
look at it, so the spec is parsed only when it is asked for.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune_operator.api.conditions import find_condition
from finetune_operator.api.constants import ConditionType, Phase, StageState
from finetune_operator.api.finetunejob import FineTuneJobSpec, FineTuneJobStatus, parse_job, parse_spec, parse_status
from finetune_operator.api.problems import SpecError
from finetune_operator.api.status import Artifact, EvaluationStatus, StageStatus
from finetune_operator.core.stages import is_finished
from finetune_operator.core.times import parse_time

_DONE = frozenset({str(StageState.SUCCEEDED), str(StageState.REUSED), str(StageState.SKIPPED)})


@dataclass(frozen=True)
class Job:
    """One FineTuneJob as it was when it was read. `raw` is the object as the API server gave it."""

    raw: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        return str(self._metadata["name"])

    @property
    def namespace(self) -> str:
        return str(self._metadata.get("namespace") or "default")

    @property
    def generation(self) -> int:
        """Counts the changes of the spec."""
        return int(self._metadata.get("generation") or 0)

    @property
    def created_at(self) -> datetime | None:
        return parse_time(self._metadata.get("creationTimestamp"))

    @property
    def is_deleting(self) -> bool:
        return self._metadata.get("deletionTimestamp") is not None

    @cached_property
    def spec(self) -> FineTuneJobSpec:
        """What is wished, defaults filled in. SpecError where this release finds it wrong."""
        return parse_spec(self.raw.get("spec"))

    @cached_property
    def status(self) -> FineTuneJobStatus:
        """What the operator last observed; empty before it has looked."""
        return parse_status(self.raw.get("status"))

    @property
    def plain_spec(self) -> Mapping[str, Any]:
        """The spec as it was written, whether it is right or not."""
        spec = self.raw.get("spec")
        return spec if isinstance(spec, Mapping) else {}

    @property
    def is_suspended(self) -> bool:
        """Whether spec.suspend is set; whether its pods are gone says the condition Suspended."""
        return self.plain_spec.get("suspend") is True

    @property
    def phase(self) -> str:
        """The job in one word, for people."""
        return self.status.phase or str(Phase.PENDING)

    @property
    def is_finished(self) -> bool:
        """Whether the job came to its end under the spec that it has now."""
        try:
            return is_finished(parse_job(self.raw))
        except SpecError:
            end = find_condition(self.status.conditions, ConditionType.SUCCEEDED)
            return end is not None and end.status != "Unknown" and end.observed_generation == self.generation

    @property
    def succeeded(self) -> bool:
        return self.is_finished and self._end == "True"

    @property
    def failed(self) -> bool:
        return self.is_finished and self._end == "False"

    @property
    def current_stage(self) -> StageStatus | None:
        """The first stage that is not done; None before there are any and when all are."""
        return next((stage for stage in self.status.stages if stage.state not in _DONE), None)

    def stage(self, name: str) -> StageStatus | None:
        """The stage of that name, or None while the status has none."""
        return next((stage for stage in self.status.stages if stage.name == name), None)

    @property
    def progress(self) -> float | None:
        """Share of the work that is done, 0 to 1; None before the operator says one."""
        text = (self.status.progress or "").removesuffix("%")
        return int(text) / 100 if text.isdigit() else None

    @property
    def _metadata(self) -> Mapping[str, Any]:
        metadata: Mapping[str, Any] = self.raw["metadata"]
        return metadata

    @property
    def _end(self) -> str:
        end = find_condition(self.status.conditions, ConditionType.SUCCEEDED)
        return "" if end is None else end.status

    def __repr__(self) -> str:
        about = [self.phase, self.status.stage, self.status.progress, self.status.reason]
        return f"<FineTuneJob {self.namespace}/{self.name}: {', '.join(part for part in about if part)}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: head, progress, stages, and the sentence that matters now."""
        status = self.status
        rows = "".join(
            _html_row(stage.name, stage.state, stage.attempt or "", duration_text(stage.duration_seconds))
            for stage in status.stages
        )
        share = 0 if self.progress is None else round(100 * self.progress)
        eta = f" · about {html.escape(status.eta)} left" if status.eta else ""
        bar = (
            f'<progress max="100" value="{share}" style="width:16em;vertical-align:middle"></progress> {share}%{eta}'
            if status.stages
            else ""
        )
        message = (
            f"{status.reason or ''}: {status.message or ''}" if status.message else "The operator has not looked yet."
        )
        return (
            f"<div><b>{html.escape(self.name)}</b> · {html.escape(self.namespace)} · "
            f"<b>{html.escape(self.phase)}</b><br>{bar}"
            + (f"<table><thead>{_html_row('stage', 'state', 'attempt', 'took', cell='th')}</thead>" if rows else "")
            + (f"<tbody>{rows}</tbody></table>" if rows else "<br>")
            + f"{html.escape(message)}</div>"
        )


class JobList(Sequence[Job]):
    """Jobs by namespace and name, with a table for notebooks."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = tuple(sorted(jobs, key=lambda job: (job.namespace, job.name)))

    def __len__(self) -> int:
        return len(self._jobs)

    def __getitem__(self, index: Any) -> Any:
        return self._jobs[index]

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self._jobs))}]"

    def _repr_html_(self) -> str:
        head = _html_row("namespace", "name", "phase", "stage", "progress", "reason", cell="th")
        rows = "".join(
            _html_row(
                job.namespace,
                job.name,
                job.phase,
                job.status.stage or "",
                job.status.progress or "",
                job.status.reason or "",
            )
            for job in self._jobs
        )
        return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


@dataclass(frozen=True)
class JobReport:
    """What a job left behind. Paths are relative to the root of the workspace's volume."""

    job: str
    namespace: str
    claim: str | None
    folder: str
    """The folder that all artifacts of the job lie in."""
    artifacts: Mapping[str, Artifact]
    """The results by what they are: adapter, model, evaluation, and every stage's own under its name."""
    evaluation: EvaluationStatus | None
    page_path: str | None = None
    """report.html on the workspace, once there is something to report of; every stage after train writes it anew."""
    page: Path | None = None
    """The same as a file, where the workspace's volume can be read here and has it."""

    def as_json(self) -> dict[str, Any]:
        """The camelCase JSON object."""
        return {
            "job": self.job,
            "namespace": self.namespace,
            "claim": self.claim,
            "folder": self.folder,
            "artifacts": {name: artifact.as_json() for name, artifact in self.artifacts.items()},
            "evaluation": None if self.evaluation is None else self.evaluation.as_json(),
            "pagePath": self.page_path,
            "page": None if self.page is None else str(self.page),
        }

    def _repr_html_(self) -> str:
        rows = "".join(_html_row(name, artifact.path, artifact.digest) for name, artifact in self.artifacts.items())
        head = _html_row("result", "folder on the workspace", "digest", cell="th")
        return (
            f"<div><b>{html.escape(self.job)}</b> · claim {html.escape(self.claim or '?')}"
            f"<table><thead>{head}</thead><tbody>{rows}</tbody></table></div>"
        )


def duration_text(seconds: float | None) -> str:
    """A duration as it is written in the operator's columns: 45s, 3m20s, 1h05m, 2d3h; "" for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _html_row(*cells: object, cell: str = "td") -> str:
    shown = "".join(
        f'<{cell} style="text-align:left;padding:0 .8em 0 0">{html.escape(str(each))}</{cell}>' for each in cells
    )
    return f"<tr>{shown}</tr>"
