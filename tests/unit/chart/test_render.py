"""What `helm template` makes of the chart: exactly these objects, and the default render word for word."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "chart-default.yaml"
CRD = ("CustomResourceDefinition", "finetunejobs.finetune-operator.io")
BASE = {
    ("ServiceAccount", "finetune-operator"),
    ("ConfigMap", "finetune-operator-stages"),
    ("Deployment", "finetune-operator"),
    ("ClusterRole", "finetune-operator"),
}
CLUSTER_WIDE = {("ClusterRoleBinding", "finetune-operator")}
PROGRESS = {
    ("Service", "finetune-operator-progress"),
    ("Secret", "finetune-operator-tls"),
    ("ClusterRole", "finetune-operator-token-review"),
    ("ClusterRoleBinding", "finetune-operator-token-review"),
    ("Role", "finetune-operator"),
    ("RoleBinding", "finetune-operator-own"),
}
AGGREGATED = {("ClusterRole", "finetune-operator-view"), ("ClusterRole", "finetune-operator-edit")}
EVERYTHING = {CRD} | BASE | CLUSTER_WIDE | PROGRESS | AGGREGATED


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param([], EVERYTHING, id="the defaults install everything, bound cluster-wide"),
        pytest.param(["crds.install=false"], EVERYTHING - {CRD}, id="the definition can be left to somebody else"),
        pytest.param(["progress.enabled=false"], EVERYTHING - PROGRESS, id="without progress its rights go too"),
        pytest.param(["rbac.aggregate=false"], EVERYTHING - AGGREGATED, id="people's roles can be left out"),
        pytest.param(
            ["serviceAccount.create=false", "serviceAccount.name=given"],
            EVERYTHING - {("ServiceAccount", "finetune-operator")},
            id="a service account that exists is used",
        ),
        pytest.param(
            ["watchNamespaces={research}"],
            (EVERYTHING - CLUSTER_WIDE) | {("RoleBinding", "finetune-operator")},
            id="namespaces named: bound there, not cluster-wide",
        ),
    ],
)
def test_objects_are_exactly_these(render: Any, arguments: list[str], expected: set[tuple[str, str]]) -> None:
    sets = [part for argument in arguments for part in ("--set", argument)]
    found = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in render(*sets)]
    assert set(found) == expected
    assert len(found) == len(expected)


def test_golden_default_render_is_the_reviewed_one(render: Any) -> None:
    manifests = render("--set", "crds.install=false")
    manifests.sort(key=lambda manifest: (manifest["kind"], manifest["metadata"]["name"]))
    text = yaml.safe_dump_all(manifests, sort_keys=True, width=120)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), "the default render changed; `make golden`, and review the diff"


def test_operator_pod_meets_the_restricted_pod_security_standard(render: Any) -> None:
    deployment = next(m for m in render() if m["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "fsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    assert {next(iter(set(volume) - {"name"})) for volume in pod["volumes"]} <= {"configMap", "emptyDir", "secret"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)


@pytest.mark.parametrize(
    ("tag", "reference"),
    [
        pytest.param("", "registry.test/op:0.1.0", id="no tag is the chart's appVersion"),
        pytest.param("a1b2", "registry.test/op:a1b2", id="a tag follows a colon"),
        pytest.param(f"sha256:{'0' * 64}", f"registry.test/op@sha256:{'0' * 64}", id="a digest follows an at sign"),
    ],
)
def test_image_reference(render: Any, tag: str, reference: str) -> None:
    deployment = next(m for m in render("--set", f"images.operator.tag={tag}") if m["kind"] == "Deployment")
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == reference


@pytest.mark.parametrize("image", ["operator", "trainer"])
def test_missing_repository_is_named_with_its_remedy(helm_template: Any, image: str) -> None:
    other = "trainer" if image == "operator" else "operator"
    done = helm_template("--set", f"images.{other}.repository=registry.test/x")
    assert done.returncode != 0
    assert f"--set images.{image}.repository=<registry>/finetune-{image}" in done.stderr


@pytest.mark.parametrize("release", ["short", "a-release-name-that-is-as-long-as-helm-allows-here"])
def test_names_fit_in_a_label(helm: str, release: str, chart: Path) -> None:
    command = [helm, "template", release, str(chart), "--kube-version", "1.34.4"]
    for image in ("operator", "trainer"):
        command += ["--set", f"images.{image}.repository=registry.test/x"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    for manifest in yaml.safe_load_all(done.stdout):
        if manifest["kind"] != "CustomResourceDefinition":
            assert len(manifest["metadata"]["name"]) <= 63
            assert manifest["metadata"]["name"].startswith(release[:20])
