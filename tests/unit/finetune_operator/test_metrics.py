"""Metrics: numbers from changes of a status, each counted once, and the text that Prometheus reads."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from finetune_operator.api.constants import Phase, Reason, StageState
from finetune_operator.api.finetunejob import parse_status
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.core.measures import Measure, Observation, derive_goodput, derive_observations
from finetune_operator.core.observed import Attempt, StageJob
from finetune_operator.core.records import Outcome, Result
from finetune_operator.core.stages import StagePlan
from finetune_operator.kube.client import ClusterError
from finetune_operator.metrics import Metrics, Sources
from finetune_trainer import contract

NOW = datetime(2026, 1, 2, 4, 0, 0, tzinfo=timezone.utc)


def train(attempt: int = 1, state: str = "Running", **fields: Any) -> dict[str, Any]:
    return {
        "name": "train",
        "state": state,
        "attempt": attempt,
        "jobName": f"tiny-train-0123abcd-{attempt}",
        "inputDigest": "sha256:01",
        "startTime": "2026-01-02T03:00:00Z",
        **fields,
    }


def ended(attempt: int = 1, **fields: Any) -> dict[str, Any]:
    return {
        "stage": "train",
        "attempt": attempt,
        "jobName": f"tiny-train-0123abcd-{attempt}",
        "endTime": "2026-01-02T03:10:00Z",
        "reason": "NodeFault",
        **fields,
    }


def preempted(minute: int, **fields: Any) -> dict[str, Any]:
    """A preemption by the queue, `minute` minutes after the stage's start. The attempt goes on later."""
    return ended(reason="Preempted", counted=False, endTime=f"2026-01-02T03:{minute:02d}:00Z", **fields)


def status(*stages: dict[str, Any], attempts: Iterable[dict[str, Any]] = (), **fields: Any) -> FineTuneJobStatus:
    return parse_status({"stages": list(stages), "attempts": list(attempts), **fields})


FAILED = Observation(Measure.STAGE_SECONDS, 600, ("train", "Failed"))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        pytest.param(status(), status(train()), [], id="a stage that begins"),
        pytest.param(
            status(train()),
            status(train(state="Succeeded", durationSeconds=90)),
            [Observation(Measure.STAGE_SECONDS, 90, ("train", "Succeeded"))],
            id="a stage that succeeds",
        ),
        pytest.param(
            status(train()),
            status(train(state="Reused", durationSeconds=1), training={"goodput": 0.9}),
            [Observation(Measure.STAGE_SECONDS, 1, ("train", "Reused")), Observation(Measure.GOODPUT, 0.9)],
            id="a stage that finds its artifact",
        ),
        pytest.param(
            status(train()), status(train(state="Retrying"), attempts=[ended()]), [FAILED], id="an attempt that fails"
        ),
        pytest.param(
            status(train()),
            status(train(2, "Starting"), attempts=[ended(lostSteps=7)]),
            [FAILED, Observation(Measure.LOST_STEPS, 7), Observation(Measure.RESTARTS, 1, ("NodeFault",))],
            id="an attempt that fails and is followed at once",
        ),
        pytest.param(
            status(train(2, "Starting"), attempts=[ended(lostSteps=7)]),
            status(train(2), attempts=[ended(lostSteps=7, recoverySeconds=21)]),
            [Observation(Measure.RECOVERY_SECONDS, 21)],
            id="the next attempt runs",
        ),
        pytest.param(
            status(train()),
            status(train(state="Failed"), attempts=[ended(reason="UserError")]),
            [FAILED],
            id="a failure without another attempt",
        ),
        pytest.param(
            status(train(state="Suspended")), status(train(2, "Starting")), [], id="resumed after a suspension"
        ),
        pytest.param(
            status(train()),
            status(train(state="Starting"), attempts=[preempted(10, lostSteps=5)]),
            [Observation(Measure.LOST_STEPS, 5)],
            id="preempted by the queue, which is no end of the attempt",
        ),
        pytest.param(
            status(train(state="Starting"), attempts=[preempted(10, lostSteps=5)]),
            status(train(), attempts=[preempted(10, lostSteps=5, recoverySeconds=60)]),
            [Observation(Measure.RECOVERY_SECONDS, 60), Observation(Measure.RESTARTS, 1, ("Preempted",))],
            id="admitted again after a preemption",
        ),
        pytest.param(
            status(train(), attempts=[preempted(10, lostSteps=5, recoverySeconds=60)]),
            status(train(), attempts=[preempted(10, lostSteps=5, recoverySeconds=60), preempted(20, lostSteps=2)]),
            [Observation(Measure.LOST_STEPS, 2)],
            id="preempted a second time in one attempt",
        ),
        pytest.param(
            status(train(), attempts=[preempted(5, lostSteps=5, recoverySeconds=60)]),
            status(train(2, "Starting"), attempts=[preempted(5, lostSteps=5, recoverySeconds=60), ended()]),
            [FAILED, Observation(Measure.RESTARTS, 1, ("NodeFault",))],
            id="an attempt that outlived a preemption and fails later",
        ),
        pytest.param(
            status(train(state="Suspended"), attempts=[preempted(5, lostSteps=5, recoverySeconds=60)]),
            status(train(2, "Starting"), attempts=[preempted(5, lostSteps=5, recoverySeconds=60)]),
            [],
            id="an attempt that outlived a preemption and is suspended later",
        ),
        pytest.param(
            status(train(3, "Succeeded", durationSeconds=5)),
            status(train(1, "Starting", inputDigest="sha256:02")),
            [],
            id="changed inputs begin anew",
        ),
        pytest.param(
            status(train(state="Starting")),
            status(train(state="Starting", queueSeconds=40)),
            [Observation(Measure.QUEUE_SECONDS, 40)],
            id="admitted by the queue",
        ),
        pytest.param(
            status(train(queueSeconds=40)),
            status(train(2, queueSeconds=3), attempts=[ended()]),
            [FAILED, Observation(Measure.QUEUE_SECONDS, 3), Observation(Measure.RESTARTS, 1, ("NodeFault",))],
            id="the next attempt is admitted",
        ),
    ],
)
def test_a_change_of_the_status_is_measured_once(
    before: FineTuneJobStatus, after: FineTuneJobStatus, expected: list[Observation]
) -> None:
    assert list(derive_observations(before, after)) == expected
    assert derive_observations(after, after) == ()


