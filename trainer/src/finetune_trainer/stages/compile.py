"""compile: has every graph of a training on Trainium compiled before the training starts, once for all jobs like it.

stage.py calls run() in every pod of the stage, which are as many and as large as train's. Each starts the vendor's
neuron_parallel_compile around train's very program (stages/train.py's Launch builds both), which traces a few steps and
then compiles what was traced, shared among the nodes by locks in the cache. What is there already is neither traced nor
compiled again: the first pod looks the key up (neuron_cache.py) and tells the others what to do by files in the stage's
work folder, since no process group exists before torchrun.

Whether it went well is read from the cache, which is what training will read, and from the log; never from the tool's
exit code (compilation_log.py).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune_trainer import contract
from finetune_trainer.artifacts import find_artifact, new_artifact
from finetune_trainer.child_output import ChildOutput
from finetune_trainer.compilation_log import CompilationLog
from finetune_trainer.contract import ExitCode, Report, StageConfig
from finetune_trainer.errors import HostOutOfMemory, RetryableError, StageError, UserError
from finetune_trainer.json_files import read_json_file
from finetune_trainer.locks import folder_lock
from finetune_trainer.neuron_cache import ARTIFACT_NAME, CacheKey, NeuronCache, cache_folder, is_seen, training_key
from finetune_trainer.progress import ProgressPoster
from finetune_trainer.stage import finished_report, keep_report
from finetune_trainer.stages.train import COMPILER, CONFIG_NAME, Launch, is_neuron, memory_kills, print_arithmetic
from finetune_trainer.stages.train_args import parse_args

COMPILE_KIND = "compile"
TRACE_STEPS = 10
"""As many as the vendor's documentation asks for (10 to 15) and AWS's samples take; tracing costs seconds a step."""

_POLL_SECONDS = 1.0
_PROGRESS_SECONDS = 5.0
_LOCK_PATIENCE_SECONDS = 4 * 3600.0
"""Longer than any graph takes to compile: only where the volume has no file locks can a dead process's lock last."""
_OUTPUT_SECONDS = 10.0
_LAST_WORDS = 700
"""Characters of the compiler's message in a report, which has room for 4 KiB in all."""
_LONGEST_MISS = 300
_MOST_NAMES = 3


def run(config: StageConfig) -> Report:
    """Compile the graphs of the training that `config` describes, or find them compiled."""
    if not is_neuron(config):
        raise UserError(
            "InvalidStageConfig", "stage compile needs spec.accelerator.type neuron: nothing else is compiled ahead"
        )
    args = parse_args(config)
    node_rank = int(os.environ.get(contract.NODE_RANK_ENV, "0"))
    print_arithmetic(config, args, node_rank)
    scratch = Path(tempfile.mkdtemp(prefix="compile-"))
    try:
        # The program reads what train's will: the stage's name and where it posts are all that is different.
        traced = replace(config, stage=contract.TRAIN, progress={})
        (scratch / CONFIG_NAME).write_bytes(contract.canonical_json(traced.as_json()))
        launch = Launch(traced, args, node_rank, scratch, trace_steps=TRACE_STEPS)
        environment = launch.environment()
        gang = Gang(_work_folder(config), config.attempt, node_rank, args.num_nodes)
        cache = NeuronCache(cache_folder(environment))
        return Compilation(config, launch, environment, cache, training_key(config, environment), gang).run()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _work_folder(config: StageConfig) -> Path:
    return config.output_path.with_name(config.output_path.name + ".work")


