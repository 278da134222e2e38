"""An API server that is away for a while: nothing is lost, and the operator goes on soon after its return."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import kube
import kubelet
import pytest
import tcp_gate
from kubelet import STAGES
from operator_account import Account
from operator_process import OperatorProcess, make_claim
from submitted import has_phase, submit, wait_for_job
from tcp_gate import TcpGate

OUTAGE_SECONDS = 14.0
"""As long as a restart takes; waits that only ever double would be over 11 seconds after its end."""
GOES_ON_SECONDS = 7.0


@pytest.fixture
def gate(account: Account) -> Iterator[TcpGate]:
    server = json.loads(account.kubeconfig.read_text())["clusters"][0]["cluster"]["server"]
    if "//127.0.0.1:" not in server:
        pytest.skip(f"the gate listens on 127.0.0.1, for which the certificate of {server} is none")
    with tcp_gate.running(server) as gate:
        yield gate


@pytest.fixture
def operator(namespace: str, account: Account, gate: TcpGate, tmp_path: Path) -> Iterator[OperatorProcess]:
    """The operator under test, which reaches the API server through the gate alone."""
    config = json.loads(account.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = gate.server
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(json.dumps(config))
    make_claim(namespace)
    environment = {**account.environment, "KUBECONFIG": str(kubeconfig)}
    process = OperatorProcess(namespace, tmp_path / "operator.log", **environment)
    process.start()
    yield process
    process.stop()


def test_a_stage_that_ended_in_an_outage_is_followed_soon_after_it(
    namespace: str, operator: OperatorProcess, gate: TcpGate
) -> None:
    submit(namespace)
    kubelet.walk(namespace, "prepare")
    pods = kubelet.pods(namespace, "train", 1, 2)
    gate.shut()
    shut = time.monotonic()
    for pod in pods:
        kubelet.end(namespace, pod)
    kube.eventually(
        lambda: time.monotonic() - shut > OUTAGE_SECONDS, deadline=OUTAGE_SECONDS + 5, reason="the outage's end"
    )
    gate.open()
    opened = time.monotonic()
    kubelet.pods(namespace, "consolidate", 1, deadline=GOES_ON_SECONDS)
    print(f"{time.monotonic() - opened:.1f} s after an outage of {OUTAGE_SECONDS:g} s the next stage had its pod")
    kubelet.walk(namespace, *STAGES[2:])
    job = wait_for_job(namespace, has_phase("Succeeded"), reason="the job to succeed")
    assert len(kube.items("jobs", "-n", namespace)) == len(STAGES)
    assert (job["status"]["restarts"], job["status"]["attempts"]) == (0, [])
