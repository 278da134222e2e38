"""What contract tests have: a real API server with our CRD, no operator but the test's own, a fresh namespace each.

The operator runs as a service account with the chart's roles, so a right that it lacks makes a test fail. KUBECONFIG
names the cluster and lets the test itself do everything; `make contract` sets it. An operator that the chart has
installed there is scaled to zero while these tests run and back afterwards, since it would act on their objects too.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import kube
import operator_account
import posts
import pytest
from operator_account import Account
from operator_process import OperatorProcess, make_claim

from finetune_operator.api.constants import CRD_NAME, PLURAL

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OPERATORS = "app.kubernetes.io/name=finetune-operator"

_PAUSED = pytest.StashKey[dict[tuple[str, str], int]]()
"""(namespace, Deployment) -> replicas of the operators that were scaled to zero; set with the first contract test."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("cluster")


@pytest.fixture(scope="session")
def crd() -> None:
    """The API server serves FineTuneJob as crds/ has it now; fails in one sentence where there is no cluster."""
    if not os.environ.get("KUBECONFIG"):
        pytest.fail("KUBECONFIG is not set: run contract tests by `make contract`, or name a cluster", pytrace=False)
    try:
        kube.kubectl("get", "--raw", "/readyz", timeout=30)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        pytest.fail(f"the cluster of {os.environ['KUBECONFIG']} does not answer: {error}", pytrace=False)
    kube.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    kube.kubectl("wait", "--for=condition=Established", f"crd/{CRD_NAME}", "--timeout=30s")
    kube.eventually(
        lambda: PLURAL in kube.kubectl("api-resources", "--api-group=finetune-operator.io", check=False),
        deadline=30,
        reason="the API server's discovery of the CRD",
    )


@pytest.fixture(autouse=True)
def no_other_operator(crd: None, request: pytest.FixtureRequest) -> None:
    """No operator of the chart runs; the pause is lifted after the last contract test."""
    if _PAUSED in request.config.stash:
        return
    paused = request.config.stash[_PAUSED] = {}
    for deployment in kube.items("deployments", "-A", "-l", OPERATORS):
        namespace, name = deployment["metadata"]["namespace"], deployment["metadata"]["name"]
        if replicas := deployment["spec"].get("replicas", 1):
            paused[namespace, name] = replicas
            kube.kubectl("scale", "-n", namespace, f"deployment/{name}", "--replicas=0")
            kube.kubectl("wait", "-n", namespace, "pod", "-l", OPERATORS, "--for=delete", "--timeout=60s")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    if _PAUSED in item.config.stash and (nextitem is None or HERE not in nextitem.path.parents):
        for (namespace, name), replicas in item.config.stash[_PAUSED].items():
            kube.kubectl("scale", "-n", namespace, f"deployment/{name}", f"--replicas={replicas}")
            kube.kubectl("rollout", "status", "-n", namespace, f"deployment/{name}", "--timeout=60s")
        del item.config.stash[_PAUSED]


@pytest.fixture
def namespace(crd: None) -> Iterator[str]:
    """A fresh namespace; its deletion is begun after the test and not waited for."""
    name = f"contract-{uuid.uuid4().hex[:8]}"
    kube.kubectl("create", "namespace", name)
    yield name
    kube.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def account(crd: None, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Account]:
    """Who the operator under test is."""
    with operator_account.made(tmp_path_factory.mktemp("account")) as account:
        request.config.stash[operator_account.ACCOUNT] = account
        yield account


@pytest.fixture
def endpoint(account: Account) -> Iterator[dict[str, str]]:
    """The environment of an operator that serves the progress endpoint, at FINETUNE_PROGRESS_URL."""
    with posts.endpoint(account) as environment:
        yield environment


@pytest.fixture
def operator(namespace: str, account: Account, tmp_path: Path) -> Iterator[OperatorProcess]:
    """The operator under test as a process that watches the test's namespace, where the workspace's claim exists."""
    make_claim(namespace)
    process = OperatorProcess(namespace, tmp_path / "operator.log", **account.environment)
    process.start()
    yield process
    process.stop()
