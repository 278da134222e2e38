"""hack/images.py: what goes into an image is in its tag, and what is printed for a cluster that builds elsewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from finetune_trainer import neuron_stack

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def images() -> ModuleType:
    spec = importlib.util.spec_from_file_location("images_program", ROOT / "hack" / "images.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IMAGE_TAG", "NEURON_BASE_IMAGE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("image", ["trainer", "operator", "neuron"])
def test_whatever_a_dockerfile_takes_from_the_tree_is_part_of_its_tag(images: ModuleType, image: str) -> None:
    dockerfile = images.DOCKERFILES[image]
    inputs = images.INPUTS[image]
    text = (ROOT / dockerfile).read_text(encoding="utf-8").replace("${BACKEND}", "trainer")
    taken = {
        path for path in re.findall(r"(?<!from=tools,)source=([^,\s]+)", text) if not path.startswith("build/wheels")
    }
    assert {
        path for path in {dockerfile, *taken} if not any(path == each or path.startswith(f"{each}/") for each in inputs)
    } == set()
    assert {path for path in inputs if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("image", ["trainer", "operator", "neuron"])
def test_whatever_a_dockerfile_takes_from_the_tree_is_in_its_build_context(images: ModuleType, image: str) -> None:
    text = (ROOT / images.DOCKERFILES[image]).read_text(encoding="utf-8").replace("${BACKEND}", "trainer")
    allowed = [
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")
    ]
    taken = [
        path for path in re.findall(r"(?<!from=tools,)source=([^,\s]+)", text) if not path.startswith("build/wheels")
    ]
    assert [path for path in taken if not any(Path(path).match(pattern) for pattern in allowed)] == []


def printed(images: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert images.main(["--cluster", "existing", "--prefix", "registry.test", *arguments]) == 0
    return capsys.readouterr().out


def test_the_neuron_image_is_built_on_the_tables_base(images: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(images, capsys, "base").strip() == neuron_stack.base_image("trn1")
    out = printed(images, capsys, "build", "neuron")
    assert "images: the cluster must be able to pull registry.test/finetune-neuron:" in out
    assert (
        f"docker build -f images/trainer/neuron.Dockerfile --build-arg BASE_IMAGE={neuron_stack.base_image('trn1')} "
        in out
    )


def test_another_base_is_another_tag(
    images: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = printed(images, capsys, "print", "neuron")
    monkeypatch.setenv("NEURON_BASE_IMAGE", "registry.test/mirror/neuron:2.26.0")
    assert printed(images, capsys, "print", "neuron") != first
    assert printed(images, capsys, "base").strip() == "registry.test/mirror/neuron:2.26.0"


def test_the_neuron_image_is_only_meant_where_it_is_named(
    images: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "neuron" not in printed(images, capsys, "helm-args")
    arguments = printed(images, capsys, "helm-args", "operator", "trainer", "neuron").split()
    values = dict(each.split("=", 1) for each in arguments if "=" in each)
    assert values["images.neuron.repository"] == "registry.test/finetune-neuron"
    assert values["images.trainer.pullPolicy"] == "IfNotPresent"
    assert "images.neuron.pullPolicy" not in values


def test_an_unknown_image_is_refused_with_those_that_there_are(
    images: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        images.main(["build", "nueron"])
    assert caught.value.code == 2
    assert "no image is called nueron: there are neuron, operator, trainer" in capsys.readouterr().err
