"""train: starts the ranks of this pod, waits for them, and says in one report how they ended.

stage.py calls run() in every pod of the stage. This process is the launcher: it imports no torch, starts torchrun's
agent (or the one worker itself where there is only one in all), passes SIGTERM on to the workers, and turns the reports
that they leave in the scratch folder into the pod's. Training is in train_worker.py and training.py. compile launches
the same program through Launch.

Every pod of a gang reports the same success, artifact and metrics included, since the ranks agree on them at the end.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from finetune_trainer import contract
from finetune_trainer.child_output import ChildOutput
from finetune_trainer.compile_watch import CompileWatch
from finetune_trainer.contract import ContractError, ExitCode, Report, StageConfig
from finetune_trainer.cpus import available_cpus
from finetune_trainer.neuron_cache import compiler_environment
from finetune_trainer.stages.train_args import TrainArgs, parse_args

WORKER_MODULE = "finetune_trainer.stages.train_worker"
AGENT_MODULE = "finetune_trainer.stages.train_agent"
CONFIG_NAME = "stage.json"
COMPILER = "neuron_parallel_compile"
"""The vendor's tool: it runs a command in a mode that only traces, then compiles what was traced."""
TRACE_OPTION = "--trace-steps"

_JOIN_SECONDS = 1800
"""How long a pod waits for the others: another node may still be pulling the image."""
_POLL_SECONDS = 0.1
_OUTPUT_SECONDS = 5.0
"""How long the last words of ranks that were killed may take."""
_MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")
_ROUTES = Path("/proc/net/route")

_SEVERITY = (
    ExitCode.USER_ERROR,
    ExitCode.CORRUPT_ARTIFACT,
    ExitCode.OUT_OF_DEVICE_MEMORY,
    ExitCode.OUT_OF_HOST_MEMORY,
    ExitCode.BUG,
    ExitCode.INTERRUPTED,
    ExitCode.RETRYABLE,
)
"""Which of several ranks' failures is the pod's: causes before what they cause in the other ranks."""


def run(config: StageConfig) -> Report:
    """Train with this pod's ranks; ContractError when stage.json cannot describe a run."""
    args = parse_args(config)
    node_rank = int(os.environ.get(contract.NODE_RANK_ENV, "0"))
    print_arithmetic(config, args, node_rank)
    scratch = Path(tempfile.mkdtemp(prefix="train-"))
    try:
        stage_json = scratch / CONFIG_NAME
        stage_json.write_bytes(contract.canonical_json(config.as_json()))
        launch = Launch(config, args, node_rank, scratch)
        if not is_neuron(config):
            return launch.run()
        watch = CompileWatch.open(config, launch.environment())
        with watch.during():
            return watch.counted(launch.run(watch.listen))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_neuron(config: StageConfig) -> bool:
    """Whether the ranks run on Trainium, where graphs are compiled."""
    accelerator = config.spec.get("accelerator")
    return isinstance(accelerator, Mapping) and accelerator.get("type") == "neuron"


def report_path(scratch: Path, rank: int) -> Path:
    """Where the worker of `rank` leaves its report."""
    return scratch / f"report-{rank:05d}.json"


def started_path(scratch: Path, rank: int) -> Path:
    """Where the worker of `rank` leaves its process id when it starts."""
    return scratch / f"started-{rank:05d}"


