"""Compiled graphs of Trainium on the workspace: what a training's graphs depend on, and whether they all are there.

stages/compile.py fills the cache and writes one manifest a key; stages/train.py looks its own key up before it starts.
The graphs lie where the vendor's libneuronxla puts them and under the names that it gives them:

    neuronxcc-<version>/MODULE_<graph>+<flags>/   model.hlo_module.pb (the graph), compile_flags.json; once compiled
                                                  model.neff and model.done; model.log where that failed;
                                                  model.hlo_module.pb.lock while somebody compiles it
    keys/<16 hex digits>.json                     ours: a key in full, and the graphs that its training needs
    keys/.compiling                               ours: locked by every pod that may compile now

(aws-neuron-sdk, "Neuron Persistent Cache"; states of an entry: huggingface/optimum-neuron, optimum/neuron/cache.) The
vendor has no manifest: whether a training finds everything it learns by running. Nobody evicts anything; a folder that
is deleted is missed by its manifest and compiled again. Standard library only: the launchers import no torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_trainer import contract
from finetune_trainer.contract import StageConfig, graph_spec
from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.json_files import is_count, is_plain_path, read_json_file
from finetune_trainer.locks import release_lock, shared_lock, try_lock
from finetune_trainer.neuron_environment import CC_FLAGS, cache_paths, compiled_with, with_cache_path

KEYS_FOLDER = "keys"
ARTIFACT_NAME = "graphs.json"
"""In compile's artifact: {"key": its name, "parts": its parts, "graphs": names}."""
NEFF_NAME = "model.neff"
DONE_NAME = "model.done"
FAILURE_NAME = "model.log"
LOCK_SUFFIX = ".lock"

_COMPILING = ".compiling"
_VERSION = 1
_GRAPHS = "neuronxcc-*/MODULE_*"
_PACKAGES = (
    "neuronx-cc",
    "libneuronxla",
    "torch-neuronx",
    "neuronx-distributed",
    "optimum-neuron",
    "torch",
    "torch-xla",
    "transformers",
    "peft",
)
"""Whose version decides what a graph looks like or what is made of it."""
_NOT_OF_THE_MODEL = frozenset({"_name_or_path", "_commit_hash", "transformers_version"})
"""Keys of config.json that say where a model came from."""
_MOST_DIFFERENCES = 6
_LOOK_SECONDS = 1.0
UNSEEN_SECONDS = 90.0
"""How long what another node wrote may stay unseen here: NFS remembers for up to a minute that a name was absent."""
_RETRY_FAILED = "--retry_failed_compilation"
_RETRIES = "NEURON_PARALLEL_COMPILE_MAX_RETRIES"


def compiler_environment(environment: Mapping[str, str], workspace: Path) -> dict[str, str]:
    """The environment of a program whose graphs are compiled, or were: the same for compile and train.

    The cache is where the operator says, else below `workspace`. A graph that failed is kept as failed by the vendor
    and skipped for good unless the compiler is told otherwise, and its own second try costs minutes where the next
    attempt of the stage costs a trace (aws-neuron-sdk, pytorch-neuron-parallel-compile.rst, for both settings).
    UserError where the two variables name two folders, or one that optimum-neuron cannot read.
    """
    paths = cache_paths(environment)
    if len(set(paths.values())) > 1:
        told = " and ".join(f"{path} in {name}" for name, path in paths.items())
        raise UserError(
            "InvalidCachePath", f"the compiler's cache is {told}: set one, in stages.train.env, which compile has too"
        )
    path = next(iter(paths.values()), None) or str(workspace / contract.NEURON_CACHE_FOLDER)
    flags = environment.get(CC_FLAGS, "")
    if _RETRY_FAILED not in flags.split():
        flags = f"{flags} {_RETRY_FAILED}"
    try:
        return {_RETRIES: "1", **with_cache_path({**environment, CC_FLAGS: flags}, path)}
    except ValueError as error:
        raise UserError("InvalidCachePath", str(error)) from error


def cache_folder(environment: Mapping[str, str]) -> Path:
    """The cache's folder in an environment by compiler_environment."""
    return Path(next(iter(cache_paths(environment).values())))


# ---- the key


@dataclass(frozen=True)
class CacheKey:
    """What a training's graphs depend on, in parts. Equal parts make equal graphs; the reverse need not hold."""

    parts: Mapping[str, Any]

    @property
    def name(self) -> str:
        """16 hexadecimal digits."""
        return contract.digest_of(self.parts).removeprefix("sha256:")[:16]


