"""The Neuron image over its base: the base's packages are seen, none is replaced, and what does not fit is named."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import packaging
import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "images" / "trainer" / "vendor_packages.py"
SDK = {
    "torch": "2.8.0",
    "torch-xla": "2.8.0",
    "torch_neuronx": "2.8.0.2.10.13553",
    "neuronx-cc": "2.21.18209.0",
    "neuronx_distributed": "0.15.22404",
    "libneuronxla": "2.2.12677.0",
    "numpy": "1.26.4",
}


@pytest.fixture(scope="module")
def vendor() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vendor_packages", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(folder: Path, name: str, version: str, *requires: str) -> None:
    """A distribution's metadata, as installers leave them."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        *(f"Requires-Dist: {each}\n" for each in requires),
    ]
    (info / "METADATA").write_text("".join(lines))


def told(vendor: ModuleType, tmp_path: Path) -> list[str]:
    """The problems of the packages below tmp_path/own over those below tmp_path/base."""
    return list(
        vendor.problems(vendor.packages_of([str(tmp_path / "own")]), vendor.packages_of([str(tmp_path / "base")]))
    )


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """What is installed into the environment, over a base that has the SDK. What that needs fits."""
    for name, version in SDK.items():
        install(tmp_path / "base", name, version)
    install(tmp_path / "base", "transformers", "4.55.4", "numpy>=1.17")
    install(
        tmp_path / "own",
        "transformers",
        "4.57.6",
        "numpy>=1.17",
        "tokenizers<=0.23.0,>=0.22.0",
        "torch; extra == 'torch'",
    )
    install(tmp_path / "own", "tokenizers", "0.22.2")
    return tmp_path / "own"


def test_a_newer_package_over_the_bases_is_no_problem_where_everything_fits(
    vendor: ModuleType, own: Path, tmp_path: Path
) -> None:
    assert told(vendor, tmp_path) == []


@pytest.mark.parametrize(
    "name", ["torch", "Torch_XLA", "numpy", "neuronx-cc", "nvidia-cublas-cu12", "aws-neuronx-runtime-discovery"]
)
def test_what_the_vendor_built_is_refused_whatever_its_version(
    vendor: ModuleType, own: Path, tmp_path: Path, name: str
) -> None:
    install(own, name, "2.8.0")
    (problem,) = told(vendor, tmp_path)
    assert problem.startswith(f"{vendor.normalised(name)} 2.8.0 is the vendor's to install")


def test_a_package_that_a_package_of_the_base_cannot_work_with_is_refused(
    vendor: ModuleType, own: Path, tmp_path: Path
) -> None:
    install(tmp_path / "base", "neuronx-tools", "1.0", "tokenizers<0.22")
    install(tmp_path / "base", "tokenizers", "0.21.4")
    (problem,) = told(vendor, tmp_path)
    assert problem.startswith("the base's neuronx-tools 1.0 needs tokenizers<0.22 and had 0.21.4; tokenizers 0.22.2 ")


def test_what_the_vendors_packages_need_is_held_too_and_what_else_an_image_has_is_not(
    vendor: ModuleType, own: Path, tmp_path: Path
) -> None:
    install(tmp_path / "base", "tokenizers", "0.21.4")
    install(tmp_path / "base", "sagemaker", "2.237.0", "tokenizers<0.22")
    assert told(vendor, tmp_path) == []
    install(tmp_path / "base", "neuronx-tools", "1.0", "sagemaker")
    (problem,) = told(vendor, tmp_path)
    assert problem.startswith("the base's sagemaker 2.237.0 needs tokenizers<0.22 and had 0.21.4")


def test_what_did_not_fit_in_the_base_before_is_not_ours_to_refuse(
    vendor: ModuleType, own: Path, tmp_path: Path
) -> None:
    install(tmp_path / "base", "neuronx-tools", "1.0", "tokenizers<0.20", "nowhere-to-be-found")
    install(tmp_path / "base", "tokenizers", "0.21.4")
    assert told(vendor, tmp_path) == []


@pytest.mark.parametrize(
    ("requirement", "words"),
    [
        pytest.param("torch>=2.9", "needs torch>=2.9, and torch 2.8.0 is there", id="the base's is too old"),
        pytest.param("scipy", "needs scipy, which neither has", id="nobody has it"),
    ],
)
def test_what_ours_needs_must_be_there(
    vendor: ModuleType, own: Path, tmp_path: Path, requirement: str, words: str
) -> None:
    install(own, "peft", "0.17.0", requirement)
    (problem,) = told(vendor, tmp_path)
    assert words in problem


