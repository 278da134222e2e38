"""Runs every benchmark of this folder, one after the other, and ends in one JSON line with the figures of all.

    .venv-bench/bin/python bench/trainer [NAME ...]     what `make bench-trainer` does; names choose: merge train

Each benchmark is a program of its own whose last line of output is one JSON object; what a user would take in place of
ours runs in it by turns with ours. A benchmark that fails, or a figure that none gave, is named and makes the exit code
1; the figures that there are stand in the last line all the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
FIGURES = (
    "merge_rate_to_cp",
    "merge_peft_time_ratio",
    "merge_peft_memory_ratio",
    "consolidate_rate_to_cp",
    "consolidate_memory_mb",
    "pack_fill",
    "pack_time_to_trl",
    "prepare_to_raw_tokenizers",
    "train_to_trl",
    "lora_to_full",
    "checkpoint_stall_share",
)
"""What the last line has, in this order; docs/measurements.md says what each means."""


def find_benchmarks(folder: Path) -> list[Path]:
    """The programs of `folder` by name; those that begin with an underscore are not benchmarks."""
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))


def run_all(programs: Iterable[Path]) -> tuple[dict[str, Any], list[str]]:
    """(everything that their last lines say, one sentence for each that failed). Shows their output as it comes."""
    found: dict[str, Any] = {}
    failures = []
    for program in programs:
        print(f"== {program.name}", flush=True)
        began = time.monotonic()
        last, code = _run(program)
        print(f"== {program.name} took {time.monotonic() - began:.0f} s", flush=True)
        try:
            value = json.loads(last)
        except ValueError:
            value = None
        if code or not isinstance(value, dict):
            failures.append(
                f"{program.name} ended with {code}" if code else f"{program.name} printed no JSON object at its end"
            )
        else:
            found |= value
    return found, failures


def summary(found: dict[str, Any], wanted: Sequence[str] = FIGURES) -> tuple[dict[str, Any], list[str]]:
    """(the wanted figures, those missing as null; one sentence for each that is missing)."""
    missing = [f"no benchmark gave {name}" for name in wanted if name not in found]
    return {name: found.get(name) for name in wanted}, missing


def _run(program: Path) -> tuple[str, int]:
    """(the last line of its output that holds anything, its exit code)."""
    last = ""
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
    return last, process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="benchmarks to run; all without any")
    names = parser.parse_args().names
    programs = [path for path in find_benchmarks(FOLDER) if not names or path.stem in names]
    unknown = sorted(set(names) - {path.stem for path in programs})
    found, failures = run_all(programs)
    failures += [f"there is no benchmark {name}" for name in unknown]
    figures, missing = summary(found)
    for sentence in failures + ([] if names else missing):
        print(f"bench-trainer: {sentence}", file=sys.stderr, flush=True)
    print(json.dumps({name: value for name, value in figures.items() if not names or value is not None}), flush=True)
    return 1 if failures or (missing and not names) else 0


if __name__ == "__main__":
    sys.exit(main())
