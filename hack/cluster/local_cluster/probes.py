"""Asking a part whether it works, and waiting for the answer with a deadline."""

import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from .problem import ClusterProblem
from .settings import Settings
from .terminal import Progress

_POLL_S = 0.1


def probe(settings: Settings, url: str, timeout_s: float = 2.0) -> str | None:
    """None if the part answers, else why not. `url`: http, https (as the admin) or unix:<socket path>."""
    if url.startswith("unix:"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            try:
                connection.connect(url.removeprefix("unix:"))
            except OSError as error:
                return f"{url}: {error.strerror or error}"
        return None
    try:
        context = _admin_context(settings) if url.startswith("https") else None
        with urllib.request.urlopen(url, timeout=timeout_s, context=context):
            return None
    except urllib.error.HTTPError as error:
        return f"{url}: HTTP {error.code}: {error.read(200).decode(errors='replace').strip()}"
    except OSError as error:
        return f"{url}: {error}"


def _admin_context(settings: Settings) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(settings.pki / "ca.crt"))
    context.load_cert_chain(settings.pki / "admin.crt", settings.pki / "admin.key")
    return context


def wait(line: Progress, what: str, within_s: float, check: Callable[[], str | None]) -> None:
    """Call `check` until it returns None. Raises with its last answer at the deadline."""
    end = time.monotonic() + within_s
    while (reason := check()) is not None:
        if time.monotonic() > end:
            raise ClusterProblem(f"{what} is not ready after {within_s:.0f} s: {reason}")
        line.note(reason)
        time.sleep(_POLL_S)
