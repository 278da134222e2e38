"""The operator as a process of its own, out of the cluster, for contract tests: started, killed, started again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import kube

TRAINER_IMAGE = "example.invalid/finetune-trainer:contract"


def environment(namespace: str, **env: str) -> dict[str, str]:
    """What a process has for its environment to run an operator that watches one namespace."""
    # Bytecode is cached: compiling the client library anew at each start takes longer than most tests.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {
        **inherited,
        "FINETUNE_TRAINER_IMAGE": TRAINER_IMAGE,
        "FINETUNE_NEURON_IMAGE": TRAINER_IMAGE,
        "FINETUNE_WATCH_NAMESPACES": namespace,
        "FINETUNE_HEALTH_PORT": "0",
        "FINETUNE_RETRY_FIRST_SECONDS": "0.5",
        **env,
    }


class OperatorProcess:
    """One operator that watches one namespace. `log` is its output; stop() fails on a traceback in it.

    `command` is what the interpreter runs: the operator, or a program that runs it.
    """

    def __init__(
        self, namespace: str, log: Path, *, command: Sequence[str] = ("-m", "finetune_operator"), **env: str
    ) -> None:
        self.log = log
        self._command = command
        self._env = environment(namespace, **env)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *self._command], env=self._env, stdout=output, stderr=output
            )

    @property
    def pid(self) -> int:
        """Process id of the running operator."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL: no time to finish anything."""
        self._end(signal.SIGKILL)

    def end(self) -> None:
        """SIGTERM, whatever the log says."""
        self._end(signal.SIGTERM)

    def stop(self) -> None:
        """SIGTERM, and the log must be free of bugs."""
        self.end()
        text = self.log.read_text()
        assert "Traceback" not in text, f"the operator met a bug:\n{text}"

    def restart(self) -> None:
        """Killed, and a new process started, which remembers nothing."""
        self.kill()
        self.start()

    def peak_memory_mb(self) -> float:
        """Largest resident set of the running process so far, in MB."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) / 1024

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(timeout=20)
            self._process = None


def make_claim(namespace: str, name: str = "workspace") -> None:
    """A claim that exists is all that pods without a node need."""
    kube.apply(claim_manifest(namespace, name))


def claim_manifest(namespace: str, name: str = "workspace") -> kube.Object:
    """A claim that no volume serves."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": "1Gi"}},
            "storageClassName": "",
        },
    }
