"""What the user sees while something takes long: one line a part, with elapsed seconds. Decides nothing."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType

_QUIET_INTERVAL = 15.0  # seconds between lines where the output is no terminal


class Progress:
    """A context manager: `with Progress("etcd") as line: line.note("...")`; ends in `ready` or `FAILED` and seconds."""

    def __init__(self, label: str, done: str = "ready") -> None:
        self._label = label
        self._done = done
        self._started = time.monotonic()
        self._last_note = self._started
        self._live = sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        if self._live:
            self.note("")
        return self

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._started

    def note(self, text: str) -> None:
        """Show where it stands; on a terminal in place, else as a line now and then."""
        if self._live:
            print(f"\r\033[K  {self._label:<26} {self.elapsed:5.0f} s  {text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last_note >= _QUIET_INTERVAL:
            self._last_note = time.monotonic()
            print(f"  {self._label:<26} {self.elapsed:5.0f} s  {text}", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = self._done if kind is None else "FAILED"
        lead = "\r\033[K" if self._live else ""
        print(f"{lead}  {self._label:<26} {self.elapsed:5.1f} s  {end}", file=sys.stderr, flush=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of equal length as aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
