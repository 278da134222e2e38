"""What the installed optimum-neuron's own code says: fields, models, signatures. A program, prints one JSON object.

    python tests/optimum_neuron_facts.py '{"functions": [["optimum.neuron.peft", "get_peft_model"]], "names": []}'

The argument lists functions whose signatures are asked for (null for one that does not exist), names, of which those
that do not exist are told, and `layouts`, the cases of vendor_layout.py.

Its modules import the closed packages of the Neuron SDK, which no public index has. Here a finder gives each of them as
a package in which every name is an empty class: enough to import what is under test, and nothing in it can run. A
process of its own, because the stand-ins must not be seen by any other test.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from vendor_layout import layouts

CLOSED = frozenset({"torch_xla", "torch_neuronx", "neuronx_distributed", "neuronxcc", "libneuronxla", "nki"})
"""Top-level packages of the Neuron SDK that are not on the public index."""


class _EmptyType(type):
    """Type of the empty classes: their attributes are empty classes too."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _empty(name)


def _empty(name: str) -> type:
    def accept_anything(self: object, *args: object, **kwargs: object) -> None:
        """Constructed with whatever the vendor's code passes."""

    return _EmptyType(name, (), {"__init__": accept_anything})


class _EmptyModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _empty(name)
        setattr(self, name, made)  # one class for each name: the vendor's code compares them
        return made


class EmptyPackages(MetaPathFinder, Loader):
    """Finds every module below CLOSED."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in CLOSED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: names come when they are asked for."""


def signature(module: str, name: str) -> dict[str, Any] | None:
    """Fields of vendor_calls.Signature for module.name, and the keywords that its body takes out of **kwargs."""
    found: Any = importlib.import_module(module)
    for attribute in name.split("."):
        found = getattr(found, attribute, None)
    if found is None:
        return None
    parameters = inspect.signature(found).parameters.values()
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_keyword = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    return {
        "positional": [p.name for p in by_position],
        "keyword_only": [p.name for p in by_keyword],
        "required": [p.name for p in (*by_position, *by_keyword) if p.default is p.empty],
        "any_positional": any(p.kind is p.VAR_POSITIONAL for p in parameters),
        "any_keyword": any(p.kind is p.VAR_KEYWORD for p in parameters),
        "popped": re.findall(r"kwargs\.pop\(\s*\"(\w+)\"", inspect.getsource(found)),
    }


def dataclass_fields(cls: Any) -> dict[str, str]:
    """Field names of a dataclass with their defaults as text, "" where there is none."""
    return {f.name: "" if f.default is MISSING else repr(f.default) for f in fields(cls) if f.init}


def exists(module: str, name: str) -> bool:
    """Whether `from module import name` works."""
    if hasattr(importlib.import_module(module), name):
        return True
    try:
        importlib.import_module(f"{module}.{name}")
    except ImportError:
        return False
    return True


def facts(functions: Sequence[Sequence[str]], names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """All that the tests hold our configuration against. `functions` and `names` are pairs of module and name."""
    from optimum.neuron.models import auto_model
    from optimum.neuron.models.training import TrainingNeuronConfig
    from optimum.neuron.version import __sdk_version__, __version__

    return {
        "version": __version__,
        "sdk": __sdk_version__,
        "requires": metadata.requires("optimum-neuron"),
        "TrainingNeuronConfig": dataclass_fields(TrainingNeuronConfig),
        "signatures": [signature(module, name) for module, name in functions],
        "missing": [[module, name] for module, name in names if not exists(module, name)],
        "trainingModels": sorted(
            model_type
            for model_type, task, mode in auto_model._REGISTERED_NEURON_MODELS
            if mode == "training" and task == "text-generation"
        ),
    }


def main(arguments: Sequence[str]) -> None:
    """One JSON object of facts on standard output; what libraries print goes to standard error."""
    os.environ.setdefault("DISABLE_TRANSFORMERS_PATCHING", "1")
    output, sys.stdout = sys.stdout, sys.stderr
    # Imported before the stand-ins exist, so that no open library takes this for a machine with torch_xla.
    for name in ("accelerate", "peft", "transformers"):
        importlib.import_module(name)
    sys.meta_path.insert(0, EmptyPackages())
    asked = json.loads(arguments[0])
    json.dump({**facts(asked["functions"], asked["names"]), "layouts": layouts(asked.get("layouts", []))}, output)


if __name__ == "__main__":
    main(sys.argv[1:])
