"""The cache: events that come twice, late, out of order or not at all end in the same picture."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from typing import Any

from builders import job_body
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import Simulation

from finetune_operator.core.cache import JOB, NODE, POD, SERVICE, Cache, Wake
from finetune_operator.core.desired import desired_state
from finetune_operator.core.stages import derive_pipeline
from finetune_trainer.contract import ExitCode

Raw = dict[str, Any]
UID = job_body()["metadata"]["uid"]
KEY = ("team-a", "tiny")
KINDS = {JOB: "jobs", POD: "pods", SERVICE: "services"}


class Recorder:
    """Plays a history in a simulation and notes every change as the watch event that an API server would send."""

    def __init__(self) -> None:
        self.simulation = Simulation()
        self.events: list[tuple[str, str, Raw]] = []
        self.version = 100
        self._before: dict[tuple[str, str], Raw] = {}
        self._versions: dict[tuple[str, str], int] = {}
        self._births = 0

    def note(self) -> None:
        """Compare with the last look: what is new, changed or gone becomes an event."""
        now = {
            (kind, name): copy.deepcopy(raw)
            for kind, attribute in KINDS.items()
            for name, raw in getattr(self.simulation, attribute).items()
        }
        for key, raw in now.items():
            if self._before.get(key) != raw:
                self.version += 1
                self._versions[key] = self.version
                kind = "MODIFIED" if key in self._before else "ADDED"
                self.events.append((kind, key[0], self.stamped(key, raw)))
        for key in [key for key in self._before if key not in now]:
            self.version += 1
            self._versions[key] = self.version
            self.events.append(("DELETED", key[0], self.stamped(key, self._before[key])))
        self._before = now

    def stamped(self, key: tuple[str, str], raw: Raw) -> Raw:
        metadata = {**raw["metadata"], "namespace": "team-a", "resourceVersion": str(self._versions[key])}
        return {**copy.deepcopy(raw), "metadata": metadata}

    def lists(self) -> dict[str, list[Raw]]:
        """What is there now, as a list of each kind."""
        return {kind: [self.stamped(key, raw) for key, raw in self._before.items() if key[0] == kind] for kind in KINDS}

    def play(self, moves: Iterable[str]) -> None:
        self.simulation.settle()
        self.note()
        for move in moves:
            current = self.simulation.body["status"]["stage"].split()[-1]
            pods = [pod for pod in self.simulation.pods_of(current) if pod["status"]["phase"] == "Pending"]
            if move == "run" and pods:
                self.simulation.run_stage(current)
            elif move == "fail" and pods:
                self.simulation.fail_stage(current, ExitCode.RETRYABLE)
            elif move in ("suspend", "resume"):
                self.simulation.change(suspend=move == "suspend")
            self.note()
            self.simulation.settle(120)
            self.note()


def feed(cache: Cache, events: Iterable[tuple[str, str, Raw]]) -> None:
    for event, kind, raw in events:
        if event == "DELETED":
            cache.remove(kind, raw)
        else:
            cache.put(kind, raw)


def relist(cache: Cache, recorder: Recorder) -> None:
    for kind, raws in recorder.lists().items():
        cache.replace_all(kind, raws, recorder.version)


moves = st.lists(st.sampled_from(["run", "run", "fail", "suspend", "resume"]), max_size=6)


@settings(max_examples=25, deadline=None)
@given(moves, st.randoms(use_true_random=False))
def test_any_order_with_duplicates_reaches_the_state_of_the_right_order(
    history: list[str], chance: random.Random
) -> None:
    recorder = Recorder()
    recorder.play(history)
    right, mixed = Cache(), Cache()
    feed(right, recorder.events)
    shuffled = [*recorder.events, *chance.choices(recorder.events, k=len(recorder.events))]
    chance.shuffle(shuffled)
    feed(mixed, shuffled)
    assert mixed.observe(UID) == right.observe(UID)


@settings(max_examples=25, deadline=None)
@given(moves, st.randoms(use_true_random=False))
def test_gaps_are_closed_by_the_next_list_and_the_same_is_decided(history: list[str], chance: random.Random) -> None:
    recorder = Recorder()
    recorder.play(history)
    whole, torn = Cache(), Cache()
    feed(whole, recorder.events)
    feed(torn, [event for event in recorder.events if chance.random() < 0.5])
    relist(torn, recorder)
    assert torn.observe(UID) == whole.observe(UID)
    simulation = recorder.simulation
    decisions = []
    for cache in (whole, torn):
        observed = cache.observe(UID)
        pipeline = derive_pipeline(simulation.job, observed, simulation.settings, simulation.now)
        decisions.append(desired_state(simulation.job, observed, pipeline, simulation.settings, simulation.now))
    assert decisions[0] == decisions[1]


def test_what_we_wrote_after_a_list_was_made_is_not_lost_by_it() -> None:
    recorder = Recorder()
    recorder.play([])
    cache = Cache()
    feed(cache, recorder.events)
    cache.replace_all(JOB, [], list_version=recorder.version - 50)
    assert cache.observe(UID).attempts[0].job is not None
    assert cache.replace_all(JOB, [], list_version=recorder.version) == [Wake(KEY)]


def test_a_fresh_list_removes_what_is_gone_and_nothing_newer() -> None:
    recorder = Recorder()
    recorder.play([])
    cache = Cache()
    feed(cache, recorder.events)
    newest = next(raw for _, kind, raw in recorder.events if kind == POD)
    cache.replace_children(UID, POD, [], int(newest["metadata"]["resourceVersion"]) - 1)
    assert len(cache.observe(UID).attempts[0].pods) == 1
    cache.replace_children(UID, POD, [], recorder.version)
    assert cache.observe(UID).attempts[0].pods == ()


def test_an_event_that_changes_nothing_of_ours_wakes_nobody() -> None:
    recorder = Recorder()
    recorder.play([])
    cache = Cache()
    feed(cache, recorder.events)
    job = next(raw for _, kind, raw in recorder.events if kind == JOB)
    later = copy.deepcopy(job)
    later["metadata"]["resourceVersion"] = "999"
    later["status"] = {"ready": 1, "terminating": 0}
    assert cache.put(JOB, later) == []


def test_the_steps_of_a_pods_start_are_not_urgent_and_its_end_is() -> None:
    recorder = Recorder()
    recorder.play([])
    cache = Cache()
    feed(cache, recorder.events)
    pod = next(raw for _, kind, raw in recorder.events if kind == POD)
    running = copy.deepcopy(pod)
    running["metadata"]["resourceVersion"] = "901"
    running["spec"]["nodeName"] = "node-1"
    running["status"] = {"phase": "Running", "containerStatuses": [{"name": "stage", "state": {"running": {}}}]}
    assert cache.put(POD, running) == [Wake(KEY, urgent=False)]
    ended = copy.deepcopy(running)
    ended["metadata"]["resourceVersion"] = "902"
    ended["status"] = {"phase": "Failed"}
    assert cache.put(POD, ended) == [Wake(KEY, urgent=True)]


def test_a_stages_pod_is_found_by_its_name_until_it_is_gone() -> None:
    recorder = Recorder()
    recorder.play([])
    cache = Cache()
    feed(cache, recorder.events)
    pod = next(raw for _, kind, raw in recorder.events if kind == POD)
    name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
    found = cache.find_pod("team-a", name)
    assert found is not None
    assert (found[0], found[1], found[2][0]) == (uid, KEY, "prepare")
    assert cache.find_pod("team-b", name) is None
    cache.remove(POD, pod)
    assert cache.find_pod("team-a", name) is None


def test_a_node_wakes_the_jobs_with_live_pods_on_it_and_its_deletion_is_remembered() -> None:
    recorder = Recorder()
    recorder.play([])
    cache = Cache()
    feed(cache, recorder.events)
    pod = copy.deepcopy(next(raw for _, kind, raw in recorder.events if kind == POD))
    pod["metadata"]["resourceVersion"] = "901"
    pod["spec"]["nodeName"] = "node-1"
    cache.put(POD, pod)
    node = {"metadata": {"name": "node-1", "uid": "n1", "resourceVersion": "5"}, "status": {}}
    assert cache.put(NODE, node) == [Wake(KEY)]
    assert cache.put(NODE, node) == []
    node["metadata"]["resourceVersion"] = "6"
    assert cache.remove(NODE, node) == [Wake(KEY)]
    assert cache.observe(UID).deleted_nodes == {"node-1"}
    assert cache.put(NODE, node) == [], "a late event does not bring it back"
    new = {"metadata": {"name": "node-1", "uid": "n2", "resourceVersion": "7"}, "status": {}}
    cache.put(NODE, new)
    assert cache.observe(UID).deleted_nodes == frozenset()


def test_our_own_status_write_is_known_before_its_event_comes() -> None:
    cache = Cache()
    body = job_body()
    body["metadata"]["resourceVersion"] = "1"
    assert cache.put_job(body) == Wake(KEY)
    cached = cache.find_job(KEY)
    assert cached is not None
    status = cached.status.model_copy(update={"phase": "Training"})
    echo = job_body(status={"phase": "Training"})
    echo["metadata"]["resourceVersion"] = "2"
    cache.wrote_status(echo, status)
    assert cache.put_job(echo) is None
    known = cache.find_job(KEY)
    assert known is not None
    assert known.job is not None
    assert known.job.status.phase == known.status.phase == "Training"


def test_a_spec_that_was_changed_just_before_our_status_write_is_seen() -> None:
    cache = Cache()
    first, changed, echo = (job_body(generation=generation, suspend=generation > 1) for generation in (1, 2, 2))
    for version, body in enumerate((first, changed, echo), start=1):
        body["metadata"]["resourceVersion"] = str(version)
    cache.put_job(first)
    cached = cache.find_job(KEY)
    assert cached is not None
    cache.wrote_status(echo, cached.status.model_copy(update={"phase": "Training"}))
    assert cache.put_job(changed) == Wake(KEY)
    known = cache.find_job(KEY)
    assert known is not None
    assert known.job is not None
    assert known.job.spec.suspend


def test_a_deleted_job_does_not_come_back_and_its_namesake_does() -> None:
    cache = Cache()
    body = job_body()
    body["metadata"]["resourceVersion"] = "1"
    cache.put_job(body)
    assert cache.remove_job(KEY, UID) == Wake(KEY)
    assert cache.put_job(body) is None
    other = job_body(uid="another")
    other["metadata"]["resourceVersion"] = "9"
    assert cache.put_job(other) == Wake(KEY)
    assert cache.keep_jobs({}, list_version=8) == []
    assert cache.keep_jobs({}, list_version=9) == [Wake(KEY)]
