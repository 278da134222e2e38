"""Passes on what a child process prints, as it comes, and hands it line by line to a listener.

The launchers of compile and of train on Trainium read their child's log this way, since the compiler reports nothing
elsewhere. Whoever reads the pod's log sees what they would have seen without it, the compiler's dots included.
"""

from __future__ import annotations

import codecs
import os
import sys
import threading
from collections.abc import Callable
from typing import IO

_CHUNK = 1 << 16
_LONGEST_LINE = 1 << 20
"""Characters after which a line is handed over without its end."""


class ChildOutput:
    """Reads `stream`, a pipe, in a thread of its own until every process that writes to it has closed it.

    `listen` gets each line without its end; a carriage return ends one too, as progress bars do.
    """

    def __init__(self, stream: IO[bytes], listen: Callable[[str], None]) -> None:
        self._stream, self._listen = stream, listen
        self._thread = threading.Thread(target=self._run, name="child-output", daemon=True)
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Wait for the end of the output, for at most `timeout` seconds: a process that was left behind may hold it."""
        self._thread.join(timeout)

    def _run(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        line = ""
        with self._stream:
            while chunk := os.read(self._stream.fileno(), _CHUNK):
                text = decoder.decode(chunk)
                sys.stdout.write(text)
                sys.stdout.flush()
                *whole, line = (line + text.replace("\r", "\n")).split("\n")
                for each in whole:
                    self._listen(each)
                if len(line) > _LONGEST_LINE:
                    self._listen(line)
                    line = ""
        if line:
            self._listen(line)