@dataclass(frozen=True)
class Gang:
    """The pods of one attempt, which talk by small files on the workspace. Node 0 decides."""

    folder: Path
    attempt: int
    node_rank: int
    num_nodes: int

    def start(self) -> None:
        """Take back what this node said in the same attempt before a preemption."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(f"{self.attempt}-*-{self.node_rank}.json"):
            path.unlink(missing_ok=True)

    def say(self, what: str, value: Any) -> None:
        path = self._path(what, self.node_rank)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(contract.canonical_json(value))
        temporary.replace(path)

    def heard(self, what: str, node: int) -> Any:
        """What a node said; None while it has not."""
        try:
            return read_json_file(self._path(what, node))
        except FileNotFoundError:
            return None

    def _path(self, what: str, node: int) -> Path:
        return self.folder / f"{self.attempt}-{what}-{node}.json"


_BEGIN = "begin"
_RESULT = "result"


@dataclass
class Compilation:
    """One pod's part."""

    config: StageConfig
    launch: Launch
    environment: Mapping[str, str]
    cache: NeuronCache
    key: CacheKey
    gang: Gang
    log: CompilationLog = field(default_factory=CompilationLog)

    def run(self) -> Report:
        """The stage's report. A failure is told to the other pods before it is raised."""
        self.gang.start()
        print(f"the graphs of this training have key {self.key.name} in {self.cache.folder}", flush=True)
        try:
            report = self._decide() if self.gang.node_rank == 0 else self._follow()
        except StageError as error:
            self.gang.say(_RESULT, {"failed": f"{error.reason}: {error.message}"})
            raise
        if report.exit_code != ExitCode.SUCCESS:
            self.gang.say(_RESULT, {"failed": f"{report.reason}: {report.message}"})
        return report

    def _decide(self) -> Report:
        self.cache.keys_folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.cache.keys_folder / self.key.name):
            miss = self._miss()
            if miss is None:
                return self._finish({"graphsCompiled": 0, "compileSeconds": 0.0}, reused=True)
            print(f"not compiled yet: {miss}", flush=True)
            for name in self.cache.clear_dead_locks():
                print(f"{name}: whoever compiled it is gone, its lock is removed", flush=True)
            self.gang.say(_BEGIN, True)
            began = time.monotonic()
            mine = self._compile()
            if isinstance(mine, Report):
                return mine
            results = [mine, *(self._result_of(node) for node in range(1, self.gang.num_nodes))]
            graphs = {name for result in results for name in result["graphs"]}
            if not is_seen(lambda: all(map(self.cache.neff_bytes, graphs)), "the other nodes' graphs"):
                raise RetryableError("CompileIncomplete", "graphs that other nodes compiled are not in the cache")
            self.cache.keep(self.key, graphs, time.monotonic() - began)
            compiled = {name for result in results for name in result["compiled"]}
            seconds = round(time.monotonic() - began, 3)
            facts = {"graphsCompiled": len(compiled), "compileSeconds": seconds, "cacheMiss": miss[:_LONGEST_MISS]}
            return self._finish(facts)

    def _follow(self) -> Report:
        self._wait(
            lambda: bool(self.gang.heard(_BEGIN, 0)) or self._is_published(), "the first pod to look at the cache"
        )
        if not self._is_published():
            mine = self._compile()
            if isinstance(mine, Report):
                return mine
            self.gang.say(_RESULT, mine)
            self._wait(self._is_published, "the first pod to write the artifact")
        return finished_report(self.config)

    def _is_published(self) -> bool:
        return find_artifact(self.config.output_path) is not None

    def _miss(self) -> str | None:
        """Why the graphs are not there, in words; None where they are."""
        found = self.cache.find(self.key)
        if found is None:
            return self.cache.explain_miss(self.key)
        lost = self.cache.missing(found)
        if lost:
            self.cache.forget(self.key)
            return f"{len(lost)} of {len(found.graphs)} graphs are gone from the cache, such as {lost[0]}"
        print(f"all {len(found.graphs)} graphs are compiled already, which took {found.seconds:.0f} s once", flush=True)
        return None

    def _finish(self, metrics: Mapping[str, Any], *, reused: bool = False) -> Report:
        """Write the artifact, the same for all jobs with this key, and report it. Node 0."""
        found = self.cache.find(self.key)
        if found is None:
            raise RetryableError(
                "CompileIncomplete", f"{self.cache.manifest_path(self.key)} went away as it was written"
            )
        value = {"key": self.key.name, "parts": dict(found.parts), "graphs": sorted(found.graphs)}
        with new_artifact(self.config.output_path, COMPILE_KIND) as writer:
            writer.write(ARTIFACT_NAME, contract.canonical_json(value))
            keep_report(writer, {"graphs": len(found.graphs), "graphsFailed": 0, "cacheKey": self.key.name})
        hits = len(found.graphs) - metrics["graphsCompiled"]
        return finished_report(self.config, {**metrics, "cacheHits": hits}, reused=reused)

    def _result_of(self, node: int) -> dict[str, Any]:
        """What another node traced and compiled; RetryableError when it failed."""
        self._wait(lambda: self.gang.heard(_RESULT, node) is not None, f"pod {node} to have its graphs compiled")
        result = self.gang.heard(_RESULT, node)
        if not isinstance(result, dict) or "failed" in result:
            raise RetryableError("PeerLost", f"pod {node} of the gang failed: {(result or {}).get('failed', result)}")
        return result

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        """Until `done`; RetryableError when the first pod failed meanwhile. The operator ends what waits in vain."""
        said = False
        while not done():
            if self.gang.node_rank != 0:
                result = self.gang.heard(_RESULT, 0)
                if isinstance(result, dict) and "failed" in result:
                    raise RetryableError("PeerLost", f"the first pod of the gang failed: {result['failed']}")
            if not said:
                said = True
                print(f"waiting for {what}", flush=True)
            time.sleep(_POLL_SECONDS)

    # ---- the tool

    def _compile(self) -> dict[str, Any] | Report:
        """This node's graphs after tracing and compiling; the program's own report where that failed."""
        if shutil.which(COMPILER, path=self.environment.get("PATH")) is None:
            raise UserError(
                "CompilerMissing",
                f"the image has no {COMPILER}: name the trainer for Trainium in stages.train.image, for both stages",
            )
        killed_before = memory_kills()
        with self.cache.compiling():
            code = self._run_tool()
        memory_ran_out = memory_kills() > killed_before
        if not self.launch.started_ranks():
            raise RetryableError(
                "CompileIncomplete",
                f"{COMPILER} ended with {code} before it started a rank. Its last words: {_tail(self.log.last)}",
            )
        traced = self.launch.report(code, out_of_memory=memory_ran_out and not self.log.called)
        if traced.exit_code != ExitCode.SUCCESS:
            return replace(traced, stage=contract.COMPILE)
        self._wait_for_locks()
        return self._judge(code, memory_ran_out)

    def _run_tool(self) -> int:
        """Run it to its end and post progress meanwhile. Nothing of it outlives this call."""
        command = self.launch.command()
        print(f"running {' '.join(command)}", flush=True)
        poster = ProgressPoster(self.config.progress if self.gang.node_rank == 0 else {})
        # A session of its own, so that compilers which it started can be ended with it.
        process = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.launch.process = process
        progress = _Progress(self.cache, self.log, poster)
        try:
            if process.stdout is None:
                raise ValueError("the tool has no output")
            output = ChildOutput(process.stdout, self.log.feed)
            while True:
                try:
                    code = process.wait(timeout=_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    progress.post()
            output.close(_OUTPUT_SECONDS)
            progress.post(at_once=True)
            return code
        finally:
            self._end(process)
            poster.close()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """No compiler and no rank goes on: there is nothing of theirs that a kill could damage but its own lock."""
        self.launch.signal_ranks(signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _wait_for_locks(self) -> None:
        """Until no graph of this training is being compiled by another node or job, or by nobody any more."""
        began, said = time.monotonic(), False
        while pending := [name for name in self.log.graphs if self._is_pending(name)]:
            cleared = set(self.cache.clear_dead_locks())
            if cleared.intersection(pending):
                print(f"{len(cleared)} graphs were being compiled by processes that are gone", flush=True)
                continue
            if time.monotonic() - began > _LOCK_PATIENCE_SECONDS:
                raise RetryableError(
                    "CompileLocked",
                    f"{self.cache.folder / pending[0]} has had a lock for {_LOCK_PATIENCE_SECONDS / 3600:.0f} hours: "
                    "if no job compiles, remove the *.lock files below it, and mount the volume with file locks "
                    "(Lustre: option flock), by which they are removed by themselves",
                )
            if not said:
                said = True
                print(f"{len(pending)} graphs, such as {pending[0]}, are being compiled by others", flush=True)
            time.sleep(_POLL_SECONDS)

    def _is_pending(self, name: str) -> bool:
        return self.cache.neff_bytes(name) is None and self.cache.is_locked(name)

    def _judge(self, code: int, memory_ran_out: bool) -> dict[str, Any]:
        """What this node says to the first one; StageError where not every graph is compiled."""
        log, graphs = self.log, self.log.graphs
        if not graphs:
            raise UserError(
                "NothingTraced",
                f"the traced training asked for no graph ({COMPILER} ended with {code}): its image or backend is not "
                f"Neuron's. {_tail(log.telling or log.last)}".strip(),
            )
        failed = [name for name in graphs if self.cache.failure(name) is not None]
        missing = [name for name in graphs if self.cache.neff_bytes(name) is None and name not in failed]
        if failed or (missing and log.failures):
            raise self._failure(failed or missing, memory_ran_out)
        if missing or not log.summed_up:
            what = f"{len(missing)} of {len(graphs)} graphs, such as {missing[0]}, are not compiled" if missing else ""
            raise RetryableError(
                "CompileIncomplete",
                f"{what or 'the tool gave no summary'} and none is said to have failed ({COMPILER} ended with {code}): "
                f"it was cut short, what is done stays in the cache. {_tail(log.telling or log.last)}".strip(),
            )
        if log.failures or code:
            # The cache is what training reads, and the tool is known to stumble after a graph is in it (issue 1299).
            told = f"{COMPILER} tells of {log.failures} failures (exit code {code})"
            print(f"{told}; every graph is in the cache", flush=True)
        compiled = [name for name in log.extracted if self._compiled_here(name)]
        print(f"{len(graphs)} graphs: {len(compiled)} compiled, {len(graphs) - len(compiled)} were there", flush=True)
        return {"graphs": list(graphs), "compiled": compiled}

    def _compiled_here(self, name: str) -> bool:
        """Whether this run of the tool made the graph, as far as it says; what it does not say counts as made."""
        return self.log.summary is None or name in self.log.summary.succeeded

    def _failure(self, failed: Sequence[str], memory_ran_out: bool) -> StageError:
        """The error of graphs that the compiler could not make, told by its last words."""
        words = next((text for name in failed if (text := self.cache.failure(name))), "")
        told = _tail(words.splitlines()) or _tail(self.log.telling or self.log.last)
        names = ", ".join(failed[:_MOST_NAMES]) + (
            f" and {len(failed) - _MOST_NAMES} more" if failed[_MOST_NAMES:] else ""
        )
        what = f"{len(failed)} of {len(self.log.graphs)} graphs failed ({names}). The compiler's last words: {told}"
        said = CompilationLog()
        for line in (*words.splitlines(), *self.log.telling):
            said.feed(line)
        if said.ran_out_of_space:
            return RetryableError(
                "VolumeFull", f"{what} Enlarge the workspace volume, or remove old compiler versions in it"
            )
        if memory_ran_out or said.ran_out_of_memory:
            return HostOutOfMemory(
                "CompilerOutOfMemory",
                f"{what} Raise the memory limit in stages.compile.resources, or make the graphs smaller: lower "
                "dataset.maxLength or training.microBatchSize, or raise parallelism.tensorParallelSize",
            )
        if said.compiler_crashed:
            return RetryableError("CompilerCrashed", f"{what} It is tried again once more")
        return UserError(
            "CompileFailed",
            f"{what} It would fail again: another dataset.maxLength, training.microBatchSize or parallelism makes "
            "other graphs, and another SDK has another compiler",
        )


@dataclass
class _Progress:
    """Tells how many of the graphs are compiled: in the log, and through the poster as steps."""

    cache: NeuronCache
    log: CompilationLog
    poster: ProgressPoster
    _due: float = 0.0
    _said: tuple[int, int] = (-1, 0)
    _began: tuple[float, int] | None = None

    def post(self, *, at_once: bool = False) -> None:
        """Post what is new, at most once in some seconds."""
        now = time.monotonic()
        if now < self._due and not at_once:
            return
        self._due = now + _PROGRESS_SECONDS
        graphs = self.log.graphs
        if not self.log.traced:
            # Their number grows while they are traced: it is no total yet.
            self.poster.post({"step": 0, "totalSteps": 0, "phase": "tracing"})
            return
        done = sum(self.cache.neff_bytes(name) is not None for name in graphs)
        facts: dict[str, Any] = {"step": done, "totalSteps": len(graphs), "phase": "compiling"}
        began, first = self._began = self._began or (now, done)
        if done > first:
            facts["secondsLeft"] = round((now - began) / (done - first) * (len(graphs) - done))
        self.poster.post(facts)
        if (done, len(graphs)) != self._said:
            self._said = done, len(graphs)
            print(f"\n{done} of {len(graphs)} graphs are compiled", flush=True)


def _tail(lines: Sequence[str] | Any) -> str:
    """The end of what was said, on one line."""
    text = " | ".join(line.strip() for line in list(lines)[-6:] if line.strip())
    return text if len(text) <= _LAST_WORDS else f"…{text[-_LAST_WORDS:]}"
