"""A thin client for end-to-end tests: kubectl underneath, watches instead of polling, a deadline on every wait."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

Object = dict[str, Any]


class DeadlineExceeded(AssertionError):
    """What was waited for did not come; the message has the last state seen."""


def kubectl(*args: str, stdin: str | None = None, check: bool = True, timeout: float = 120) -> str:
    """Standard output of kubectl; AssertionError with its stderr when it fails and `check` is set."""
    done = subprocess.run(["kubectl", *args], input=stdin, text=True, capture_output=True, timeout=timeout, check=False)
    if check and done.returncode != 0:
        raise AssertionError(f"kubectl {' '.join(args)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout if check else done.stdout + done.stderr


def get(*args: str) -> Object:
    """`kubectl get … -o json` as an object."""
    return json.loads(kubectl("get", *args, "-o", "json"))  # type: ignore[no-any-return]


def items(*args: str) -> list[Object]:
    return get(*args)["items"]  # type: ignore[no-any-return]


def apply(manifest: Object | str) -> None:
    kubectl("apply", "-f", "-", stdin=manifest if isinstance(manifest, str) else json.dumps(manifest))


def watch(*args: str, seconds: float) -> Iterator[Object]:
    """Objects as `kubectl get … --watch` reports them, the present ones first, for at most `seconds`.

    One that is named is asked for as a list of one: what happens to it between kubectl's look and its watch is lost
    otherwise, for kubectl then begins to watch at some later version and passes over the first object.
    """
    kind, *rest = args
    if rest and not rest[0].startswith("-"):
        rest = ["--field-selector", f"metadata.name={rest[0]}", *rest[1:]]
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        command = ["kubectl", "get", kind, *rest, "--watch", "-o", "json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            timer = threading.Timer(left, process.kill)
            timer.start()
            try:
                assert process.stdout is not None
                lines: list[str] = []
                for line in process.stdout:
                    lines.append(line)
                    if line.rstrip("\n") == "}":  # kubectl indents: only an object's last line is a bare brace
                        value = json.loads("".join(lines))
                        lines.clear()
                        yield from value["items"] if value.get("kind") == "List" else [value]
            finally:
                timer.cancel()
                process.kill()


def wait_for(
    *args: str,
    until: Callable[[Object], Any],
    deadline: float,
    reason: str,
    unless: Callable[[Object], str | None] = lambda _: None,
) -> Object:
    """The first object of `kubectl get ARGS --watch` for which `until` is true.

    A sentence that `unless` returns ends the wait and fails the test. DeadlineExceeded after `deadline` seconds.
    """
    last: Object = {}
    for last in watch(*args, seconds=deadline):
        if until(last):
            return last
        if told := unless(last):
            raise AssertionError(f"waiting for {reason}: {told}")
    raise DeadlineExceeded(f"{reason} did not happen in {deadline:g} s; last status: {json.dumps(last.get('status'))}")


def eventually(check: Callable[[], Any], *, deadline: float, reason: str) -> Any:
    """The first true value of `check`, for what no single watch can see. DeadlineExceeded after `deadline` seconds."""
    ends = time.monotonic() + deadline
    pause = threading.Event()
    while True:
        if value := check():
            return value
        if time.monotonic() > ends:
            raise DeadlineExceeded(f"{reason} did not happen in {deadline:g} s")
        pause.wait(0.25)
