"""kubectl as functions: apply, get, logs, and a watch whose objects arrive in a queue.

Everything the demo does to a cluster goes through here, with the kubectl on PATH and the cluster that KUBECONFIG or the
current context names. A failed command is a DemoProblem with kubectl's own words.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import IO, Any

from finetune_demo.problem import DemoProblem


def run(*arguments: str, stdin: str | None = None) -> str:
    """Standard output of `kubectl <arguments>`."""
    try:
        done = subprocess.run(["kubectl", *arguments], input=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DemoProblem("there is no kubectl on PATH: run the demo with `make demo`") from None
    if done.returncode:
        raise DemoProblem(f"kubectl {' '.join(arguments)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def apply(manifest: dict[str, Any]) -> None:
    """Server-side apply, which has no limit on the size of a ConfigMap but the API server's own."""
    run(
        "apply",
        "--server-side",
        "--force-conflicts",
        "--field-manager=finetune-demo",
        "-f",
        "-",
        stdin=json.dumps(manifest),
    )


def find(*arguments: str) -> dict[str, Any] | None:
    """The object that `kubectl get <arguments>` names, None when there is none."""
    found = run("get", *arguments, "--ignore-not-found", "-o", "json")
    return json.loads(found) if found.strip() else None


def items(*arguments: str) -> list[dict[str, Any]]:
    """The objects that `kubectl get <arguments>` lists."""
    listed: list[dict[str, Any]] = json.loads(run("get", *arguments, "-o", "json"))["items"]
    return listed


@dataclass(frozen=True)
class Seen:
    """One object of a watch; `value` is None when the watch has ended and `error` says why."""

    watch: str
    value: dict[str, Any] | None
    error: str = ""


class Watch:
    """`kubectl get KIND [NAME] <arguments> --watch`; each object goes into `queue` as a Seen under the watch's name.

    A named object is watched by its name as a field: for `kubectl get KIND NAME --watch` kubectl looks first and begins
    to watch later, and what changes in between is lost. The API server ends a watch after an hour at most: the last
    Seen has no value then, and the caller starts another.
    """

    def __init__(self, name: str, queue: SimpleQueue[Seen], kind: str, *arguments: str) -> None:
        self.name = name
        self._queue = queue
        if arguments and not arguments[0].startswith("-"):
            arguments = (f"--field-selector=metadata.name={arguments[0]}", *arguments[1:])
        self._process = subprocess.Popen(
            ["kubectl", "get", kind, *arguments, "--watch", "-o", "json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        for value in documents(self._process.stdout):
            self._queue.put(Seen(self.name, value))
        self._queue.put(Seen(self.name, None, self._process.stderr.read().strip()))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._thread.join(timeout=5)


def documents(stream: IO[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream that has them one behind the other over many lines, as kubectl prints a watch."""
    decoder = json.JSONDecoder()
    pending = ""
    for line in stream:
        pending += line
        # An object of kubectl ends with a brace at the beginning of a line; trying to parse at each line is quadratic.
        if not line.startswith("}"):
            continue
        value, end = decoder.raw_decode(pending.lstrip())
        pending = pending.lstrip()[end:]
        yield value
