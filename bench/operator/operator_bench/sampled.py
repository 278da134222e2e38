"""The operator under a sampling profiler: `sampled.py OUTPUT` runs finetune_operator and writes where its time went.

ITIMER_PROF fires each INTERVAL_SECONDS of processor time (waiting costs none), and the handler notes the stack. That
costs about a percent, where cProfile doubles the time of small functions and so lies about what bounds a loop of them.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

INTERVAL_SECONDS = 0.002
TOP = 45


class Sampler:
    """Samples by function: where the processor was (own) and what had called it (whole)."""

    def __init__(self) -> None:
        self.samples = 0
        self.own: Counter[str] = Counter()
        self.whole: Counter[str] = Counter()

    def start(self) -> None:
        signal.signal(signal.SIGPROF, self._note)
        signal.setitimer(signal.ITIMER_PROF, INTERVAL_SECONDS, INTERVAL_SECONDS)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)

    def _note(self, _: int, frame: FrameType | None) -> None:
        self.samples += 1
        if frame is not None:
            self.own[_name(frame)] += 1
        seen = set()
        while frame is not None:
            seen.add(_name(frame))
            frame = frame.f_back
        self.whole.update(seen)

    def report(self) -> str:
        """Both tables, as shares of all samples."""
        lines = [f"{self.samples} samples of {INTERVAL_SECONDS * 1000:g} ms of processor time"]
        for title, counts in (("own", self.own), ("with what it called", self.whole)):
            lines.append(f"\n{'share':>7}  {title}")
            lines += [f"{count / max(1, self.samples):7.1%}  {name}" for name, count in counts.most_common(TOP)]
        return "\n".join(lines) + "\n"


def _name(frame: FrameType) -> str:
    code = frame.f_code
    path = Path(code.co_filename)
    return f"{'/'.join(path.parts[-3:])}:{code.co_qualname}"


def main() -> int:
    output = Path(sys.argv.pop(1))
    from finetune_operator.__main__ import main as run

    sampler = Sampler()
    sampler.start()
    try:
        return run()
    finally:
        sampler.stop()
        output.write_text(sampler.report())


if __name__ == "__main__":
    sys.exit(main())
