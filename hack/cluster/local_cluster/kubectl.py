"""kubectl as the cluster's admin: text in, text or JSON out. Used by `up`, `status` and the add-ons."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import binaries
from .problem import ClusterProblem
from .settings import Settings

Manifest = dict[str, Any]


def run(settings: Settings, *arguments: str, stdin: str | None = None) -> str:
    """kubectl's output. Raises ClusterProblem with its error text."""
    argv = [str(binaries.programs(settings)["kubectl"]), "--kubeconfig", str(settings.kubeconfig), *arguments]
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterProblem(f"`kubectl {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout


def apply(settings: Settings, manifests: Sequence[Manifest]) -> None:
    """Server-side apply of all, taking over fields that somebody else has set."""
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)})
    run(settings, "apply", "--server-side", "--force-conflicts", "-f", "-", stdin=listed)


def find(settings: Settings, *arguments: str) -> list[Manifest]:
    """`kubectl get` as a list of objects; empty if there is none."""
    found = json.loads(run(settings, "get", *arguments, "--ignore-not-found", "-o", "json") or '{"items": []}')
    items: list[Manifest] = found.get("items", [found])
    return items


def parse(settings: Settings, files: Sequence[Path]) -> list[Manifest]:
    """The objects in YAML files. kubectl reads them, since Python's standard library has no YAML."""
    named = [word for file in files for word in ("-f", str(file))]
    return documents(run(settings, "create", "--dry-run=client", "--validate=false", "-o", "json", *named))


def documents(text: str) -> list[Manifest]:
    """JSON objects written one after the other, Lists taken apart. Pure."""
    decoder = json.JSONDecoder()
    found: list[Manifest] = []
    rest = text.lstrip()
    while rest:
        value, end = decoder.raw_decode(rest)
        found += value["items"] if value.get("kind") == "List" else [value]
        rest = rest[end:].lstrip()
    return found