def test_a_base_without_the_sdk_is_refused_with_what_it_lacks(vendor: ModuleType, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "lend", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "torch-neuronx" in done.stderr
    assert "BASE_IMAGE must be a Neuron training image" in done.stderr


def site_of(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python3*/site-packages")
    return folder


@pytest.fixture
def environments(tmp_path: Path) -> tuple[Path, Path]:
    """(base, ours): a base whose Python is itself a virtual environment, as in some of the vendor's images."""
    base, ours = tmp_path / "base", tmp_path / "ours"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(base)], check=True)
    subprocess.run([str(base / "bin/python"), "-m", "venv", "--without-pip", str(ours)], check=True)
    for name, version in SDK.items():
        install(site_of(base), name, version)
    (site_of(base) / "torch_neuronx.py").write_text("WHERE = 'base'\n")
    (site_of(base) / "transformers.py").write_text("WHERE = 'base'\n")
    (site_of(ours) / "transformers.py").write_text("WHERE = 'ours'\n")
    (site_of(ours) / "packaging").symlink_to(Path(packaging.__file__).parent)
    return base, ours


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(python), *arguments], capture_output=True, text=True, check=False)


def test_the_bases_packages_are_seen_after_ours_and_its_files_stay_as_they_were(
    environments: tuple[Path, Path],
) -> None:
    base, ours = environments
    before = sorted((path, path.stat().st_mtime_ns) for path in site_of(base).rglob("*"))
    lent = run(base / "bin/python", str(PROGRAM), "lend", str(ours))
    assert lent.returncode == 0, lent.stderr
    seen = run(
        ours / "bin/python",
        "-B",
        "-c",
        "import torch_neuronx, transformers; print(torch_neuronx.WHERE, transformers.WHERE)",
    )
    assert seen.stdout.split() == ["base", "ours"]
    checked = run(ours / "bin/python", str(PROGRAM), "check")
    assert checked.returncode == 0, checked.stderr
    assert "torch-neuronx 2.8.0.2.10.13553 is the base's" in checked.stdout
    assert sorted((path, path.stat().st_mtime_ns) for path in site_of(base).rglob("*")) == before


def test_a_vendors_package_in_ours_ends_the_build(environments: tuple[Path, Path]) -> None:
    base, ours = environments
    assert run(base / "bin/python", str(PROGRAM), "lend", str(ours)).returncode == 0
    install(site_of(ours), "numpy", "2.2.6")
    checked = run(ours / "bin/python", str(PROGRAM), "check")
    assert checked.returncode == 1
    assert "numpy 2.2.6 is the vendor's to install (the base has 1.26.4)" in checked.stderr


def test_a_part_of_a_package_that_the_bases_whole_one_hides_ends_the_build_until_it_is_made_whole(
    environments: tuple[Path, Path],
) -> None:
    base, ours = environments
    assert run(base / "bin/python", str(PROGRAM), "lend", str(ours)).returncode == 0
    install(site_of(ours), "optimum-neuron", "0.4.5")
    for site, versions in ((site_of(ours), "ours"), (site_of(base), "base")):
        (site / "optimum" / "exporters" / "neuron").mkdir(parents=True)
        (site / "optimum" / "exporters" / "neuron" / "__init__.py").write_text(f"WHERE = '{versions}'\n")
    record = site_of(ours) / "optimum-neuron-0.4.5.dist-info" / "RECORD"
    record.write_text("optimum/exporters/neuron/__init__.py,,\n../../../bin/neuron_parallel_compile,,\n")
    assert run(ours / "bin/python", str(PROGRAM), "check").returncode == 0
    (site_of(base) / "optimum" / "exporters" / "__init__.py").touch()
    checked = run(ours / "bin/python", str(PROGRAM), "check")
    assert checked.returncode == 1
    assert f"its module optimum.exporters.neuron would come from {site_of(base)}" in checked.stderr
    closed = run(ours / "bin/python", str(PROGRAM), "close")
    assert f"{site_of(ours) / 'optimum' / 'exporters' / '__init__.py'} was added" in closed.stdout
    assert not (site_of(ours) / "optimum" / "__init__.py").exists()
    assert run(ours / "bin/python", str(PROGRAM), "check").returncode == 0
    seen = run(ours / "bin/python", "-B", "-c", "import optimum.exporters.neuron as each; print(each.WHERE)")
    assert seen.stdout.strip() == "ours"


def pins(name: str) -> dict[str, str]:
    """Name and version of every pin of a requirements file, marked ones too."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9-]+)==([^ \\;]+)", text, re.MULTILINE))


def test_the_pinned_set_leaves_the_vendors_packages_out_and_agrees_with_what_the_tests_run_on(
    vendor: ModuleType,
) -> None:
    neuron, trainer = pins("neuron"), pins("trainer")
    assert neuron["optimum-neuron"] == "0.4.5"
    assert [name for name in neuron if vendor.VENDORS_OWN.fullmatch(name)] == []
    assert {name: version for name, version in neuron.items() if trainer.get(name, version) != version} == {}


def test_every_pin_has_hashes_and_no_index_is_named() -> None:
    text = (ROOT / "requirements" / "neuron.txt").read_text(encoding="utf-8")
    assert [
        entry for entry in re.split(r"\n(?=[a-z0-9])", text) if "==" in entry and "--hash=sha256:" not in entry
    ] == []
    assert "http" not in text
    assert "--index" not in text
