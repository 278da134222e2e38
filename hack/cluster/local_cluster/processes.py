"""Starting, finding and ending the cluster's own processes.

A record in `run/pids/<name>.json` holds pid, start time and boot of each. A process is taken for ours only if all
three agree, so a pid that was given to somebody else is never signalled. Processes are started in a session of
their own and outlive the caller; their output goes to `logs/<name>.log`.
"""

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from . import cgroups
from .settings import Settings


@dataclass(frozen=True)
class Record:
    """One started process. `start_ticks`: field 22 of /proc/<pid>/stat; `inputs`: digest of its command and files."""

    pid: int
    start_ticks: int
    boot_id: str
    inputs: str


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int) -> int | None:
    """When the process began, in clock ticks since boot; None if it is gone or only waits to be reaped."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before may itself hold spaces and brackets
    return None if fields[0] in "ZX" else int(fields[19])


def inputs_digest(argv: Sequence[str], env: Mapping[str, str], files: Sequence[Path]) -> str:
    """Changes when the command line, the environment or a configuration file does: then a running part is restarted."""
    total = hashlib.sha256(json.dumps([list(argv), dict(env)], sort_keys=True).encode())
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()


def _record_path(settings: Settings, name: str) -> Path:
    return settings.run / "pids" / f"{name}.json"


def find_running(settings: Settings, name: str) -> Record | None:
    """The record of the part if that very process still runs."""
    path = _record_path(settings, name)
    try:
        record = Record(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None  # never started, or the machine went down while the record was written
    alive = record.boot_id == boot_id() and start_ticks(record.pid) == record.start_ticks
    return record if alive else None


def start(settings: Settings, name: str, argv: Sequence[str], env: Mapping[str, str], inputs: str) -> Record:
    """Start detached, in the part's own cgroup, with a fresh log; the previous log is kept as `<name>.log.1`."""
    procs = cgroups.create_part(name)
    log = settings.logs / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_suffix(".log.1"))
    enter_group = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(procs)]
    with log.open("wb") as output:
        child = subprocess.Popen(
            [*enter_group, *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd="/",
            start_new_session=True,
        )
    record = Record(child.pid, start_ticks(child.pid) or 0, boot_id(), inputs)
    path = _record_path(settings, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(record)))
    temporary.replace(path)
    return record


def stop(settings: Settings, name: str, grace_s: float = 10.0) -> None:
    """SIGTERM, then SIGKILL after the grace. Nothing happens if the part does not run."""
    record = find_running(settings, name)
    if record is not None:
        os.kill(record.pid, signal.SIGTERM)
        end = time.monotonic() + grace_s
        while start_ticks(record.pid) == record.start_ticks:
            if time.monotonic() > end:
                os.kill(record.pid, signal.SIGKILL)
                break
            time.sleep(0.05)
    _record_path(settings, name).unlink(missing_ok=True)


def log_tail(settings: Settings, name: str, lines: int = 15) -> str:
    """The last lines of the part's log, for an error message."""
    try:
        text = (settings.logs / f"{name}.log").read_text(errors="replace")
    except OSError:
        return "(no log)"
    return "\n".join(text.splitlines()[-lines:]) or "(the log is empty)"
