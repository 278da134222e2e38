"""The resource definition: shipped as crds/ has it, unchanged by helm, and kept on uninstall unless told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def test_chart_ships_the_files_of_crds(chart: Path) -> None:
    shipped = {path.name: path.read_text() for path in (chart / "files" / "crds").glob("*.yaml")}
    generated = {path.name: path.read_text() for path in (ROOT / "crds").glob("*.yaml")}
    assert shipped
    assert shipped == generated


@pytest.mark.parametrize(
    ("keep", "annotations"),
    [
        pytest.param("true", {"helm.sh/resource-policy": "keep"}, id="kept on uninstall"),
        pytest.param("false", {}, id="deleted on uninstall"),
    ],
)
def test_rendered_definition_is_the_generated_one(render: Any, keep: str, annotations: dict[str, str]) -> None:
    rendered = [m for m in render("--set", f"crds.keep={keep}") if m["kind"] == "CustomResourceDefinition"]
    assert rendered
    for crd in rendered:
        assert crd["metadata"].pop("annotations", {}) == annotations
        assert crd["metadata"].pop("labels")["app.kubernetes.io/name"] == "finetune-operator"
    texts = [path.read_text() for path in sorted((ROOT / "crds").glob("*.yaml"))]
    assert rendered == [yaml.load(text, Loader=LOADER) for text in texts]
