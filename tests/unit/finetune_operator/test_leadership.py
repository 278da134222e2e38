"""Leader election against Leases kept in memory, the API server's rule for resourceVersions, and a clock of ours."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from finetune_operator.kube.client import ClusterError
from finetune_operator.leadership import LeaderElection, find_address, make_identity

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
SYSTEM = "finetune-system"
NAME = "finetune-operator"


class Leases:
    """The API server's part. `fails` is raised by every request, `loses_answers` after a write that went through."""

    def __init__(self) -> None:
        self.there: dict[str, Any] | None = None
        self.version = 0
        self.fails: Exception | None = None
        self.loses_answers = False
        self.hangs = False
        self.requests: list[str] = []

    async def find(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        await self._request("find")
        assert (kind, namespace, name) == ("Lease", SYSTEM, NAME)
        return copy.deepcopy(self.there)

    async def create(self, kind: str, namespace: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
        await self._request("create")
        assert (kind, namespace) == ("Lease", SYSTEM)
        if self.there is not None:
            raise ClusterError(409, "AlreadyExists", "the Lease exists")
        return self._write(manifest)

    async def replace(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        await self._request("replace")
        if self.there is None:
            raise ClusterError(404, "NotFound", "no such Lease")
        if manifest["metadata"]["resourceVersion"] != self.there["metadata"]["resourceVersion"]:
            raise ClusterError(409, "Conflict", "the Lease has been modified")
        return self._write(manifest)

    async def _request(self, verb: str) -> None:
        self.requests.append(verb)
        if self.hangs:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if self.fails is not None:
            raise self.fails

    def _write(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        self.version += 1
        self.there = copy.deepcopy(dict(manifest))
        self.there["metadata"]["resourceVersion"] = str(self.version)
        if self.loses_answers:
            raise ClusterError(0, "NoAnswer", "the connection was cut")
        return copy.deepcopy(self.there)

    @property
    def spec(self) -> dict[str, Any]:
        assert self.there is not None
        return self.there["spec"]  # type: ignore[no-any-return]


class Replica:
    """One operator process: its election, whether it works, and a wall clock that is wrong by `skew` seconds."""

    def __init__(self, leases: Leases, name: str, clock: list[float], skew: float = 0, **times: float) -> None:
        self.works = False
        self.history: list[str] = []
        self.election = LeaderElection(
            leases,
            SYSTEM,
            NAME,
            name,
            clock=lambda: clock[0],
            now=lambda: START + timedelta(seconds=clock[0] + skew),
            on_started=self._start,
            on_stopped=self._stop,
            jitter=lambda: 0.5,
            **times,  # type: ignore[arg-type]
        )

    def _start(self) -> None:
        self.works = True
        self.history.append("started")

    async def _stop(self) -> None:
        self.works = False
        self.history.append("stopped")


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


@pytest.fixture
def leases() -> Leases:
    return Leases()


async def test_the_first_one_makes_the_lease_and_leads(leases: Leases, clock: list[float]) -> None:
    first = Replica(leases, "a", clock)
    assert await first.election.turn() == 2
    assert first.works
    assert first.election.is_leader
    assert leases.spec == {
        "holderIdentity": "a",
        "leaseDurationSeconds": 10,
        "acquireTime": "2026-01-02T03:04:05.000000Z",
        "renewTime": "2026-01-02T03:04:05.000000Z",
        "leaseTransitions": 0,
    }
    clock[0] = 2.5
    await first.election.turn()
    assert leases.spec["renewTime"] == "2026-01-02T03:04:07.500000Z"
    assert leases.spec["acquireTime"] == "2026-01-02T03:04:05.000000Z"
    assert leases.requests == ["find", "create", "replace"], "a renewal is one request"


async def test_of_two_that_start_at_once_one_leads(leases: Leases, clock: list[float]) -> None:
    pair = [Replica(leases, name, clock) for name in "ab"]
    await asyncio.gather(*(each.election.turn() for each in pair))
    assert [each.works for each in pair].count(True) == 1


@pytest.mark.parametrize("skew", [0, 3600, -3600], ids=["clocks agree", "an hour ahead", "an hour behind"])
async def test_a_killed_leader_is_followed_in_less_than_15_seconds(
    leases: Leases, clock: list[float], skew: float
) -> None:
    first, second = Replica(leases, "a", clock), Replica(leases, "b", clock, skew)
    await first.election.turn()  # its last sign of life, at 0
    due = await second.election.turn()
    while not second.works:
        clock[0] += due
        assert clock[0] < 15
        due = await second.election.turn()
    assert clock[0] >= 10, "taken before the lease was over"
    assert not first.election.is_leader
    assert (leases.spec["holderIdentity"], leases.spec["leaseTransitions"]) == ("b", 1)


async def test_a_leader_that_renews_keeps_the_lease(leases: Leases, clock: list[float]) -> None:
    first, second = Replica(leases, "a", clock), Replica(leases, "b", clock)
    for _ in range(30):
        await first.election.turn()
        await second.election.turn()
        clock[0] += 2
        assert (first.works, second.works) == (True, False)
        assert second.election.leader == "a"


async def test_a_leader_that_cannot_renew_stops_before_another_may_begin(leases: Leases, clock: list[float]) -> None:
    first = Replica(leases, "a", clock)
    due = await first.election.turn()
    leases.fails = ClusterError(0, "NoAnswer", "no route")
    while first.works:
        clock[0] += due
        due = await first.election.turn()
    assert clock[0] == 7
    leases.fails = None
    clock[0] = 8
    await first.election.turn()
    assert first.history == ["started", "stopped", "started"], "the lease is still its own, so it goes on"


async def test_a_renewal_without_an_answer_does_not_outlast_the_lead(leases: Leases, clock: list[float]) -> None:
    first = Replica(leases, "a", clock)
    await first.election.turn()
    leases.hangs = True
    clock[0] = 6.95
    clock[0] += await first.election.turn()
    assert clock[0] == 7
    await first.election.turn()
    assert first.history == ["started", "stopped"]


async def test_a_halted_process_knows_that_its_time_is_over(leases: Leases, clock: list[float]) -> None:
    first = Replica(leases, "a", clock)
    await first.election.turn()
    clock[0] = 7
    assert not first.election.is_leader


async def test_a_leader_that_finds_anothers_name_stops(leases: Leases, clock: list[float]) -> None:
    first, second = Replica(leases, "a", clock), Replica(leases, "b", clock)
    await first.election.turn()
    await second.election.turn()
    clock[0] = 10
    await second.election.turn()
    assert second.works
    clock[0] = 30
    await first.election.turn()
    assert first.history == ["started", "stopped"]
    assert leases.spec["holderIdentity"] == "b"


async def test_a_lost_answer_leaves_one_leader(leases: Leases, clock: list[float]) -> None:
    first, second = Replica(leases, "a", clock), Replica(leases, "b", clock)
    leases.loses_answers = True
    await first.election.turn()
    assert not first.works
    leases.loses_answers = False
    await second.election.turn()
    assert not second.works
    await first.election.turn()
    assert first.works
    leases.loses_answers = True
    clock[0] = 2
    await first.election.turn()
    leases.loses_answers = False
    clock[0] = 4
    await first.election.turn()
    assert first.works
    assert first.history == ["started"]


async def test_a_note_by_hand_on_the_lease_does_not_cost_the_lead(leases: Leases, clock: list[float]) -> None:
    first = Replica(leases, "a", clock)
    await first.election.turn()
    assert leases.there is not None
    leases._write({**leases.there, "metadata": {**leases.there["metadata"], "labels": {"team": "ml"}}})
    clock[0] = 2
    await first.election.turn()
    assert first.history == ["started"]
    assert leases.there["metadata"]["labels"] == {"team": "ml"}


@pytest.mark.parametrize("spec", [{}, {"holderIdentity": ""}], ids=["a lease made by hand", "a lease given up"])
async def test_a_lease_of_nobody_is_taken_at_once(leases: Leases, clock: list[float], spec: dict[str, Any]) -> None:
    leases._write({"metadata": {"name": NAME, "namespace": SYSTEM}, "spec": spec})
    first = Replica(leases, "a", clock)
    await first.election.turn()
    assert first.works


async def test_a_deleted_lease_is_made_anew_without_a_stop(leases: Leases, clock: list[float]) -> None:
    first = Replica(leases, "a", clock)
    await first.election.turn()
    leases.there = None
    clock[0] = 2
    await first.election.turn()
    assert first.history == ["started"]
    assert leases.spec["holderIdentity"] == "a"


async def test_an_orderly_end_stops_the_work_and_then_hands_over_at_once(leases: Leases, clock: list[float]) -> None:
    first, second = Replica(leases, "a", clock), Replica(leases, "b", clock)
    task = asyncio.create_task(first.election.run())
    while not first.works:
        await asyncio.sleep(0)
    await second.election.turn()
    held_while_stopping = []

    async def stop() -> None:
        held_while_stopping.append(leases.spec["holderIdentity"])
        first.works = False

    first.election._on_stopped = stop
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert held_while_stopping == ["a"], "the lease is given up when the work has ended, not before"
    assert (leases.spec["holderIdentity"], leases.spec["leaseDurationSeconds"]) == ("", 1)
    await second.election.turn()
    assert second.works
    assert leases.spec["leaseTransitions"] == 1


async def test_an_end_amid_a_renewal_hands_over_too(leases: Leases, clock: list[float]) -> None:
    first = Replica(leases, "a", clock)
    task = asyncio.create_task(first.election.run())
    while not first.works:
        await asyncio.sleep(0)
    assert leases.there is not None
    leases._write(leases.there)  # the renewal was carried out, and its answer is still on the way
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert leases.spec["holderIdentity"] == ""


async def test_an_end_that_comes_after_another_took_the_lease_leaves_it_alone(
    leases: Leases, clock: list[float]
) -> None:
    first = Replica(leases, "a", clock)
    task = asyncio.create_task(first.election.run())
    while not first.works:
        await asyncio.sleep(0)
    assert leases.there is not None
    leases._write({**leases.there, "spec": {**leases.spec, "holderIdentity": "b"}})
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert leases.spec["holderIdentity"] == "b"


async def test_a_standby_that_ends_leaves_the_lease_alone(leases: Leases, clock: list[float]) -> None:
    first, second = Replica(leases, "a", clock), Replica(leases, "b", clock)
    await first.election.turn()
    task = asyncio.create_task(second.election.run())
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert leases.spec["holderIdentity"] == "a"


@pytest.mark.parametrize(
    "times",
    [
        pytest.param({"renew_seconds": 10}, id="renews as late as another begins"),
        pytest.param({"retry_seconds": 7}, id="retries when its time is over"),
        pytest.param({"retry_seconds": 0}, id="no pause"),
    ],
)
def test_times_that_allow_two_leaders_are_refused(leases: Leases, clock: list[float], times: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="retry < renew < lease"):
        Replica(leases, "a", clock, **times)


@pytest.mark.parametrize("address", ["10.244.0.17", "fd00::17"])
def test_an_identity_tells_the_address(address: str) -> None:
    assert find_address(make_identity("finetune-operator-7d9f-x_2", address)) == address
    assert find_address("somebody") is None
