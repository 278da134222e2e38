"""Renders the chart with helm itself, which `make chart` and `make test` put on PATH or name in HELM."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "charts" / "finetune-operator"
IMAGES = ("--set", "images.operator.repository=registry.test/op", "--set", "images.trainer.repository=registry.test/tr")

# libyaml reads the resource definition in a tenth of the time that the pure Python loader takes.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Manifest = dict[str, Any]
Render = Callable[..., list[Manifest]]


@pytest.fixture(scope="session")
def helm() -> str:
    """Path of the helm program."""
    named = os.environ.get("HELM") or "helm"
    path = shutil.which(named)
    if path is None:
        pytest.fail(f"the chart's tests need helm and {named} is none: `make chart` builds it, or name it in HELM")
    return path


@pytest.fixture(scope="session")
def helm_template(helm: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`helm template` of the chart with the arguments given and no others; the finished process."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [helm, "template", "finetune-operator", str(CHART), "--namespace", "finetune-system"]
        command += ["--kube-version", "1.34.4", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    return run


@pytest.fixture(scope="session")
def render(helm_template: Callable[..., subprocess.CompletedProcess[str]]) -> Render:
    """What helm renders with both images' repositories and the arguments given; fails with helm's words.

    The same arguments are rendered once; every caller gets a copy of its own.
    """
    rendered: dict[tuple[str, ...], list[Manifest]] = {}

    def run(*arguments: str) -> list[Manifest]:
        if arguments not in rendered:
            done = helm_template(*IMAGES, *arguments)
            assert done.returncode == 0, done.stderr
            rendered[arguments] = [manifest for manifest in yaml.load_all(done.stdout, Loader=LOADER) if manifest]
        return copy.deepcopy(rendered[arguments])

    return run


@pytest.fixture(scope="session")
def chart() -> Path:
    """Folder of the chart."""
    return CHART
