"""The programs that the cluster runs: which Go modules they come from, and where the built ones are kept.

A module's binaries lie in `cache/bin/<module>-<digest of its inputs>/`, so an unchanged tree never builds twice and
a changed one never runs what is stale. A folder gets its final name only when everything in it is built. A folder
named in KUBEBUILDER_ASSETS is looked at first.
"""

import fcntl
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from .digests import content_digest
from .problem import ClusterProblem
from .settings import KUBERNETES_VERSION, Settings, architecture
from .terminal import Progress, say

_VERSION = "k8s.io/component-base/version"
_MAJOR, _MINOR, _ = KUBERNETES_VERSION.removeprefix("v").split(".")
# Without these Kubernetes calls itself v0.0.0-master, and clients refuse to compare versions with it.
_KUBERNETES_LDFLAGS = (
    f"-s -w -X {_VERSION}.gitVersion={KUBERNETES_VERSION} -X {_VERSION}.gitMajor={_MAJOR} "
    f"-X {_VERSION}.gitMinor={_MINOR} -X {_VERSION}.gitTreeState=clean"
)
KUBE_PARTS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "kubectl")


@dataclass(frozen=True)
class Module:
    """One go.mod below hack/cluster/go: its packages to build, by the name of the binary, and names linked to it.

    `resources`: a Go module and a folder in it with manifests to keep beside the binaries.
    """

    name: str
    packages: dict[str, str]
    links: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ldflags: str = "-s -w"
    resources: tuple[str, str] | None = None

    @property
    def programs(self) -> tuple[str, ...]:
        linked = (name for names in self.links.values() for name in names)
        return (*(name for name in self.packages if name not in self.links), *linked)


MODULES = (
    Module(
        "kubernetes",
        {
            "kube": "./kube",
            "coredns": "./coredns",
            "etcd": "./etcd",
            "helm": "helm.sh/helm/v3/cmd/helm",
            "pause": "./pause",
        },
        {"kube": KUBE_PARTS},
        _KUBERNETES_LDFLAGS,
    ),
    Module(
        "buildkit",
        {"buildkitd": "github.com/moby/buildkit/cmd/buildkitd", "buildctl": "github.com/moby/buildkit/cmd/buildctl"},
    ),
)
# Built only for those who ask for the add-on of the same name.
ADD_ON_MODULES = (
    Module(
        "kueue",
        {"kueue": "sigs.k8s.io/kueue/cmd/kueue"},
        ldflags="-s -w -X sigs.k8s.io/kueue/pkg/version.GitVersion=v0.12.2",
        resources=("sigs.k8s.io/kueue", "config/components"),
    ),
    Module("kwok", {"kwok": "sigs.k8s.io/kwok/cmd/kwok"}, resources=("sigs.k8s.io/kwok", "kustomize/rbac")),
)
_FROM_ASSETS = ("kube-apiserver", "etcd", "kubectl")
_RESOURCES = "resources"


def module_folder(settings: Settings, module: Module) -> Path:
    """Where the module's binaries are or will be. Changes with its sources, its flags and the processor."""
    salt = f"{module.packages} {module.links} {module.ldflags} {architecture()}"
    if module.resources:
        salt += f" {module.resources}"
    digest = content_digest([settings.source / "go" / module.name], salt)
    return settings.cache / "bin" / f"{module.name}-{digest[:16]}"


def resources(settings: Settings, name: str) -> Path:
    """The manifests of an add-on's module, as they lie in it."""
    module = next(module for module in ADD_ON_MODULES if module.name == name)
    return module_folder(settings, module) / _RESOURCES


def missing_modules(settings: Settings, add_ons: Collection[str] = ()) -> list[Module]:
    """What is still to be built for the cluster itself and for these add-ons."""
    wanted = (*MODULES, *(module for module in ADD_ON_MODULES if module.name in add_ons))
    return [module for module in wanted if not module_folder(settings, module).is_dir()]


def find_go() -> Path | None:
    """The go command: from PATH, else where its own installer puts it."""
    found = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    return Path(found) if found else None


