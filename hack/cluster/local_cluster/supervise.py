"""Bringing one part to running and ready: started if it does not run, restarted if its inputs changed."""

from . import probes, processes
from .parts import Part
from .problem import ClusterProblem
from .settings import Settings
from .terminal import Progress

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _environment(part: Part) -> dict[str, str]:
    return {"PATH": _PATH, "HOME": "/root", **part.env}


def is_ready(settings: Settings, part: Part) -> bool:
    """Whether it runs with these very inputs and answers."""
    running = processes.find_running(settings, part.name)
    if running is None or running.inputs != processes.inputs_digest(part.argv, _environment(part), part.files):
        return False
    return probes.probe(settings, part.probe) is None


def ensure(settings: Settings, part: Part) -> None:
    """Start the part unless it runs with these very inputs, and wait until it is ready.

    Raises ClusterProblem with the last lines of its log if it ends or is not ready in time.
    """
    if is_ready(settings, part):
        return
    env = _environment(part)
    inputs = processes.inputs_digest(part.argv, env, part.files)
    running = processes.find_running(settings, part.name)
    with Progress(part.name) as line:
        if running is None or running.inputs != inputs:
            processes.stop(settings, part.name)
            running = processes.start(settings, part.name, part.argv, env, inputs)

        def check() -> str | None:
            if processes.find_running(settings, part.name) is None:
                raise ClusterProblem(f"{part.name} ended")
            return probes.probe(settings, part.probe)

        try:
            probes.wait(line, part.name, part.ready_within_s, check)
        except ClusterProblem as problem:
            tail = processes.log_tail(settings, part.name)
            log = settings.logs / f"{part.name}.log"
            raise ClusterProblem(f"{problem}; the end of {log}:\n{tail}") from problem
