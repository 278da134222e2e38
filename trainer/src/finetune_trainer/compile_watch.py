"""Holds a training on Trainium to what was compiled for it: at its start, and while it runs.

stages/train.py, the launcher, calls it. At the start a graph that is missing ends the stage, since nothing was paid for
yet and the compile stage can make it; the message says which part of the cache's key differs. What is compiled all the
same later is told in the log and counted in the report, and the training goes on: it is right, only late, and whoever
ended it would pay for the same compilation in the next attempt again. Without a compile stage nothing is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from finetune_trainer import contract
from finetune_trainer.compilation_log import CompilationLog
from finetune_trainer.contract import ExitCode, Report, StageConfig
from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.json_files import read_json_file
from finetune_trainer.neuron_cache import (
    ARTIFACT_NAME,
    CachedGraphs,
    CacheKey,
    NeuronCache,
    cache_folder,
    is_seen,
    key_differences,
    told_differences,
    training_key,
)

GRAPHS_COMPILED = "graphsCompiled"
"""Metric of train's report: graphs that this pod's ranks had compiled while they trained, which should be 0."""


@dataclass
class CompileWatch:
    """One training's. `listen` takes each line of its ranks' output."""

    config: StageConfig
    cache: NeuronCache
    key: CacheKey
    promised: CachedGraphs | None = None
    log: CompilationLog = field(default_factory=CompilationLog)
    _told: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, config: StageConfig, environment: Mapping[str, str]) -> CompileWatch:
        """UserError CompileCacheMiss where the compile stage ran and not all graphs of this training are there."""
        watch = cls(config, NeuronCache(cache_folder(environment)), training_key(config, environment))
        if contract.COMPILE in config.inputs:
            watch.check()
        else:
            print("no compile stage ran: graphs are compiled while the training waits for them", flush=True)
        return watch

    def check(self) -> None:
        """Hold the cache to what the compile stage promised."""
        made_for = self._made_for()
        if made_for == self.key.parts:
            is_seen(self._look, "the compiled graphs")
        else:
            self._look()
        if self.promised is None:
            differences = key_differences(made_for, self.key.parts) if made_for is not None else []
            why = told_differences(differences) if differences else self.cache.explain_miss(self.key)
            raise UserError(
                "CompileCacheMiss",
                f"no compiled graphs of key {self.key.name} in {self.cache.folder}: {why}. Delete the Job of stage "
                "compile, then suspend and resume the job: it compiles for what train has now. Or set compile.enabled: "
                "false to have training compile",
            )
        lost = self.cache.missing(self.promised)
        if lost:
            raise UserError(
                "CompileCacheMiss",
                f"{len(lost)} of {len(self.promised.graphs)} graphs of key {self.key.name} are not in "
                f"{self.cache.folder} any more, such as {lost[0]}: delete the Job of stage compile, then "
                "suspend and resume the job, and it compiles them again",
            )
        print(
            f"all {len(self.promised.graphs)} graphs of this training are compiled (key {self.key.name} in "
            f"{self.cache.folder})",
            flush=True,
        )

    def _look(self) -> bool:
        self.promised = self.cache.find(self.key)
        return self.promised is not None and not self.cache.missing(self.promised)

    def _made_for(self) -> Mapping[str, Any] | None:
        """The parts of the key that the compile stage compiled for, by its artifact; None where that cannot be read."""
        try:
            value = read_json_file(self.config.input_path(contract.COMPILE) / ARTIFACT_NAME)
        except (OSError, CorruptArtifact):
            return None
        parts = value.get("parts") if isinstance(value, Mapping) else None
        return parts if isinstance(parts, Mapping) else None

    @contextmanager
    def during(self) -> Iterator[None]:
        """While the ranks run: what they compile waits for no dead process.

        Only a training that is meant to compile counts as one that does: for days it would keep others from removing
        the locks of the dead.
        """
        for name in self.cache.clear_dead_locks():
            print(f"{name}: whoever compiled it is gone, its lock is removed", flush=True)
        with self.cache.compiling() if self.promised is None else nullcontext():
            yield

    def listen(self, line: str) -> None:
        """Take a line of the ranks' output, and say of each new graph that it is compiled now and why."""
        self.log.feed(line)
        for module in self.log.called.keys() - self._told:
            self._told.add(module)
            print(f"warning: graph {module} is compiled while the training waits: {self._why(module)}", flush=True)

    def counted(self, report: Report) -> Report:
        """The report of a training that ended well, with what was compiled in it."""
        if report.exit_code != ExitCode.SUCCESS:
            return report
        return replace(report, metrics={**report.metrics, GRAPHS_COMPILED: len(self.log.called)})

    def _why(self, module: str) -> str:
        if self.promised is None:
            return "no compile stage ran"
        if any(name.endswith(f"/{module}") for name in self.promised.graphs):
            return "it was compiled before, and the cache has lost it since"
        return (
            f"it is none of the {len(self.promised.graphs)} graphs that the compile stage traced; that is a bug in the "
            "trainer's traced run, please report it with this line"
        )