def finished_training(**metrics: Any) -> StagePlan:
    """Two attempts: the first began at NOW, the second ended 1000 seconds later."""
    report = contract.Report(contract.TRAIN, 0, metrics=metrics)
    attempts = (
        Attempt("train", "01", 1, job=StageJob(name="a", completions=1, created_at=NOW)),
        Attempt("train", "01", 2),
    )
    outcomes = (
        Outcome(Result.RETRY, Reason.NODE_LOST, finished_at=NOW + timedelta(seconds=300)),
        Outcome(Result.SUCCEEDED, Reason.COMPLETED, finished_at=NOW + timedelta(seconds=1000), report=report),
    )
    return StagePlan("train", StageState.SUCCEEDED, Reason.COMPLETED, attempts=attempts, outcomes=outcomes)


def test_goodput_is_the_share_of_kept_steps() -> None:
    # 60 of 100 steps in 480 s are 8 s a step; 100 of them take 800 s of the 1000 that passed
    assert derive_goodput(finished_training(totalSteps=100, resumedFromStep=40, stepSeconds=480.0)) == 0.8


@pytest.mark.parametrize(
    "metrics",
    [
        pytest.param({}, id="an older trainer's report"),
        pytest.param({"totalSteps": 100, "resumedFromStep": 40, "stepSeconds": "480"}, id="a text"),
        pytest.param({"totalSteps": 100, "resumedFromStep": 100, "stepSeconds": 0.0}, id="nothing was left to do"),
    ],
)
def test_goodput_that_cannot_be_known_is_not_told(metrics: dict[str, Any]) -> None:
    assert derive_goodput(finished_training(**metrics)) is None


