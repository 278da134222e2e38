"""What is built, when it is built again, and which ready binaries stand in for it."""

from pathlib import Path

import pytest
from local_cluster import binaries
from local_cluster.settings import Settings


def test_built_binaries_are_known_by_their_inputs(settings: Settings) -> None:
    module = binaries.MODULES[0]
    folder = binaries.module_folder(settings, module)
    assert module in binaries.missing_modules(settings)
    folder.with_name(f"{folder.name}.unfinished").mkdir(parents=True)
    assert module in binaries.missing_modules(settings)
    folder.mkdir()
    assert module not in binaries.missing_modules(settings)
    (settings.source / "go" / module.name / "go.mod").write_text("module changed\n")
    assert module in binaries.missing_modules(settings)


def test_every_part_of_kubernetes_is_a_name_of_one_binary() -> None:
    assert set(binaries.KUBE_PARTS) < set(binaries.MODULES[0].programs)
    assert {"etcd", "coredns", "helm", "pause"} < set(binaries.MODULES[0].programs)


def test_an_add_on_is_built_only_for_those_who_ask(settings: Settings) -> None:
    names = {module.name for module in binaries.missing_modules(settings)}
    assert names == {"kubernetes", "buildkit"}
    assert {module.name for module in binaries.missing_modules(settings, ("kueue",))} == {*names, "kueue"}


def test_an_add_on_does_not_change_what_the_others_are_built_from(settings: Settings) -> None:
    before = [binaries.module_folder(settings, module) for module in binaries.MODULES]
    (settings.source / "go" / "kueue" / "go.mod").write_text("module changed\n")
    assert [binaries.module_folder(settings, module) for module in binaries.MODULES] == before


def test_an_add_ons_manifests_lie_beside_its_binary(settings: Settings) -> None:
    assert binaries.resources(settings, "kueue").parent == binaries.programs(settings)["kueue"].parent


def _write_program(path: Path, output: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "output", "taken"),
    [
        pytest.param("kube-apiserver", "Kubernetes v1.34.1", True, id="a ready binary of our minor version is used"),
        pytest.param("kube-apiserver", "Kubernetes v1.31.0", False, id="one of another minor version is not"),
        pytest.param("etcd", "etcd Version: 3.6.4", True, id="etcd is used in any version"),
    ],
)
def test_a_folder_of_ready_binaries_is_looked_at_first(settings: Settings, name: str, output: str, taken: bool) -> None:
    assets = settings.state / "assets"
    _write_program(assets / name, output)
    found = binaries.programs(Settings(settings.cache, settings.state, settings.run, settings.source, assets))
    assert (found[name] == assets / name) is taken
    assert found["kubelet"].name == "kubelet"
    assert found["kubelet"].parent != assets
