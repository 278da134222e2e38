"""Reads what the Neuron compiler's tools say, line by line: graphs traced, found, compiled, failed, and the summary.

stages/compile.py feeds it with the output of neuron_parallel_compile, stages/train.py with that of the training, where
any compilation is one too many. The log is all there is: the tool's exit code is the number of failures in some
versions (so 256 of them are none) and 0 in others, and what a worker process of the tool had done is lost when it dies.

The texts, each with where it was read. They are searched for inside a line, since prefixes differ: `INFO
||NEURON_CC_WRAPPER||: ` up to SDK 2.26, `[INFO]: ` later, and whatever a launcher puts before them.

    Extracting graphs (PATH) for ahead-of-time parallel compilation. No compilation was done.
    New graph list from script N: PATH ...
    No todo hlos found in cache or hlo_tasklist
    There was an error in the training script.
    {"compilation_summary": {"true": N, "false": N}, "compilation_report": {PATH: {"status", "retry", ...}}, ...}
    Total graphs: N / Total successful compilations: N / Total failed compilations: N
        torch_neuronx/parallel_compile/neuron_parallel_compile.py; SDK documentation, page
        pytorch-neuron-parallel-compile.rst (2.14 to 2.29); a run with neuronx-cc 2.16 in awslabs/
        awsome-distributed-training's pages; with 2.12 in a public notebook of Llama
    Using a cached neff at PATH
    Got a cached failed neff at PATH. Will skip compilation
    Call compiler with cmd: neuronx-cc compile ... model.MODULE.hlo_module.pb ...
    Compilation Successfully Completed for model.MODULE.hlo_module.pb
    Failed compilation with [...model.MODULE.hlo_module.pb...]: MESSAGE
        libneuronxla's wrapper: SDK documentation, neuron-caching.rst; aws-neuron-sdk issues 825, 948, 1023, 1299
    [F137] neuronx-cc was forcibly killed; Received error code: -9
        neuronx-cc: aws-neuron-samples issue 64; SDK documentation, "Compilation errors during precompilation"

Standard library only, no I/O.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_trainer.neuron_cache import graph_name

_EXTRACTED = re.compile(r"Extracting graphs \(([^)]+)\)")
_CACHED = re.compile(r"Using a cached neff at (\S+?\.neff)")
_CACHED_FAILURE = re.compile(r"Got a cached failed neff at (\S+?\.neff)")
_CALLED = re.compile(r"Call compiler with cmd:.*?model\.(MODULE_[^.\s'\",]+)\.hlo")
_COMPLETED = re.compile(r"Compilation Successfully Completed for model\.(MODULE_[^.\s]+)")
_FAILED = re.compile(r"Failed compilation with .*?model\.(MODULE_[^.\s'\",]+)\.hlo")
_TOTALS = re.compile(r"Total (graphs|successful compilations|failed compilations): (\d+)")
_NOTHING_TO_DO = "No todo hlos found"
_TRACED = "New graph list from script"
_SCRIPT_FAILED = "There was an error in the training script"
_TELLING = re.compile(
    r"\bERROR\b|\[[A-Z]{1,4}[A-Z_]*\d{2,}\]|Failed compilation|forcibly killed|Received error code|"
    r"No space left|got exception|Traceback|Error:"
)
_OUT_OF_MEMORY = re.compile(r"\[F137\]|was forcibly killed|Received error code: -9|exit(?:ed|code=)[^\n]*-9\b")
_NO_SPACE = "No space left on device"
_COMPILER_CRASHED = re.compile(r"\[F1(?:34|39)\]|terminated abnormally")
_KEPT_LINES = 12
_KEPT_CHARACTERS = 400
_JSON_MARKS = re.compile(r"[\"{}]")
_MOST_JSON_LINES = 1_000_000


@dataclass(frozen=True)
class Summary:
    """One compilation_summary: graphs that this run of the tool compiled or failed to, by name, and its seconds."""

    succeeded: frozenset[str]
    failed: frozenset[str]
    seconds: float
    total: int
    total_failed: int


@dataclass
class CompilationLog:
    """What was said so far. Graphs are named as neuron_cache.py names them, modules by the last part of that."""

    extracted: dict[str, None] = field(default_factory=dict)
    """Graphs that were traced and not compiled yet, in the order of their appearance."""
    cached: dict[str, None] = field(default_factory=dict)
    """Graphs that were asked for and found compiled."""
    failed: dict[str, None] = field(default_factory=dict)
    """Modules that could not be compiled, now or before."""
    called: dict[str, None] = field(default_factory=dict)
    """Modules that the compiler was called for."""
    completed: dict[str, None] = field(default_factory=dict)
    summary: Summary | None = None
    totals: dict[str, int] = field(default_factory=dict)
    """Of the lines "Total ...", by graphs, successful compilations, failed compilations."""
    nothing_to_do: bool = False
    traced: bool = False
    """Whether tracing is over: the tool has listed the graphs, or calls the compiler."""
    script_failed: bool = False
    telling: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))
    """The last lines that tell of an error."""
    last: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))
    """The last lines of any kind."""
    _json: list[str] = field(default_factory=list)
    _depth: int = 0

    @property
    def graphs(self) -> tuple[str, ...]:
        """Every graph that the traced program needs."""
        return tuple({**self.cached, **self.extracted})

    @property
    def summed_up(self) -> bool:
        """Whether the tool came to its own end: it has a summary, or said that there is nothing to compile."""
        return self.nothing_to_do or self.summary is not None or "failed compilations" in self.totals

    @property
    def failures(self) -> int:
        """Graphs that could not be compiled, by whichever account has the most."""
        told = self.summary.total_failed if self.summary is not None else 0
        return max(told, self.totals.get("failed compilations", 0), len(self.failed))

    @property
    def ran_out_of_memory(self) -> bool:
        """Whether a compiler was killed, as far as its last words tell."""
        return any(_OUT_OF_MEMORY.search(line) for line in self.telling)

    @property
    def ran_out_of_space(self) -> bool:
        return any(_NO_SPACE in line for line in self.telling)

    @property
    def compiler_crashed(self) -> bool:
        return any(_COMPILER_CRASHED.search(line) for line in self.telling)

    def feed(self, line: str) -> None:
        """Take one line, with or without its end."""
        line = line.rstrip("\r\n")
        if self._json or line.endswith("{"):
            self._feed_json(line)
        for pattern, names in ((_EXTRACTED, self.extracted), (_CACHED, self.cached)):
            for path in pattern.findall(line):
                name = graph_name(path)
                if name is not None:
                    names[name] = None
        for path in _CACHED_FAILURE.findall(line):
            name = graph_name(path)
            if name is not None:
                self.failed[_module(name)] = None
        for pattern, names in ((_CALLED, self.called), (_COMPLETED, self.completed), (_FAILED, self.failed)):
            for module in pattern.findall(line):
                names[module] = None
        for what, number in _TOTALS.findall(line):
            # a gang's nodes write into one log where somebody looks at all of them; the worst counts
            self.totals[what] = max(int(number), self.totals.get(what, 0))
        self.traced = self.traced or _TRACED in line or bool(self.called) or _NOTHING_TO_DO in line
        self.nothing_to_do = self.nothing_to_do or _NOTHING_TO_DO in line
        self.script_failed = self.script_failed or _SCRIPT_FAILED in line
        if line.strip():
            self.last.append(line.strip()[-_KEPT_CHARACTERS:])
        if _TELLING.search(line):
            self.telling.append(line.strip()[-_KEPT_CHARACTERS:])

    def _feed_json(self, line: str) -> None:
        """Gather the summary, a JSON object over many lines, each behind a prefix of the logger's."""
        start = 0
        if self._json:
            mark = _JSON_MARKS.search(line)
            if mark is None:
                return  # the compiler's dots, between two lines
            start = mark.start()
        else:
            start = len(line) - 1
        text = line[start:]
        self._json.append(text)
        self._depth += text.count("{") - text.count("}")
        if len(self._json) == 2 and '"compilation_summary"' not in text:
            # Some other text; this line may be the one that begins it.
            self._json, self._depth = (["{"], 1) if line.endswith("{") else ([], 0)
            return
        if self._depth > 0 and len(self._json) < _MOST_JSON_LINES:
            return
        whole, self._json, self._depth = "\n".join(self._json), [], 0
        found = parse_summary(whole)
        if found is not None:
            self.summary = found


def parse_summary(text: str) -> Summary | None:
    """The summary in a JSON text; None where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, Mapping) or not isinstance(value.get("compilation_summary"), Mapping):
        return None
    counts = value["compilation_summary"]
    report: Any = value.get("compilation_report")
    report = report if isinstance(report, Mapping) else {}
    by_status: dict[bool, set[str]] = {True: set(), False: set()}
    for path, entry in report.items():
        name = graph_name(str(path))
        if name is not None and isinstance(entry, Mapping):
            by_status[entry.get("status") is True].add(name)
    good, bad = (_count(counts.get(word)) for word in ("true", "false"))
    # What is neither true nor false did not succeed.
    others = sum(_count(number) for word, number in counts.items() if word not in ("true", "false"))
    seconds = value.get("compilation_time")
    return Summary(
        succeeded=frozenset(by_status[True]),
        failed=frozenset(by_status[False]),
        seconds=float(seconds) if isinstance(seconds, (int, float)) else 0.0,
        total=good + bad + others,
        total_failed=max(bad + others, len(by_status[False])),
    )


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _module(name: str) -> str:
    return name.rsplit("/", 1)[-1]
