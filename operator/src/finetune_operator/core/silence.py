"""Children that do not start and whose status does not say why: which they are, and what their newest event says.

A volume that cannot be mounted and a pod that is refused are told in events and nowhere else. Those are read only for
what has been silent for a while, so that a healthy job costs no request. Called by stages.py, which says when to look
again, and surroundings.py, which reads. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from finetune_operator.core.failure_rules import Evidence, find_rule
from finetune_operator.core.observed import Attempt, Note, Pod
from finetune_operator.core.times import UTC, parse_time

SILENT_SECONDS = 10
"""How long a Job may lack a pod, or a pod on a node its container, before its events are read."""
LOOK_AGAIN_SECONDS = 15
"""How often they are read while nothing changes: an image may take long to be pulled, and that is no trouble."""
MOST_ASKED = 8
"""Children of one attempt whose events are read at once: of a large gang the first ones tell enough."""

_BEING_STARTED = ("", "ContainerCreating", "PodInitializing")
_LATE = timedelta(seconds=SILENT_SECONDS)
_EARLIEST = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Silent:
    """A Job without all its pods, or a pod on a node without its container. `since` is when that began."""

    name: str
    uid: str
    since: datetime


def find_silent(attempt: Attempt) -> tuple[Silent, ...]:
    """What of an attempt is on its way and does not say how far; the Job first."""
    job = attempt.job
    if job is None or job.deleting or job.suspended or job.is_over or attempt.recorded is not None:
        return ()
    found: list[Silent] = []
    moments = [job.created_at, job.started_at, *(pod.created_at for pod in attempt.pods)]
    since = max((moment for moment in moments if moment is not None), default=None)
    if since is not None and len(attempt.pods) < job.completions:
        found.append(Silent(job.name, job.uid, since))
    for pod in attempt.pods:
        bound = pod.scheduled_at or pod.created_at
        if bound is not None and _is_being_started(pod):
            found.append(Silent(pod.name, pod.uid, bound))
    return tuple(found)


def _is_being_started(pod: Pod) -> bool:
    if pod.node is None or pod.running or pod.has_ended or pod.deletion_requested_at is not None:
        return False
    return pod.waiting is None or pod.waiting.reason in _BEING_STARTED


def to_ask(attempts: Iterable[Attempt], now: datetime) -> tuple[Silent, ...]:
    """Those that have been silent long enough for their events to be read."""
    return tuple(
        each
        for attempt in attempts
        for each in [silent for silent in find_silent(attempt) if now >= silent.since + _LATE][:MOST_ASKED]
    )


def next_look(silent: Iterable[Silent], now: datetime) -> datetime | None:
    """When the events of these are to be read, for the first time or again; None where nothing is silent."""
    firsts = [each.since + timedelta(seconds=SILENT_SECONDS) for each in silent]
    return min(
        (first if first > now else now + timedelta(seconds=LOOK_AGAIN_SECONDS) for first in firsts), default=None
    )


def newest_warning(events: Iterable[Mapping[str, Any]]) -> Note | None:
    """Reason and words of the newest of an object's events.k8s.io/v1 Events, or None where that is no warning.

    What comes after a warning, such as Pulling after FailedMount, shows that it is over. Of the same second a warning
    counts: a Job's controller makes one pod and is refused another. Warnings of which failure_rules.py knows nothing
    are passed over, such as the scheduler's, who may speak late of a pod that has its node.
    """
    newest = max(filter(_tells, events), key=lambda event: (_told_at(event), _is_warning(event)), default=None)
    return _note(newest) if newest is not None and _is_warning(newest) else None


def find_warned(events: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Uids of the objects that warnings of which failure_rules.py knows something are about."""
    return frozenset(
        uid
        for event in events
        if _is_warning(event) and _tells(event) and (uid := (event.get("regarding") or {}).get("uid"))
    )


def _is_warning(event: Mapping[str, Any]) -> bool:
    return event.get("type") == "Warning"


def _note(event: Mapping[str, Any]) -> Note:
    return Note(event.get("reason") or "", event.get("note") or "")


def _tells(event: Mapping[str, Any]) -> bool:
    note = _note(event)
    known = find_rule(Evidence(event_reason=note.reason, event_message=note.message)) is not None
    return known or not _is_warning(event)


def _told_at(event: Mapping[str, Any]) -> datetime:
    """When it last happened. Which field says so depends on the age of the reporter's client library."""
    texts = (
        (event.get("series") or {}).get("lastObservedTime"),
        event.get("deprecatedLastTimestamp"),
        event.get("eventTime"),
        event["metadata"].get("creationTimestamp"),
    )
    told = next((parse_time(text) for text in texts if text), None)
    return (told or _EARLIEST).replace(microsecond=0)