@dataclass
class Launch:
    """One start of this pod's ranks: the one place that builds their command line and environment.

    With `trace_steps` it is the compile stage's: the vendor's tool around the very program, which then takes so many
    steps. The tool sets NEURON_EXTRACT_GRAPHS_ONLY, by which torch_neuronx and the program know that nothing is
    computed. Nothing else may differ, or what is compiled is not what training asks for.
    """

    config: StageConfig
    args: TrainArgs
    node_rank: int
    scratch: Path
    trace_steps: int = 0
    terminating: bool = False
    process: subprocess.Popen[bytes] | None = None

    def run(self, listen: Callable[[str], None] | None = None) -> Report:
        """Start, wait, report. Nothing of the workers outlives this call. `listen` gets each line that they print."""
        killed_before = memory_kills()
        pipes: dict[str, Any] = {} if listen is None else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with self._signals():
            self.process = subprocess.Popen(self.command(), env=self.environment(), **pipes)
            output = ChildOutput(self.process.stdout, listen) if listen and self.process.stdout else None
            if self.terminating:
                self.terminate()
            code = self._wait(self.process)
        if output is not None:
            output.close(_OUTPUT_SECONDS)
        return self.report(code, out_of_memory=memory_kills() > killed_before)

    def report(self, exit_code: int, *, out_of_memory: bool) -> Report:
        """The pod's report once its process has ended with `exit_code`."""
        reports = self.reports()
        return pod_report(
            reports,
            silent=sorted(self.started_ranks() - reports.keys()),
            expected=self.args.procs_per_node,
            exit_code=exit_code,
            out_of_memory=out_of_memory,
            terminated=self.terminating,
            rendezvous=self.config.rendezvous,
        )

    def command(self) -> list[str]:
        """The ranks' command line; around it the compiler's tool where they are only traced."""
        program = self._program()
        return [COMPILER, *program, TRACE_OPTION, str(self.trace_steps)] if self.trace_steps else program

    def _program(self) -> list[str]:
        """torchrun's agent with c10d rendezvous, or the worker itself where it is the only one."""
        files = ["--config", str(self.scratch / CONFIG_NAME), "--scratch", str(self.scratch)]
        if self.args.world_size == 1:
            return [sys.executable, "-m", WORKER_MODULE, *files]
        # Each attempt has its own name, so a pod of the attempt before that still ends cannot join.
        digest = contract.stage_digest(self.config)[:16]
        run_id = f"{self.config.job.get('uid', 'local')}-{digest}-{self.config.attempt}"
        return [
            *(sys.executable, "-m", AGENT_MODULE),
            *("--nodes", str(self.args.num_nodes)),
            *("--procs-per-node", str(self.args.procs_per_node)),
            *("--node-rank", str(self.node_rank)),
            *("--endpoint", "localhost:0" if self.args.num_nodes == 1 else self.config.rendezvous),
            *("--run-id", run_id),
            *("--join-seconds", str(_JOIN_SECONDS)),
            *files,
        ]

    def environment(self) -> dict[str, str]:
        """The workers' environment; what is set already stays."""
        defaults = {
            "OMP_NUM_THREADS": str(max(1, available_cpus() // self.args.procs_per_node)),
            "PYTHONUNBUFFERED": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            contract.NODE_RANK_ENV: str(self.node_rank),
        }
        if self.args.num_nodes > 1 and (interface := _interface_for_peers()):
            defaults["GLOO_SOCKET_IFNAME"] = interface
        environment = {**defaults, **os.environ, "TMPDIR": str(self.scratch)}
        if is_neuron(self.config):
            return compiler_environment(environment, self.config.workspace_path)
        return environment

    def terminate(self) -> None:
        """Ask every worker to write a checkpoint and end; the agent itself where no worker runs yet.

        torchrun's agent is passed by because it gives its workers 30 s and then kills them.
        """
        self.terminating = True
        if not self.signal_ranks(signal.SIGTERM) and self.process:
            self.process.terminate()

    def signal_ranks(self, number: signal.Signals) -> bool:
        """Send a signal to every rank that has started; False when none has. A rank that has ended is passed over."""
        pids = [int(path.read_text()) for path in self.scratch.glob("started-*")]
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        return bool(pids)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """The exit status, of an agent that is ended here once every rank has left its report.

        Left alone it says goodbye to the other pods' agents for seconds, and needs them alive for it.
        """
        while True:
            try:
                return process.wait(timeout=_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if len(self.reports()) == self.args.procs_per_node:
                    process.kill()
                    code = process.wait()
                    # Ranks that still tidy up would write into the scratch folder while it is removed.
                    self.signal_ranks(signal.SIGKILL)
                    return code

    def started_ranks(self) -> set[int]:
        """The ranks that have started so far."""
        return {int(path.name.rsplit("-", 1)[1]) for path in self.scratch.glob("started-*")}

    def reports(self) -> dict[int, Report]:
        """What the ranks have left so far, by rank."""
        found = {}
        for path in self.scratch.glob("report-*.json"):
            rank = int(path.stem.rsplit("-", 1)[1])
            found[rank] = contract.parse_report(path.read_bytes())
        return found

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(_signal: int, _frame: FrameType | None) -> None:
            self.terminate()

        before = signal.signal(signal.SIGTERM, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def pod_report(
    reports: Mapping[int, Report],
    *,
    silent: Sequence[int],
    expected: int,
    exit_code: int,
    out_of_memory: bool,
    terminated: bool,
    rendezvous: str,
) -> Report:
    """The pod's report from its ranks' reports. `silent` are ranks that started and left none."""
    if len(reports) == expected and all(report.exit_code == ExitCode.SUCCESS for report in reports.values()):
        return reports[min(reports)]
    failures = [report for _, report in sorted(reports.items()) if report.exit_code != ExitCode.SUCCESS]
    candidates = [*_unreported(silent, exit_code, out_of_memory, terminated, rendezvous, bool(reports)), *failures]
    # min() keeps the first of equals: a rank that died here before those that lost it, then the lowest rank.
    return min(candidates, key=lambda report: _SEVERITY.index(ExitCode(report.exit_code)))


def _unreported(
    silent: Sequence[int], exit_code: int, out_of_memory: bool, terminated: bool, rendezvous: str, reported: bool
) -> list[Report]:
    if silent and out_of_memory:
        message = f"{_ranks(silent)} was killed because the container ran out of memory: raise the stage's memory limit"
        return [Report(contract.TRAIN, ExitCode.OUT_OF_HOST_MEMORY, "OutOfHostMemory", message)]
    if terminated and not reported:
        message = "the pod was asked to stop (SIGTERM) before its first step: earlier checkpoints stay as they are"
        return [Report(contract.TRAIN, ExitCode.INTERRUPTED, "Interrupted", message)]
    if silent:
        message = (
            f"{_ranks(silent)} died without a word (exit status {exit_code}): see the log above, it will be retried"
        )
        return [Report(contract.TRAIN, ExitCode.RETRYABLE, "WorkerDied", message)]
    if reported:
        return []
    place = f" at {rendezvous}" if rendezvous else ""
    message = f"no rank was started (the agent ended with {exit_code}): the pods did not meet{place}, see the log"
    return [Report(contract.TRAIN, ExitCode.RETRYABLE, "RendezvousFailed", message)]


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(str(rank) for rank in ranks)


def print_arithmetic(config: StageConfig, args: TrainArgs, node_rank: int) -> None:
    """Say how the ranks and the batch come about; ContractError where the pods could not meet."""
    print(
        f"node {node_rank} of {args.num_nodes}, attempt {config.attempt}: world {args.world_size} = {args.num_nodes} "
        f"nodes x {args.procs_per_node}; global batch {args.global_batch_size} rows = micro batch "
        f"{args.micro_batch_size} x accumulation {args.gradient_accumulation_steps} x data parallel "
        f"{args.data_parallel_size}",
        flush=True,
    )
    if args.num_nodes > 1 and not config.rendezvous:
        raise ContractError(f"stage.json: rendezvous is empty and numNodes is {args.num_nodes}: give host:port")


def memory_kills() -> int:
    """Processes of this container that the kernel killed for memory so far; 0 where it does not say."""
    try:
        lines = _MEMORY_EVENTS.read_text().splitlines()
    except OSError:
        return 0
    counts: dict[str, Any] = dict(line.split() for line in lines)
    return int(counts.get("oom_kill", 0))


def _interface_for_peers(routes: Path = _ROUTES) -> str | None:
    """The interface of the default route, where this host's own name leads nowhere but to itself.

    gloo listens on the address of the host's name. In a pod that is the pod's address, and nothing need be set.
    """
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    if not address.startswith("127."):
        return None
    try:
        rows = [line.split() for line in routes.read_text().splitlines()[1:]]
    except OSError:
        return None
    return next((row[0] for row in rows if len(row) > 1 and row[1] == "00000000"), None)
