"""tests/vendor_calls.py: which calls are seen, and which a signature refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from vendor_calls import Signature, VendorCall, refusals, source_signature, vendor_calls

OURS = """
import vendor.state as state
import vendor.core
from vendor.trainer import save, Optimizer as Adam
from elsewhere import other

def run(parts, more):
    save("folder", "tag", model=parts, use_xser=True)
    state.start(2, size=1)
    vendor.core.tool.step(*parts, **more)
    Adam(parts, lr=0.1)
    other(1)
    parts.save(3)
"""

VENDOR = {
    "vendor/__init__.py": "",
    "vendor/trainer/__init__.py": "from .checkpoint import save\nfrom ..optim import Zero as Optimizer\n",
    "vendor/trainer/checkpoint.py": "def save(folder, tag, model=None, *, use_xser=False): ...\n",
    "vendor/optim.py": (
        "from .base import Base\n\nclass Zero(Base):\n    def step(self, closure=None): ...\n    @staticmethod\n"
        "    def cut(size): ...\n\nLIMIT = 3\n"
    ),
    "vendor/base.py": "class Base:\n    def __init__(self, params, lr, **rest): ...\n",
}


@pytest.fixture
def vendor(tmp_path: Path) -> Path:
    for name, text in VENDOR.items():
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "src"


def test_calls_are_found_by_what_was_imported(tmp_path: Path) -> None:
    file = tmp_path / "ours.py"
    file.write_text(OURS)
    assert [(call.module, call.name, call.positional, call.keywords) for call in vendor_calls([file], {"vendor"})] == [
        ("vendor.trainer", "save", 2, ("model", "use_xser")),
        ("vendor.state", "start", 1, ("size",)),
        ("vendor", "core.tool.step", None, ()),
        ("vendor.trainer", "Optimizer", 1, ("lr",)),
    ]


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        pytest.param(
            "vendor.trainer", "save",
            Signature(("folder", "tag", "model"), ("use_xser",), frozenset({"folder", "tag"})),
            id="through a re-export",
        ),
        pytest.param(
            "vendor.trainer", "Optimizer",
            Signature(("params", "lr"), (), frozenset({"params", "lr"}), any_keyword=True),
            id="of a class, its base's",
        ),
        pytest.param("vendor.optim", "Zero.step", Signature(("closure",)), id="of a method"),
        pytest.param("vendor", "optim.Zero.cut", Signature(("size",), (), frozenset({"size"})), id="below a submodule"),
        pytest.param("vendor.optim", "Zeru", None, id="of a name that is not there"),
        pytest.param("vendor.nowhere", "save", None, id="of a module that is not there"),
    ],
)  # fmt: skip
def test_a_signature_is_read_from_the_source(vendor: Path, module: str, name: str, expected: Signature | None) -> None:
    assert source_signature(vendor, module, name) == expected


def call(positional: int | None, *keywords: str, more: bool = False) -> VendorCall:
    return VendorCall("vendor.trainer", "save", positional, keywords, more, "ours.py:1")


SAVE = Signature(("folder", "tag", "model"), ("use_xser",), frozenset({"folder", "tag"}))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        pytest.param(call(2, "use_xser"), [], id="everything fits"),
        pytest.param(call(0, "folder", "tag"), [], id="by name"),
        pytest.param(call(None, more=True), [], id="what cannot be seen is not refused"),
        pytest.param(call(2, "xser"), ["it takes no argument xser"], id="an argument that was renamed"),
        pytest.param(call(4), ["it takes 3 arguments by position, not 4"], id="one too many"),
        pytest.param(call(1), ["it needs tag too"], id="one that became necessary"),
    ],
)
def test_a_call_that_does_not_fit_is_told(made: VendorCall, words: list[str]) -> None:
    told = refusals(made, SAVE)
    assert len(told) == len(words)
    assert all(word in text for word, text in zip(words, told, strict=True))


def test_any_keyword_takes_any(vendor: Path) -> None:
    signature = source_signature(vendor, "vendor.trainer", "Optimizer")
    assert signature is not None
    assert refusals(call(2, "max_norm"), signature) == []
