"""What every end-to-end test stands on: the installed chart, real images, a namespace and a workspace of its own.

`make e2e` starts the cluster, builds the images, installs the chart and names the images in TRAINER_IMAGE. A test gets
a fresh namespace with a ReadWriteMany claim and a toolbox pod in which the tiny model and data sets are made and files
are looked at or damaged, so nothing here needs the node's file system.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import chart_release
import kube
import pytest
from chart_release import Release
from team import CLAIM, Team, remove_namespace, toolbox_pod, workspace_manifests


@pytest.fixture(scope="session")
def trainer_image() -> str:
    image = os.environ.get("TRAINER_IMAGE")
    if not image:
        pytest.fail(
            "TRAINER_IMAGE is not set: run these tests by `make e2e`, which builds the images and installs the chart"
        )
    return image


@pytest.fixture(scope="session")
def operator_namespace() -> str:
    namespace = os.environ.get("NAMESPACE", "finetune-system")
    if not kube.items("deployments", "-n", namespace, "-l", "app.kubernetes.io/name=finetune-operator"):
        pytest.fail(f"no finetune-operator in namespace {namespace}: run these tests by `make e2e`")
    return namespace


@pytest.fixture
def team(trainer_image: str, operator_namespace: str) -> Iterator[Team]:
    namespace = f"e2e-{uuid.uuid4().hex[:8]}"
    kube.apply(
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": namespace, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        }
    )
    try:
        kube.apply(workspace_manifests(namespace))
        kube.apply(toolbox_pod(namespace, trainer_image))
        kube.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod/toolbox", "--timeout=120s", timeout=130)
        yield Team(namespace, trainer_image)
    finally:
        remove_namespace(namespace, CLAIM)


@pytest.fixture
def release(operator_namespace: str) -> Iterator[Release]:
    """The installed release of the chart, as it was again afterwards."""
    with chart_release.installed(operator_namespace) as found:
        yield found
