"""Metrics: what /metrics shows, as Prometheus text. One registry for each operator, nothing global but one switch.

handlers.py makes it and feeds it; health.py serves render(). Figures of jobs are shown by the leader only: counters and
histograms grow with status writes, which it alone makes, and gauges over jobs are counted from its cache when they are
asked for. No metric has a job's name as a label: names come and go, and series would pile up without end.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from finetune_operator.api.constants import Phase, StageState
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.core.measures import Measure, Observation
from finetune_trainer import contract

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

_STAGE_BUCKETS = (10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 28800, 86400, 172800)
_WAIT_BUCKETS = (1, 5, 10, 30, 60, 300, 900, 1800, 3600, 14400, 43200, 86400)
_RECOVERY_BUCKETS = (5, 10, 20, 30, 45, 60, 120, 300, 600, 1800, 3600)
_RATIO_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
_RECONCILE_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_REQUEST_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


@dataclass(frozen=True)
class Sources:
    """What is looked up each time that the metrics are asked for."""

    is_leader: Callable[[], bool]
    statuses: Callable[[], Iterable[FineTuneJobStatus]]
    """The newest known status of every FineTuneJob."""
    watch_ages: Callable[[], Mapping[str, float]]
    """Seconds since each watched kind last showed life; a kind that was never listed is missing."""
    now: Callable[[], datetime]


class Metrics:
    """The operator's metrics. `version` is the operator's own."""

    def __init__(self, sources: Sources, version: str) -> None:
        # The library's switch is one for the process. Without it each series has a second one with its time of birth.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Gauge("finetune_build_info", "1, with the operator's version.", ["version"], registry=registry).labels(
            version
        ).set(1)
        self._stage_seconds = Histogram(
            "finetune_stage_duration_seconds",
            "Life of a stage's attempts by result: Succeeded, Reused or Failed.",
            ["stage", "result"],
            buckets=_STAGE_BUCKETS,
            registry=registry,
        )
        self._restarts = Counter(
            "finetune_restarts_total",
            "Restarts of stages after a failure or a preemption, by its reason.",
            ["cause"],
            registry=registry,
        )
        self._lost_steps = Counter(
            "finetune_lost_steps_total", "Optimizer steps done again after failures.", registry=registry
        )
        self._plain = {
            measure: Histogram(f"finetune_{measure}", text, buckets=buckets, registry=registry)
            for measure, text, buckets in (
                (Measure.QUEUE_SECONDS, "Time for which attempts waited for their queue's quota.", _WAIT_BUCKETS),
                (Measure.RECOVERY_SECONDS, "Time from a fault until the next attempt ran.", _RECOVERY_BUCKETS),
                (
                    Measure.GOODPUT,
                    "Share of each training's time that went into steps which were kept.",
                    _RATIO_BUCKETS,
                ),
            )
        }
        self._reconcile_seconds = Histogram(
            "finetune_reconcile_duration_seconds",
            "Time of one round for one job.",
            buckets=_RECONCILE_BUCKETS,
            registry=registry,
        )
        self._reconcile_errors = Counter(
            "finetune_reconcile_errors_total",
            "Rounds that failed, by exception: ClusterError is the API server's, any other a bug.",
            ["kind"],
            registry=registry,
        )
        self._requests = Counter(
            "finetune_api_requests_total",
            "Requests to the API server by HTTP method and code; code 0: no answer came.",
            ["verb", "code"],
            registry=registry,
        )
        self._request_seconds = Histogram(
            "finetune_api_request_duration_seconds",
            "Time until the API server had answered.",
            ["verb"],
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        registry.register(_Present(sources))

    def observe(self, observations: Iterable[Observation]) -> None:
        """Take what one status write showed."""
        for each in observations:
            if each.measure is Measure.STAGE_SECONDS:
                self._stage_seconds.labels(*each.labels).observe(each.value)
            elif each.measure is Measure.RESTARTS:
                self._restarts.labels(*each.labels).inc(each.value)
            elif each.measure is Measure.LOST_STEPS:
                self._lost_steps.inc(each.value)
            else:
                self._plain[each.measure].observe(each.value)

    def reconciled(self, seconds: float, error: BaseException | None = None) -> None:
        """One round of one job took `seconds`, and ended with `error` if it did."""
        self._reconcile_seconds.observe(seconds)
        if error is not None:
            self._reconcile_errors.labels(type(error).__name__).inc()

    def requested(self, verb: str, code: int, seconds: float) -> None:
        """One request to the API server was answered, or (code 0) was not."""
        self._requests.labels(verb, str(code)).inc()
        self._request_seconds.labels(verb).observe(seconds)

    def render(self) -> bytes:
        """The text of /metrics, of type CONTENT_TYPE."""
        return prometheus_client.generate_latest(self._registry)


class _Present(Collector):
    """Gauges of what is so at the moment of the scrape."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def describe(self) -> Iterable[Metric]:
        return ()  # else the registry would collect once to learn the names, before there is anything to collect

    def collect(self) -> Iterator[Metric]:
        leads = self._sources.is_leader()
        leader = GaugeMetricFamily("finetune_leader", "1 in the replica that works, 0 in one that stands by.")
        leader.add_metric([], float(leads))
        yield leader
        ages = GaugeMetricFamily(
            "finetune_watch_last_event_age_seconds",
            "Time since the watch of a kind last showed life: an event, a bookmark or a list.",
            labels=["kind"],
        )
        for kind, age in sorted(self._sources.watch_ages().items()):
            ages.add_metric([kind], age)
        yield ages
        if leads:
            yield from self._of_jobs(tuple(self._sources.statuses()))

    def _of_jobs(self, statuses: tuple[FineTuneJobStatus, ...]) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("finetune_jobs", "FineTuneJobs by phase.", labels=["phase"])
        tally = Tally(status.phase or str(Phase.PENDING) for status in statuses)
        for phase in Phase:
            jobs.add_metric([str(phase)], tally[str(phase)])
        yield jobs
        age = GaugeMetricFamily(
            "finetune_checkpoint_age_seconds",
            "Age of the last checkpoint, or of the start where there is none: the oldest of all trainings that run.",
        )
        age.add_metric([], max((_checkpoint_age(status, self._sources.now()) for status in statuses), default=0.0))
        yield age


def _checkpoint_age(status: FineTuneJobStatus, now: datetime) -> float:
    """Seconds of training that a fault would cost now; 0 for a job that does not train."""
    stage = next(
        (stage for stage in status.stages if stage.name == contract.TRAIN and stage.state == StageState.RUNNING), None
    )
    if stage is None:
        return 0.0
    moments = [stage.start_time]
    if status.training is not None and status.training.last_checkpoint is not None:
        moments.append(status.training.last_checkpoint.time)
    known = [moment for moment in moments if moment is not None]
    return max(0.0, (now - max(known)) / timedelta(seconds=1)) if known else 0.0