@dataclass
class Cluster:
    """What the sources of the metrics see."""

    leads: bool = True
    statuses: list[FineTuneJobStatus] = field(default_factory=list)
    ages: dict[str, float] = field(default_factory=lambda: {"Job": 3.5, "Pod": 0.25})

    def metrics(self) -> Metrics:
        return Metrics(Sources(lambda: self.leads, lambda: self.statuses, lambda: self.ages, lambda: NOW), "1.2.3")


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample as Prometheus' own parser reads it, by its name and labels."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_the_leader_shows_its_jobs() -> None:
    running = train(startTime="2026-01-02T03:00:00Z")
    checkpoint = {"lastCheckpoint": {"step": 5, "time": "2026-01-02T03:55:00Z"}}
    cluster = Cluster(
        statuses=[
            status(running, phase="Training", training=checkpoint),
            status(phase="Succeeded"),
            status(phase="Succeeded"),
            status(),
        ]
    )
    found = samples(cluster.metrics())
    phases = {name: value for name, value in found.items() if name.startswith("finetune_jobs{")}
    assert phases == {
        f"finetune_jobs{{phase={phase}}}": {"Training": 1, "Succeeded": 2, "Pending": 1}.get(phase, 0)
        for phase in Phase
    }
    assert found["finetune_checkpoint_age_seconds{}"] == 300
    assert found["finetune_leader{}"] == 1
    assert found["finetune_watch_last_event_age_seconds{kind=Pod}"] == 0.25
    assert found["finetune_build_info{version=1.2.3}"] == 1
    assert found["process_resident_memory_bytes{}"] > 0


def test_a_training_without_a_checkpoint_counts_from_its_start() -> None:
    cluster = Cluster(statuses=[status(train(), phase="Training")])
    assert samples(cluster.metrics())["finetune_checkpoint_age_seconds{}"] == 3600


def test_a_standby_shows_no_jobs() -> None:
    found = samples(Cluster(leads=False, statuses=[status(phase="Training")]).metrics())
    assert found["finetune_leader{}"] == 0
    assert not [name for name in found if name.startswith(("finetune_jobs", "finetune_checkpoint_age"))]
    assert found["finetune_watch_last_event_age_seconds{kind=Job}"] == 3.5


def test_what_is_observed_is_shown() -> None:
    metrics = Cluster().metrics()
    metrics.observe(
        [
            FAILED,
            Observation(Measure.RESTARTS, 1, ("NodeFault",)),
            Observation(Measure.LOST_STEPS, 7),
            Observation(Measure.RECOVERY_SECONDS, 21),
            Observation(Measure.QUEUE_SECONDS, 40),
            Observation(Measure.GOODPUT, 0.9),
        ]
    )
    metrics.reconciled(0.004)
    metrics.reconciled(0.03, ClusterError(409, "Conflict", "no"))
    metrics.requested("PATCH", 200, 0.003)
    metrics.requested("GET", 0, 30)
    found = samples(metrics)
    assert found["finetune_stage_duration_seconds_sum{result=Failed,stage=train}"] == 600
    assert found["finetune_restarts_total{cause=NodeFault}"] == 1
    assert found["finetune_lost_steps_total{}"] == 7
    assert found["finetune_time_to_recover_seconds_bucket{le=30.0}"] == 1
    assert found["finetune_time_to_recover_seconds_bucket{le=20.0}"] == 0
    assert found["finetune_queue_wait_seconds_sum{}"] == 40
    assert found["finetune_goodput_ratio_sum{}"] == 0.9
    assert found["finetune_reconcile_duration_seconds_count{}"] == 2
    assert found["finetune_reconcile_errors_total{kind=ClusterError}"] == 1
    assert found["finetune_api_requests_total{code=200,verb=PATCH}"] == 1
    assert found["finetune_api_requests_total{code=0,verb=GET}"] == 1
    assert not [name for name in found if "_created" in name]


def test_operators_in_one_process_share_nothing() -> None:
    first, second = Cluster().metrics(), Cluster().metrics()
    first.observe([Observation(Measure.LOST_STEPS, 7)])
    assert samples(second)["finetune_lost_steps_total{}"] == 0


def test_no_series_names_a_job() -> None:
    metrics = Cluster(statuses=[status(train(), phase="Training")]).metrics()
    metrics.observe([FAILED])
    labels = set(re.findall(r'[{,]([a-z]+)="', metrics.render().decode()))
    assert labels <= {"stage", "result", "cause", "kind", "verb", "code", "phase", "version", "le"}
