"""The failure doctor in words: what a job stands at, why, what shows it, and what to do. Pure.

screens.py shows it for `why`, and its two sentences at the end of `status`. It judges nothing itself: reason and
message are the operator's (core/failure.py), causes and cures the runbook's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from finetune_client.job import Job
from finetune_client.runbook import Entry, entries
from finetune_operator.api.conditions import find_condition
from finetune_operator.api.constants import ConditionType, Reason, StageState
from finetune_operator.api.status import AttemptStatus, StageStatus

_WORD = re.compile(r"\b[A-Z][A-Za-z0-9]+\b")
_MOST_ENTRIES = 3
_HEALTHY = frozenset(
    {
        Reason.VALID,
        Reason.PENDING,
        Reason.WAITING,
        Reason.STARTING,
        Reason.RUNNING,
        Reason.COMPLETED,
        Reason.REUSED,
        Reason.SKIPPED,
        Reason.NOT_SUSPENDED,
        Reason.SUSPENDING,
        Reason.SUSPENDED,
        Reason.DRY_RUN,
    }
)


class Standing(StrEnum):
    """How a job stands, as a person would say it."""

    NEW = "not looked at yet"
    RUNS = "runs"
    WAITS = "waits"
    RETRIES = "tries again"
    SUSPENDED = "suspended"
    PLANNED = "planned, not started"
    FAILED = "failed"
    DONE = "finished"


@dataclass(frozen=True)
class Diagnosis:
    """What there is to say. `entries` are the runbook's, the most particular reason last."""

    standing: Standing
    reason: str
    message: str
    stage: StageStatus | None
    attempt: AttemptStatus | None
    """The attempt that ended last, where that is what the job stands at."""
    entries: tuple[Entry, ...]
    log: tuple[str, ...]
    """Last lines of the failing container."""
    follows: str
    """What happens next by itself, as a sentence."""
    cures: tuple[str, ...]
    """What the runbook advises, for the most particular reason first."""
    command: str
    """The command that goes on from here, as a sentence; "" where there is nothing to do."""


def diagnose(job: Job) -> Diagnosis:
    """How the job stands and why."""
    status, stage = job.status, job.current_stage
    standing = _standing(job)
    reason, message = status.reason or "", status.message or ""
    validated = find_condition(status.conditions, ConditionType.VALIDATED)
    if standing is Standing.PLANNED and validated is not None and validated.status == "False":
        reason, message = validated.reason, validated.message  # what would keep it from running, once it is let
    attempt = None
    if standing in (Standing.FAILED, Standing.RETRIES) and stage is not None:
        attempt = next((each for each in reversed(status.attempts) if each.stage == stage.name), None)
    found = tuple(_entries(reason, message))
    log: tuple[str, ...] = ()
    if standing in (Standing.FAILED, Standing.RETRIES):
        log = (stage.log if stage is not None else ()) or (attempt.log if attempt is not None else ())
    return Diagnosis(
        standing=standing,
        reason=reason,
        message=message,
        stage=stage,
        attempt=attempt,
        entries=found,
        log=log,
        follows=_follows(job, standing),
        cures=tuple(_cures(standing, found)),
        command=_command(job, standing),
    )


def _standing(job: Job) -> Standing:
    status, stage = job.status, job.current_stage
    if job.succeeded:
        return Standing.DONE
    if job.failed:
        return Standing.FAILED
    if not status.conditions or (status.observed_generation or 0) < job.generation:
        return Standing.NEW
    if status.reason == Reason.DRY_RUN:
        return Standing.PLANNED
    if job.is_suspended:
        return Standing.SUSPENDED
    if stage is not None and stage.state == StageState.RETRYING:
        return Standing.RETRIES
    if stage is not None and stage.state == StageState.RUNNING:
        return Standing.RUNS
    if status.reason not in _HEALTHY or (stage is not None and stage.state == StageState.QUEUED):
        return Standing.WAITS
    return Standing.RUNS


def _entries(reason: str, message: str) -> Iterator[Entry]:
    """The reason's own row, then those of reasons that the message names, such as a stage's."""
    known, told = entries(), set[str]()
    for word in (reason, *_WORD.findall(message)):
        if word in known and word not in told and len(told) < _MOST_ENTRIES:
            told.add(word)
            yield known[word]


def _follows(job: Job, standing: Standing) -> str:
    stage = job.current_stage
    name = stage.name if stage is not None else "the first stage"
    if standing is Standing.NEW:
        return "The operator looks at it within seconds; if it does not, it is not running."
    if standing is Standing.RUNS:
        return "It goes on by itself; nothing is wrong."
    if standing is Standing.WAITS:
        return f"Stage {name} begins by itself as soon as the cause is gone."
    if standing is Standing.RETRIES:
        return f"The next attempt of {name} starts by itself" + (
            ", from the last complete checkpoint." if name == "train" else "."
        )
    if standing is Standing.SUSPENDED:
        held = find_condition(job.status.conditions, ConditionType.SUSPENDED)
        if held is None or held.status != "True":
            return "Its pods have time to write a checkpoint; then it holds still."
        return "It holds still until it is resumed; what is finished is kept."
    if standing is Standing.PLANNED:
        return "Nothing is started while spec.dryRun is true."
    if standing is Standing.FAILED:
        return "Nothing more happens by itself. What is finished is kept."
    return "Nothing more to do."


def _cures(standing: Standing, found: tuple[Entry, ...]) -> Iterator[str]:
    for entry in reversed(found if standing not in (Standing.RUNS, Standing.DONE) else ()):
        cure = entry.cure.removeprefix("none; ")
        if cure not in ("", "none", "nothing") and "see the stage's reason" not in cure:
            yield _sentence(cure)


def _command(job: Job, standing: Standing) -> str:
    name = job.name
    refused = find_condition(job.status.conditions, ConditionType.VALIDATED)
    if refused is not None and refused.status == "False":
        return "Correct the manifest and apply it again with `kubectl apply -f`: it is checked anew."
    if standing is Standing.FAILED:
        return (
            f"`finetune retry {name}` goes on with the stage that failed, once the cause is gone; a corrected manifest "
            "is taken up by itself after `kubectl apply -f`."
        )
    if standing is Standing.SUSPENDED:
        return f"`finetune resume {name}` lets it go on."
    if standing is Standing.PLANNED:
        patch = '{"spec":{"dryRun":false}}'
        return f"`kubectl patch ftj {name} --type=merge -p '{patch}'` starts it."
    if standing is Standing.DONE:
        return f"`finetune report {name}` says where the results lie."
    if standing is Standing.NEW:
        return "`kubectl get deploy -A -l app.kubernetes.io/name=finetune-operator` shows whether the operator runs."
    return ""


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def unusual_conditions(job: Job) -> Iterator[tuple[str, str, str, str]]:
    """(type, status, reason, message) of each condition that is not as it should be by now.

    Those of stages are left out, for the stages' own rows say the same; Succeeded is the head of every screen.
    """
    expected = {
        ConditionType.VALIDATED: ("True",),
        ConditionType.STORAGE_READY: ("True", "Unknown"),
        ConditionType.QUOTA_RESERVED: ("True",),
        ConditionType.HEALTHY: ("True",),
    }
    for condition in job.status.conditions:
        usual = next((values for kind, values in expected.items() if kind == condition.type), None)
        doubts = condition.type == ConditionType.VALIDATED and condition.message.count(". ") > 0
        if usual is not None and (condition.status not in usual or doubts) and not job.is_finished:
            yield condition.type, condition.status, condition.reason, condition.message
