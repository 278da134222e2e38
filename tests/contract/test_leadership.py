"""Two operators on one real API server: one works, and the other goes on with its jobs when it is gone."""

from __future__ import annotations

import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import kube
import kubelet
import pytest
from kubelet import STAGES
from operator_account import Account
from operator_process import OperatorProcess, make_claim
from submitted import has_phase, submit, wait_for_job

from finetune_operator.core.times import parse_time

HAND_OVER_SECONDS = 15.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Replica(OperatorProcess):
    """One of two operators; `name` is its pod's."""

    def __init__(self, name: str, namespace: str, account: Account, folder: Path) -> None:
        self.name = name
        self.port = free_port()
        super().__init__(
            namespace,
            folder / f"{name}.log",
            **account.environment,
            FINETUNE_POD_NAME=name,
            FINETUNE_POD_IP="127.0.0.1",
            FINETUNE_LEASE_NAME=account.lease,
            FINETUNE_HEALTH_PORT=str(self.port),
        )

    @property
    def identity(self) -> str:
        return f"{self.name}_127.0.0.1"

    def get(self, path: str) -> tuple[int, str]:
        """(status, text) of its plain HTTP port; status 0 while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def wait_until_ready(self) -> None:
        kube.eventually(lambda: self.get("/readyz")[0] == 200, deadline=60, reason=f"{self.name} to be ready")


def lease(account: Account) -> dict[str, Any]:
    """The spec of the account's Lease, empty while there is none."""
    found = kube.items("leases", "-n", account.namespace, "--field-selector", f"metadata.name={account.lease}")
    return found[0]["spec"] if found else {}


def wait_for_leader(account: Account, replica: Replica, *, deadline: float) -> float:
    """Seconds until the replica held the Lease."""
    began = time.monotonic()
    kube.eventually(
        lambda: lease(account).get("holderIdentity") == replica.identity,
        deadline=deadline,
        reason=f"{replica.name} to hold the Lease",
    )
    return time.monotonic() - began


@pytest.fixture
def replicas(namespace: str, account: Account, tmp_path: Path) -> Iterator[tuple[Replica, Replica]]:
    """(the leader, the one that stands by), both ready."""
    make_claim(namespace)
    kube.kubectl("delete", "lease", account.lease, "-n", account.namespace, "--ignore-not-found")
    pair = (
        Replica("operator-a", namespace, account, tmp_path),
        Replica("operator-b", namespace, account, tmp_path),
    )
    try:
        pair[0].start()
        wait_for_leader(account, pair[0], deadline=60)
        pair[1].start()
        pair[1].wait_until_ready()
        yield pair
    finally:
        for each in pair:
            each.stop()


def test_a_job_goes_on_within_15_seconds_of_the_leaders_death(
    namespace: str, account: Account, replicas: tuple[Replica, Replica]
) -> None:
    leader, standby = replicas
    submit(namespace)
    kubelet.pods(namespace, "prepare", 1)
    leader.kill()
    killed = datetime.now(timezone.utc)  # noqa: TID251  compared with what the API server writes
    kubelet.walk(namespace, "prepare")
    train = kubelet.pods(namespace, "train", 1, 2)[0]["metadata"]["labels"]["batch.kubernetes.io/job-name"]
    # By the API server's clock, which is this machine's; the pods may take longer, which is not the operator's doing.
    moments = (
        parse_time(lease(account)["acquireTime"]),
        parse_time(kube.get("job", train, "-n", namespace)["metadata"]["creationTimestamp"]),
    )
    taken, went_on = ((moment - killed).total_seconds() for moment in moments if moment is not None)
    print(f"after the leader's death the standby led in {taken:.1f} s and made the next Job in {went_on:.1f} s")
    assert 0 < taken <= went_on + 1 < HAND_OVER_SECONDS, "creationTimestamp has whole seconds, rounded down"
    assert lease(account)["holderIdentity"] == standby.identity
    kubelet.walk(namespace, *STAGES[1:])
    job = wait_for_job(namespace, has_phase("Succeeded"), reason="the job to succeed")
    assert len(kube.items("jobs", "-n", namespace)) == len(STAGES)
    assert job["status"]["restarts"] == 0
    assert lease(account)["leaseTransitions"] == 1


def test_an_orderly_end_hands_over_at_the_standbys_next_look(
    namespace: str, account: Account, replicas: tuple[Replica, Replica]
) -> None:
    leader, standby = replicas
    leader.stop()
    taken = wait_for_leader(account, standby, deadline=5)
    print(f"the standby led {taken:.1f} s after the leader's end")
    submit(namespace)
    kubelet.pods(namespace, "prepare", 1)


def test_a_leader_that_was_halted_stands_by_when_it_goes_on(
    namespace: str, account: Account, replicas: tuple[Replica, Replica]
) -> None:
    leader, standby = replicas
    submit(namespace)
    kubelet.pods(namespace, "prepare", 1)
    os.kill(leader.pid, signal.SIGSTOP)
    try:
        wait_for_leader(account, standby, deadline=HAND_OVER_SECONDS)
        kubelet.walk(namespace, "prepare")
        kubelet.pods(namespace, "train", 1, 2)
    finally:
        os.kill(leader.pid, signal.SIGCONT)
    kube.eventually(
        lambda: "finetune_leader 0.0" in leader.get("/metrics")[1],
        deadline=10,
        reason="the halted leader to know that it was followed",
    )
    kubelet.walk(namespace, *STAGES[1:])
    wait_for_job(namespace, has_phase("Succeeded"), reason="the job to succeed")
    assert lease(account)["holderIdentity"] == standby.identity
    assert len(kube.items("jobs", "-n", namespace)) == len(STAGES), "both together made one Job a stage"


def test_both_are_alive_and_ready_and_one_tells_of_jobs(namespace: str, replicas: tuple[Replica, Replica]) -> None:
    leader, standby = replicas
    submit(namespace)
    kubelet.pods(namespace, "prepare", 1)
    for each in replicas:
        assert each.get("/healthz")[0] == 200
        assert each.get("/readyz")[0] == 200
    kube.eventually(
        lambda: 'finetune_jobs{phase="Preparing"} 1.0' in leader.get("/metrics")[1],
        deadline=10,
        reason="the leader to count the job",
    )
    text = standby.get("/metrics")[1]
    assert "finetune_leader 0.0" in text
    assert "finetune_jobs" not in text
    assert 'finetune_watch_last_event_age_seconds{kind="Job"}' in text
