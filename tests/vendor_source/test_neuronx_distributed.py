"""What the Neuron backend calls of packages that no public index has, held against a checkout of their source.

`make test-neuron-vendor NXD=/path`: a checkout of aws-neuron/neuronx-distributed at the tag of the pinned SDK, v2.26.0,
or its src folder. XLA=/path adds pytorch/xla (v2.8.0). Run by hand: before a change of the pinned SDK, and after.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from vendor_calls import VendorCall, refusals, source_signature, vendor_calls, vendor_names

from finetune_trainer.backends.neuron_config import VENDOR_ARGUMENTS

BACKENDS = Path(__file__).resolve().parents[2] / "trainer" / "src" / "finetune_trainer" / "backends"
FILES = sorted(BACKENDS.glob("neuron*.py"))
CHECKOUTS = {"neuronx_distributed": "NXD", "torch_xla": "XLA"}


def source_of(package: str) -> Path:
    """The folder that holds `package` in the checkout that the environment names; skips where it names none."""
    variable = CHECKOUTS[package]
    named = os.environ.get(variable)
    if not named:
        pytest.skip(f"{variable} names no checkout of {package}")
    found = [folder for folder in (Path(named), Path(named) / "src") if (folder / package).is_dir()]
    assert found, f"{variable}={named} holds no folder {package}, nor does its src"
    return found[0]


@pytest.mark.parametrize("package", CHECKOUTS)
def test_every_name_that_is_imported_exists(package: str) -> None:
    root = source_of(package)
    missing = []
    for module, name, place in vendor_names(FILES, {package}):
        submodule = root.joinpath(*module.split("."), name)
        exists = submodule.is_dir() or submodule.with_suffix(".py").is_file()
        if not exists and source_signature(root, module, name) is None:
            missing.append(f"{place}: {module} has no {name}")
    assert missing == []


@pytest.mark.parametrize("package", CHECKOUTS)
def test_every_call_fits_the_source(package: str) -> None:
    root = source_of(package)
    problems: list[str] = []
    calls: list[VendorCall] = vendor_calls(FILES, {package})
    assert calls, f"the backend calls nothing of {package}: this test would prove nothing"
    for call in calls:
        signature = source_signature(root, call.module, call.name)
        problems += refusals(call, signature) if signature is not None else [f"{call}: there is no such name"]
    assert problems == []


@pytest.mark.parametrize("target", [each for each in VENDOR_ARGUMENTS if each.partition(".")[0] in CHECKOUTS])
def test_every_argument_that_we_say_we_pass_exists(target: str) -> None:
    module, _, name = target.partition(":")
    signature = source_signature(source_of(module.partition(".")[0]), module, name)
    assert signature is not None, "there is no such name"
    taken = {*signature.positional, *signature.keyword_only, *(("kwargs",) if signature.any_keyword else ())}
    assert set(VENDOR_ARGUMENTS[target]) - taken == set()