def training_key(config: StageConfig, environment: Mapping[str, str]) -> CacheKey:
    """The key of the program that `config` (of compile or train) runs in `environment`.

    The image is part of it: our own code decides about graphs as much as the vendor's. Weights and rows are not, only
    their shapes; nor is anything of spec.training that contract.graph_spec leaves out.
    """
    model = _read(config.input_path(contract.MODEL_INPUT) / "config.json")
    data = _read(config.input_path(contract.PREPARE) / "data.json")
    return CacheKey(
        {
            "image": config.image,
            "versions": {name: found for name in _PACKAGES if (found := _installed(name)) is not None},
            "model": {name: value for name, value in model.items() if name not in _NOT_OF_THE_MODEL},
            "rows": {
                "length": data.get("rowLength"),
                "packing": data.get("packing"),
                "heldOut": bool(data.get("validationRows")),
            },
            "parallelism": dict(config.parallelism),
            "spec": graph_spec(config.spec),
            "environment": compiled_with(environment),
        }
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_json_file(path)
    except FileNotFoundError as error:
        raise CorruptArtifact(f"{path} is missing: delete its folder and run its stage again") from error
    if not isinstance(value, dict):
        raise CorruptArtifact(f"{path} is no JSON object: delete its folder and run its stage again")
    return value


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def key_differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """One line for each part of a key that is not the same: name, value in `old`, value in `new`."""
    lines = []
    for name in sorted({*old, *new}):
        path = f"{where}.{name}" if where else str(name)
        before, now = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += key_differences(before, now, path)
        elif before != now:
            lines.append(f"{path} was {_shown(before)} and is {_shown(now)}")
    return lines


def told_differences(lines: Sequence[str]) -> str:
    """The first lines of key_differences, and how many more there are."""
    more = len(lines) - _MOST_DIFFERENCES
    shown = "; ".join(lines[:_MOST_DIFFERENCES])
    return f"{shown}; and {more} more" if more > 0 else shown


def _shown(value: Any) -> str:
    text = json.dumps(value, sort_keys=True) if value is not None else "absent"
    return text if len(text) <= 200 else f"{text[:200]}…"


# ---- the cache


@dataclass(frozen=True)
class CachedGraphs:
    """A key's manifest: what its training needs, each graph by its folder in the cache with the bytes of its NEFF."""

    parts: Mapping[str, Any]
    graphs: Mapping[str, int]
    seconds: float


class NeuronCache:
    """The cache in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def keys_folder(self) -> Path:
        return self.folder / KEYS_FOLDER

    def manifest_path(self, key: CacheKey) -> Path:
        return self.keys_folder / f"{key.name}.json"

    def find(self, key: CacheKey) -> CachedGraphs | None:
        """The manifest of `key`, None where there is none or it cannot be read."""
        return _parse_manifest(self.manifest_path(key))

    def missing(self, cached: CachedGraphs) -> list[str]:
        """Graphs of a manifest that are not in the cache any more as they were."""
        return [name for name, size in cached.graphs.items() if self.neff_bytes(name) != size]

    def keep(self, key: CacheKey, graphs: Iterable[str], seconds: float) -> CachedGraphs:
        """Write the manifest of `key`; ValueError where one of `graphs` is not compiled."""
        sizes = {}
        for name in sorted(set(graphs)):
            size = self.neff_bytes(name)
            if size is None:
                raise ValueError(f"{self.folder / name} is not compiled")
            sizes[name] = size
        cached = CachedGraphs(key.parts, sizes, seconds)
        value = {
            "version": _VERSION,
            "key": dict(key.parts),
            "graphs": [{"path": name, "bytes": size} for name, size in sizes.items()],
            "seconds": round(seconds, 3),
        }
        self.keys_folder.mkdir(parents=True, exist_ok=True)
        _replace(self.manifest_path(key), contract.canonical_json(value))
        return cached

    def forget(self, key: CacheKey) -> None:
        """Remove the manifest of `key`: it promised what is not there."""
        self.manifest_path(key).unlink(missing_ok=True)

    def explain_miss(self, key: CacheKey) -> str:
        """Why `key` is not in the cache, in words: what differs from the nearest key that is."""
        nearest: list[str] | None = None
        for path in sorted(self.keys_folder.glob("*.json")):
            other = _parse_manifest(path)
            if other is None or path == self.manifest_path(key):
                continue
            lines = key_differences(other.parts, key.parts)
            if nearest is None or len(lines) < len(nearest):
                nearest = lines
        return "nothing was compiled into this cache yet" if nearest is None else told_differences(nearest)

    # ---- entries

    def neff_bytes(self, name: str) -> int | None:
        """Size of a compiled graph; None while it is not compiled, or only failed to be."""
        entry = self.folder / name
        try:
            size = (entry / NEFF_NAME).stat().st_size
        except OSError:
            return None
        return size if size and (entry / DONE_NAME).exists() else None

    def failure(self, name: str) -> str | None:
        """What the compiler said of a graph that it could not compile; None for any other."""
        if self.neff_bytes(name) is not None:
            return None
        try:
            with (self.folder / name / FAILURE_NAME).open(encoding="utf-8", errors="replace") as file:
                return file.read(1 << 20)
        except OSError:
            return None

    def is_locked(self, name: str) -> bool:
        """Whether somebody compiles the graph, or died while doing so."""
        return any((self.folder / name).glob(f"*{LOCK_SUFFIX}"))

    # ---- who compiles

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Held by every process that may compile, so that others can tell its locks from those of the dead."""
        self.keys_folder.mkdir(parents=True, exist_ok=True)
        with shared_lock(self.keys_folder / _COMPILING):
            yield

    def clear_dead_locks(self) -> list[str]:
        """Remove the compiler's lock files where nobody compiles into this cache; names of the graphs that had one.

        libneuronxla's lock is a file that exists; who dies leaves it, and everybody after that waits for it for good
        ("Another process must be compiling"). Nothing is removed while anybody holds compiling(), or where the volume
        has no file locks to tell by.
        """
        self.keys_folder.mkdir(parents=True, exist_ok=True)
        nobody_compiles = try_lock(self.keys_folder / _COMPILING)
        if nobody_compiles.descriptor is None:
            return []
        removed = set()
        try:
            for path in self.folder.glob(f"{_GRAPHS}/*{LOCK_SUFFIX}"):
                path.unlink(missing_ok=True)
                removed.add(self.name_of(path))
        finally:
            release_lock(nobody_compiles.descriptor)
        return sorted(removed)

    def name_of(self, path: Path) -> str:
        """A graph's name, by which manifests have it, of any path in its folder."""
        return PurePosixPath(*path.relative_to(self.folder).parts[:2]).as_posix()


def is_still_compiled(config: StageConfig, environment: Mapping[str, str]) -> bool:
    """Whether the graphs of a complete compile artifact are in the cache, which others may have emptied since."""
    known = compiler_environment(environment, config.workspace_path)
    cache, key = NeuronCache(cache_folder(known)), training_key(config, known)
    found = cache.find(key)
    return found is not None and not cache.missing(found)


def is_seen(look: Callable[[], bool], what: str) -> bool:
    """Whether `look` is true, now or within UNSEEN_SECONDS."""
    until, said = time.monotonic() + UNSEEN_SECONDS, False
    while not look():
        if time.monotonic() >= until:
            return False
        if not said:
            said = True
            print(f"waiting to see {what}, which another node wrote", flush=True)
        time.sleep(_LOOK_SECONDS)
    return True


def graph_name(path: str) -> str | None:
    """The graph's name in a path that the vendor logs, whatever the cache's folder; None where it is in none."""
    parts = PurePosixPath(path).parts
    for compiler, module in pairwise(parts):
        if compiler.startswith("neuronxcc-") and module.startswith("MODULE_"):
            return f"{compiler}/{module}"
    return None


def _parse_manifest(path: Path) -> CachedGraphs | None:
    try:
        value = read_json_file(path)
    except (OSError, CorruptArtifact):
        return None
    if not isinstance(value, dict) or value.get("version") != _VERSION or not isinstance(value.get("key"), dict):
        return None
    graphs = {}
    for entry in value.get("graphs") or ():
        if not isinstance(entry, dict) or not is_plain_path(entry.get("path")) or not is_count(entry.get("bytes")):
            return None
        graphs[entry["path"]] = entry["bytes"]
    seconds = value.get("seconds")
    return CachedGraphs(value["key"], graphs, float(seconds) if isinstance(seconds, (int, float)) else 0.0)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
