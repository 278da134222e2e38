"""An operator that starts in a tenth of a second: forked from a process that has imported everything already.

For tests that start it hundreds of times. The fork is a process of its own that runs the operator's main function; it
has its own memory and dies of SIGKILL as any other. This file is also the program that forks: it reads `start` and
`kill` from its standard input and answers each with a line when that is done.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


class WarmOperator:
    """At most one running operator with the environment `env`. `log` has what all of them have said."""

    def __init__(self, env: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as errors:
            self._parent = subprocess.Popen(
                [sys.executable, __file__, str(log)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._expect("ready")

    def start(self) -> None:
        """Start it. None must be running."""
        self._say("start")

    def kill(self) -> None:
        """SIGKILL, if it runs, and wait until it is dead."""
        self._say("kill")

    def close(self) -> None:
        """Kill it, and end the process that forks."""
        self.kill()
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.close()
        self._parent.wait(timeout=20)
        self._parent.stdout.close()

    def _say(self, word: str) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.write(f"{word}\n")
        self._parent.stdin.flush()
        self._expect(word)

    def _expect(self, word: str) -> None:
        assert self._parent.stdout is not None
        line = self._parent.stdout.readline().strip()
        if line != word:
            raise RuntimeError(f"the process that forks operators said {line!r} to {word!r}; its log:\n{self._tail()}")

    def _tail(self) -> str:
        return self.log.read_text()[-4000:]


def _serve(log: Path) -> None:
    """Fork and kill as told, until the standard input ends."""
    from finetune_operator import handlers
    from finetune_operator.__main__ import main

    assert handlers
    child = 0
    print("ready", flush=True)
    for line in sys.stdin:
        word = line.strip()
        if word == "start":
            child = os.fork()
            if child == 0:
                with log.open("ab") as output:
                    os.dup2(output.fileno(), sys.stdout.fileno())
                    os.dup2(output.fileno(), sys.stderr.fileno())
                os.close(0)
                os._exit(main())
        elif child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            child = 0
        print(word, flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
