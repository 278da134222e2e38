#!/usr/bin/env python3
"""Lends a vendor's base image's packages to a virtual environment, and proves that none of them is replaced.

Run by images/trainer/neuron.Dockerfile, by the base's Python before anything is installed, by the environment's after:

    python3 vendor_packages.py lend /opt/finetune
    /opt/finetune/bin/python vendor_packages.py close
    /opt/finetune/bin/python vendor_packages.py check

The environment's own packages come first on sys.path and the base's after them, and no file of the base is written.
What the vendor built for each other (torch, the compiler, the runtime's libraries, numpy) may come from the base only.
`check` ends with exit code 1 and one line for each problem. `lend` needs the standard library, `check` packaging too.
"""

from __future__ import annotations

import importlib.util
import re
import site
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

PTH_NAME = "vendor_base.pth"
VENDORS_OWN = re.compile(
    r"torch|torch-(xla|neuronx)|torchvision|torchaudio|neuronx?-.*|libneuronxla|aws-neuronx?-.*|nki|nki-.*"
    r"|numpy|protobuf|ml-dtypes|nvidia-.*|triton"
)
"""Normalised names of what only the base may have: the vendor's, and what its binaries are built against."""
NEEDED = ("torch", "torch-xla", "torch-neuronx", "neuronx-cc", "neuronx-distributed", "libneuronxla", "numpy")
"""What makes an image a Neuron base for training."""

Packages = Mapping[str, Distribution]


def normalised(name: str) -> str:
    """The one spelling of a distribution's name: torch_neuronx and Torch.Neuronx are torch-neuronx."""
    return re.sub(r"[-_.]+", "-", name).lower()


def packages_of(folders: Sequence[str]) -> Packages:
    """The distributions of some site-packages folders by normalised name; of two with one name the first."""
    found: dict[str, Distribution] = {}
    for distribution in distributions(path=list(folders)):
        found.setdefault(normalised(distribution.metadata["Name"]), distribution)
    return found


def site_folders() -> list[str]:
    """The site-packages folders of the interpreter that runs this; Debian's own Python has several."""
    named = [*(sysconfig.get_paths()[key] for key in ("purelib", "platlib")), *site.getsitepackages()]
    return [folder for folder in dict.fromkeys(named) if Path(folder).is_dir()]


def lend(environment: Path) -> Path:
    """Put this interpreter's site-packages after those of `environment`; the file written. SystemExit: no Neuron base.

    By a .pth file and not by --system-site-packages, which would pass the base's packages by where the base's Python is
    itself a virtual environment. addsitedir reads the base's own .pth files too.
    """
    there = packages_of(site_folders())
    missing = [name for name in NEEDED if name not in there]
    if missing:
        raise SystemExit(
            f"vendor_packages: {sys.executable} has no {', '.join(missing)}: BASE_IMAGE must be a Neuron training "
            "image (trainer/src/finetune_trainer/neuron_stack.py lists them) whose python3 has the SDK's packages"
        )
    (own,) = environment.glob("lib/python3*/site-packages")
    path = own / PTH_NAME
    path.write_text("".join(f"import site; site.addsitedir({folder!r})\n" for folder in site_folders()))
    return path


def lent_folders(own: Path) -> list[str]:
    """The folders that lend() put into the site-packages folder `own`. SystemExit when it was not called."""
    path = own / PTH_NAME
    if not path.is_file():
        raise SystemExit(f"vendor_packages: {path} is missing: run `lend` with the base's Python first")
    return re.findall(r"addsitedir\('([^']+)'\)", path.read_text())


def problems(own: Packages, base: Packages) -> Iterator[str]:
    """What is wrong with `own` installed over `base`: each a sentence with names, versions and the remedy.

    Of the base's packages only the vendor's and what they need are held to their requirements: an image has much else,
    none of which a stage imports, and some of it does not fit together before we come.
    """
    for name in sorted(own):
        if VENDORS_OWN.fullmatch(name):
            there = f"the base has {base[name].version}" if name in base else "the base does not have it"
            yield (
                f"{name} {own[name].version} is the vendor's to install ({there}): "
                "take it out of requirements/neuron.in"
            )
    seen = {**base, **own}
    for name in sorted(own):
        for wanted, specifier, text in _requirements(own[name]):
            if wanted not in seen:
                yield f"{name} {own[name].version} needs {text}, which neither has: add it to requirements/neuron.in"
            elif not specifier.contains(seen[wanted].version, prereleases=True):
                yield f"{name} {own[name].version} needs {text}, and {wanted} {seen[wanted].version} is there"
    for name in sorted(_vendors_closure(base) - own.keys()):
        for wanted, specifier, text in _requirements(base[name]):
            if wanted not in own or wanted not in base:
                continue
            before, after = base[wanted].version, own[wanted].version
            if specifier.contains(before, prereleases=True) and not specifier.contains(after, prereleases=True):
                yield (
                    f"the base's {name} {base[name].version} needs {text} and had {before}; {wanted} {after} would be "
                    "seen in its place: pin one in requirements/neuron.in that fits"
                )


