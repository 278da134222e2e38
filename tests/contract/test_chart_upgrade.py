"""Helm against a real API server: the definition is upgraded with the release, and uninstalling leaves nothing stuck.

The chart is copied with another kind and group, so that the FineTuneJobs of the cluster are not touched. No pod is ever
scheduled: what is looked at is what helm and the API server do with the objects.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kube
import pytest
import yaml
from builders import job_manifest

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "finetune-operator"
DEFINITION = Path("files", "crds", "finetune-operator.io_finetunejobs.yaml")
NEW_FIELD = "dryRun"
"""The field of the spec that the older definition lacks."""


@dataclass(frozen=True)
class Release:
    """One release of a copy of the chart whose kind nobody else has."""

    name: str
    namespace: str
    charts: Path

    @property
    def plural(self) -> str:
        return f"{self.name.replace('-', '')}jobs"

    @property
    def resource(self) -> str:
        """The plural with its group: the definition's name, and what kubectl finds its objects by."""
        return f"{self.plural}.{self.name}.test"

    def renamed(self, text: str) -> str:
        """A text of the chart with the kind and group of this release."""
        singular = self.plural.removesuffix("s")
        text = text.replace("finetunejob", singular).replace("FineTuneJob", singular.capitalize())
        return text.replace("finetune-operator.io", f"{self.name}.test").replace("ftj", singular[:-3])

    def copy_chart(self, version: str, *, without: str | None = None) -> Path:
        """The chart under this version, its definition without one field of the spec if that is asked for."""
        chart = self.charts / version
        shutil.copytree(CHART, chart)
        definition = yaml.safe_load((chart / DEFINITION).read_text(encoding="utf-8"))
        # Nobody else's `kubectl get ml` shall ask for a kind that is about to go.
        definition["spec"]["names"]["categories"] = []
        if without is not None:
            schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
            del schema["properties"]["spec"]["properties"][without]
        (chart / DEFINITION).write_text(yaml.safe_dump(definition), encoding="utf-8")
        for path in (chart / DEFINITION, *(chart / "templates").glob("*.yaml")):
            path.write_text(self.renamed(path.read_text(encoding="utf-8")), encoding="utf-8")
        meta = yaml.safe_load((chart / "Chart.yaml").read_text(encoding="utf-8"))
        (chart / "Chart.yaml").write_text(yaml.safe_dump({**meta, "version": version}), encoding="utf-8")
        return chart

    def helm(self, *arguments: str) -> str:
        """helm in the release's namespace; AssertionError with its words when it fails."""
        command = [os.environ.get("HELM") or "helm", *arguments, "--namespace", self.namespace]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def install(self, chart: Path, *values: str) -> None:
        """Install or upgrade; the pods find no node."""
        images = [f"images.{image}.repository=registry.invalid/{image}" for image in ("operator", "trainer")]
        sets = [*images, "nodeSelector.pool=nowhere", "metrics.dashboard.enabled=true", *values]
        self.helm("upgrade", "--install", self.name, str(chart), *(part for each in sets for part in ("--set", each)))
        kube.kubectl("wait", "--for=condition=Established", f"crd/{self.resource}", "--timeout=30s")

    def left(self) -> list[str]:
        """Objects of the release that exist, as kind/name."""
        kinds = "deploy,svc,cm,secret,sa,role,rolebinding,clusterrole,clusterrolebinding,netpol,pdb,crd,pod,rs"
        selector = f"app.kubernetes.io/instance={self.name}"
        return sorted(kube.kubectl("get", kinds, "-n", self.namespace, "-l", selector, "-o", "name").split())

    def job(self) -> dict[str, Any]:
        return kube.get(self.resource, "old", "-n", self.namespace)


@pytest.fixture
def release(namespace: str, tmp_path: Path) -> Iterator[Release]:
    release = Release(f"upgrade-{uuid.uuid4().hex[:6]}", namespace, tmp_path)
    yield release
    listed = release.helm("list", "--short").split()
    if release.name in listed:
        release.helm("uninstall", release.name)
    kube.kubectl("delete", "crd", release.resource, "--ignore-not-found", "--wait=false")


def test_the_definition_is_upgraded_with_the_release_and_kept_with_its_jobs(release: Release) -> None:
    old = release.copy_chart("0.0.1", without=NEW_FIELD)
    new = release.copy_chart("0.0.2")
    release.install(old)
    text = release.renamed(yaml.safe_dump(job_manifest(name="old", **{NEW_FIELD: True})))
    create = ("create", "--validate=false", "-n", release.namespace, "-f", "-")
    # The API server serves a new kind a moment after it has established it.
    kube.eventually(
        lambda: "created" in kube.kubectl(*create, stdin=text, check=False), deadline=30, reason="a first object"
    )
    before = release.job()
    assert NEW_FIELD not in before["spec"], "the older definition knows no such field"

    release.install(new)
    patch = ("patch", release.resource, "old", "-n", release.namespace, "--type=merge", "-p")

    def takes_the_new_field() -> bool:
        kube.kubectl(*patch, f'{{"spec":{{"{NEW_FIELD}":true}}}}')
        return NEW_FIELD in release.job()["spec"]

    kube.eventually(takes_the_new_field, deadline=30, reason="the upgraded definition's new field")
    assert release.job()["metadata"]["uid"] == before["metadata"]["uid"]

    release.helm("uninstall", release.name, "--wait", "--timeout=60s")
    definition = f"customresourcedefinition.apiextensions.k8s.io/{release.resource}"
    kube.eventually(lambda: release.left() == [definition], deadline=30, reason="nothing else to be left")
    assert release.job()["metadata"]["uid"] == before["metadata"]["uid"]

    release.install(new, "crds.keep=false")  # the release of the same name takes the kept definition over
    assert release.job()["metadata"]["uid"] == before["metadata"]["uid"]
    release.helm("uninstall", release.name, "--wait", "--timeout=60s")
    kube.eventually(lambda: release.left() == [], deadline=30, reason="the definition to go with its release")


def test_an_upgrade_leaves_what_the_operator_wrote(release: Release) -> None:
    chart = release.copy_chart("0.0.1")
    release.install(chart)
    secret = ("secret", f"{release.name}-finetune-operator-tls", "-n", release.namespace)
    kube.kubectl("patch", *secret, "--type=merge", "-p", '{"data":{"ca.crt":"eA=="}}')
    before = kube.get("deployment", f"{release.name}-finetune-operator", "-n", release.namespace)

    release.install(chart)
    assert kube.get(*secret)["data"] == {"ca.crt": "eA=="}
    after = kube.get("deployment", f"{release.name}-finetune-operator", "-n", release.namespace)
    assert after["metadata"]["generation"] == before["metadata"]["generation"], "the same values start no new pod"

    release.install(chart, "hang.seconds=60")
    changed = kube.get("deployment", f"{release.name}-finetune-operator", "-n", release.namespace)
    assert changed["metadata"]["generation"] > after["metadata"]["generation"]
    assert kube.get(*secret)["data"] == {"ca.crt": "eA=="}