def _build(settings: Settings, module: Module, go: Path) -> None:
    folder = module_folder(settings, module)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    source = settings.source / "go" / module.name
    env = {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off", "GOFLAGS": "-trimpath -buildvcs=false -mod=readonly"}
    for name, package in module.packages.items():
        argv = [str(go), "build", "-v", "-ldflags", module.ldflags, "-o", str(unfinished / name), package]
        with Progress(f"building {name}", done="built") as line:
            _run_build(argv, source, env, line, name)
    for name, links in module.links.items():
        for link in links:
            (unfinished / link).symlink_to(name)
    if module.resources:
        _copy_resources(source, env, go, *module.resources, unfinished / _RESOURCES)
    unfinished.rename(folder)


def _copy_resources(source: Path, env: Mapping[str, str], go: Path, name: str, below: str, target: Path) -> None:
    """Copy the YAML files of a folder of a Go module, which the build has downloaded to Go's own cache."""
    argv = [str(go), "list", "-m", "-f", "{{.Dir}}", name]
    listed = subprocess.run(argv, cwd=source, env=env, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        raise ClusterProblem(f"the folder of {name} is not known to go: {listed.stderr.strip()}")
    folder = Path(listed.stdout.strip()) / below
    for file in folder.rglob("*.yaml"):
        copy = target / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())  # without its mode: Go's cache is read-only


def _run_build(argv: list[str], source: Path, env: dict[str, str], line: Progress, name: str) -> None:
    """Run `go build -v`, which prints a line a package compiled and a line a module downloaded."""
    kept: list[str] = []
    compiled = 0
    with subprocess.Popen(argv, cwd=source, env=env, stderr=subprocess.PIPE, text=True) as build:
        assert build.stderr is not None
        for text in build.stderr:
            if text.startswith("go: downloading"):
                line.note(text.strip().removeprefix("go: "))
            else:
                compiled += 1
                kept = [*kept[-30:], text.rstrip()]
                line.note(f"{compiled} packages compiled")
    if build.returncode != 0:
        raise ClusterProblem(
            f"building {name} failed (exit code {build.returncode}); its last lines:\n  " + "\n  ".join(kept[-15:])
        )


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file, so that two calls at once do not do the same work twice or undo each other's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"  waiting for another call that holds {path} ({what})")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_missing(settings: Settings, add_ons: Collection[str] = ()) -> None:
    """Build what is not in the cache, and delete binaries of earlier inputs."""
    if not missing_modules(settings, add_ons):
        return
    with exclusive(settings.cache / "bin.lock", "it builds the cluster's binaries"):
        for module in missing_modules(settings, add_ons):
            go = find_go()
            if go is None:
                raise ClusterProblem("no `go` command found; install Go 1.25 or newer from the Go project's site")
            _build(settings, module, go)
            for old in module_folder(settings, module).parent.glob(f"{module.name}-*"):
                if old != module_folder(settings, module):
                    shutil.rmtree(old)


def _asset_fits(program: Path) -> bool:
    """Whether a ready binary may stand in for ours: Kubernetes' parts must be of our own minor version."""
    if program.name == "etcd":
        return True
    argv = [str(program), "version", "--client"] if program.name == "kubectl" else [str(program), "--version"]
    text = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    found = re.search(r"v(\d+)\.(\d+)\.\d+", text)
    return found is not None and found.groups() == (_MAJOR, _MINOR)


@functools.cache
def programs(settings: Settings) -> Mapping[str, Path]:
    """Every program by name, decided once a run. What is not built yet (build_missing) is named all the same."""
    modules = (*MODULES, *ADD_ON_MODULES)
    found = {name: module_folder(settings, module) / name for module in modules for name in module.programs}
    if settings.assets is not None:
        for name in _FROM_ASSETS:
            program = settings.assets / name
            if not program.is_file():
                continue
            if _asset_fits(program):
                found[name] = program
            else:
                say(f"  {program} is not of Kubernetes {_MAJOR}.{_MINOR}: the cluster's own {name} is used instead")
    return MappingProxyType(found)