def _vendors_closure(base: Packages) -> set[str]:
    """The vendor's packages of a base and all that these need, in turn."""
    found: set[str] = set()
    ahead = [name for name in base if VENDORS_OWN.fullmatch(name)]
    while ahead:
        name = ahead.pop()
        if name in base and name not in found:
            found.add(name)
            ahead += [wanted for wanted, _, _ in _requirements(base[name])]
    return found


def _requirements(distribution: Distribution) -> Iterator[tuple[str, SpecifierSet, str]]:
    """(name, versions, as written) of each requirement that holds here, extras left out."""
    from packaging.requirements import InvalidRequirement, Requirement

    for text in distribution.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue  # an old package's own way of writing, which no tool reads
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield normalised(requirement.name), requirement.specifier, text


def close(own: Packages, folder: Path, lent: Sequence[str]) -> list[Path]:
    """Make whole the parts of packages that are whole in the base; the empty __init__.py files written below `folder`.

    optimum is in parts: several distributions share its folders, of which one without __init__.py yields to one with it
    wherever that stands on sys.path. Older versions have one in places where ours have none, so ours would be hidden.
    """
    written = []
    for name in sorted(own):
        parts = {parent for path in own[name].files or () if path.suffix == ".py" for parent in Path(path).parents}
        for part in sorted(part for part in parts - {Path()} if ".." not in part.parts):
            inside = folder / part / "__init__.py"
            if not inside.exists() and any((Path(base) / part / "__init__.py").exists() for base in lent):
                inside.touch()
                written.append(inside)
    return written


def hidden(own: Packages, folder: Path) -> Iterator[str]:
    """Modules of `own` that Python would take from elsewhere than `folder`, each a sentence.

    A folder without __init__.py is only a part of a package, and yields to a whole one further down sys.path.
    """
    for name in sorted(own):
        for module in _modules(own[name]):
            spec = importlib.util.find_spec(module)
            origin = spec.origin if spec is not None else None
            if origin is None or not Path(origin).is_relative_to(folder):
                yield f"{name} {own[name].version} is installed, and its module {module} would come from {origin}"


def _modules(distribution: Distribution) -> Iterator[str]:
    """The uppermost whole packages and modules of a distribution: of optimum, which is in parts, those below it."""
    files = {path.as_posix() for path in distribution.files or ()}
    packages = {path.removesuffix("/__init__.py") for path in files if path.endswith("/__init__.py")}
    for package in sorted(packages):
        parents = Path(package).parents
        if not any(parent.as_posix() in packages for parent in parents):
            yield package.replace("/", ".")
    yield from sorted(path.removesuffix(".py") for path in files if path.endswith(".py") and "/" not in path)


def main(arguments: list[str]) -> int:
    """`lend ENVIRONMENT`, `close` or `check`; see the module."""
    if arguments[:1] == ["lend"] and len(arguments) == 2:
        print(f"vendor_packages: {lend(Path(arguments[1]))} lends {', '.join(site_folders())}")
        return 0
    if arguments not in (["close"], ["check"]):
        raise SystemExit("usage: vendor_packages.py lend ENVIRONMENT | close | check")
    folder = Path(sysconfig.get_paths()["purelib"])
    lent = lent_folders(folder)
    own, base = packages_of([str(folder)]), packages_of(lent)
    if arguments == ["close"]:
        for path in close(own, folder, lent):
            print(f"vendor_packages: {path} was added, or the base's package would hide ours")
        return 0
    for name in sorted(own.keys() & base.keys()):
        print(f"vendor_packages: {name} {own[name].version} is seen in place of the base's {base[name].version}")
    for name in NEEDED:
        print(f"vendor_packages: {name} {base[name].version} is the base's")
    found = [*problems(own, base), *hidden(own, folder)]
    for problem in found:
        print(f"vendor_packages: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
