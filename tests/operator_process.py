"""The operator as a process of its own, out of the cluster, for contract tests: started, killed, started again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import kube

TRAINER_IMAGE = "example.invalid/finetune-trainer:contract"


class OperatorProcess:
    """One operator that watches one namespace. `log` is its output; stop() fails on a traceback in it."""

    def __init__(self, namespace: str, log: Path, **env: str) -> None:
        self.log = log
        # Bytecode is cached: compiling the client library anew at each start takes longer than most tests.
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self._env = {
            **inherited,
            "FINETUNE_TRAINER_IMAGE": TRAINER_IMAGE,
            "FINETUNE_WATCH_NAMESPACES": namespace,
            "FINETUNE_HEALTH_PORT": "0",
            "FINETUNE_RETRY_FIRST_SECONDS": "0.5",
            **env,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "finetune_operator"], env=self._env, stdout=output, stderr=output
            )

    def kill(self) -> None:
        """SIGKILL: no time to finish anything."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and the log must be free of bugs."""
        self._end(signal.SIGTERM)
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
    kube.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "resources": {"requests": {"storage": "1Gi"}},
                "storageClassName": "",
            },
        }
    )
