#!/usr/bin/env python3
"""How the operator does with many FineTuneJobs at once, against a bare client that creates the same Jobs.

    make bench-operator                                       1,000 jobs of seven stages, twice each, and a light run
    python bench/operator/bench.py --jobs 50 --rounds 1       a quick look
    python bench/operator/bench.py --jobs 300 --profile DIR   where the operator's processor time goes

The cluster is a real control plane with KWOK's fake nodes (`cluster.py kwok up --stages tests/fake_stages.yaml`): pods
run and end at once, so what is measured is what it costs to run stages. Both arms alternate (A B A B), each in a fresh
namespace, and are watched by the same observer in a process of its own:

* floor: a client with one watch that creates Job k+1 when Job k is complete, and does nothing else;
* operator: the same number of FineTuneJobs, submitted at once, and the operator as a process of its own.

A run ends with the last stage's condition Complete and, for the operator, with status.phase Succeeded of every job.
A hand-off is counted from what an arm acts on (floor: the Job's Complete; operator: the end of the stage's container)
to the next Job, as the observer sees both; each run's line has both spans for both arms. Requests are those of all
components (apiserver_request_total before and after), without watches, leases, heartbeats and health checks, and
without the observer's. Each run prints a line of JSON; the last line is the result.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().with_name("operator_bench")))
import cluster
import other_operators
from cluster import BenchProblem
from measures import Run, component_seconds, cpu_seconds, peak_memory_mb, requests_table, result
from operator_process import OperatorProcess
from other_operators import OtherOperatorRan
from raw_api import FINETUNEJOBS, Api, read_access
from workload import ENVIRONMENT, STAGES, chain_name, finetune_job

PROGRAMS = Path(__file__).resolve().with_name("operator_bench")
SUBMITTED_AT_ONCE = 32
WARM_UP_SECONDS = 120.0
CLIENT_SECONDS = 10.0
"""After the observer has seen everything, the floor's client has too."""


def say(text: str) -> None:
    print(text, flush=True)


@dataclass(frozen=True)
class Meter:
    """What has been spent so far: requests of all components, processor seconds of the cluster's parts."""

    requests: Counter[str]
    components: Counter[str]


class Bench:
    """One benchmark on one cluster. `folder` takes logs, observations and profiles."""

    def __init__(self, api: Api, folder: Path, profile: Path | None) -> None:
        self._api = api
        self._folder = folder
        self._profile = profile
        self._count = 0

    async def run(self, arm: str, jobs: int) -> Run:
        """One arm, once, in a namespace of its own."""
        self._count += 1
        namespace = f"{cluster.PREFIX}{self._count}-{arm}"
        await cluster.make_namespace(self._api, namespace)
        try:
            async with AsyncExitStack() as stack:
                measure = self._operator if arm == "operator" else self._floor
                return await measure(namespace, jobs, stack)
        finally:
            await cluster.remove_namespace(self._api, namespace)

    async def _floor(self, namespace: str, jobs: int, stack: AsyncExitStack) -> Run:
        client = await _start(stack, PROGRAMS / "floor.py", namespace, str(jobs))
        await _line(client, "ready")
        observation = await self._observe(namespace, jobs, stack)
        before = await self._read_meter()
        assert client.stdin is not None
        client.stdin.write(b"go\n")
        seen = await observation
        try:
            told = json.loads(await asyncio.wait_for(_line(client), CLIENT_SECONDS))
        except TimeoutError as error:
            raise BenchProblem("the floor's client waits for a Job that never was complete") from error
        spent, memory = told["cpu_seconds"], told["memory_mb"]
        return await self._judge("floor", jobs, seen, told["begun"], before, spent, memory, told["errors"])

    async def _operator(self, namespace: str, jobs: int, stack: AsyncExitStack) -> Run:
        log = self._folder / f"{namespace}.log"
        command = ["-m", "finetune_operator"]
        if self._profile is not None:
            self._profile.mkdir(parents=True, exist_ok=True)
            command = [str(PROGRAMS / "sampled.py"), str(self._profile / f"{namespace}.txt")]
        operator = OperatorProcess(namespace, log, command=command, **ENVIRONMENT)
        operator.start()
        stack.callback(operator.end)
        await self._warm_up(namespace)
        observation = await self._observe(namespace, jobs, stack, "--finetunejobs")
        before, cpu = await self._read_meter(), cpu_seconds(operator.pid)
        begun = time.monotonic()
        errors = await self._submit(namespace, jobs)
        seen = await observation
        spent, memory = cpu_seconds(operator.pid) - cpu, peak_memory_mb(operator.pid)
        errors += [line for line in log.read_text().splitlines() if _is_trouble(line)]
        errors += [f"{name} is {phase}" for name, phase in seen["phases"].items() if phase != "Succeeded"]
        return await self._judge("operator", jobs, seen, begun, before, spent, memory, errors)

    async def _read_meter(self) -> Meter:
        return Meter(await cluster.count_requests(self._api), component_seconds())

    async def _warm_up(self, namespace: str) -> None:
        """One job through all stages: what the operator does once in its life is no part of the run."""
        path, name = FINETUNEJOBS.format(namespace=namespace), chain_name(0)
        await self._api.call("POST", path, finetune_job(name, namespace))

        async def done() -> bool:
            job = await self._api.call("GET", f"{path}/{name}")
            return bool(job.get("status", {}).get("phase") == "Succeeded")

        await cluster.wait_until(done, "the operator running a first job", WARM_UP_SECONDS)
        await self._api.call("DELETE", f"{path}/{name}")

        async def empty() -> bool:
            kinds = (f"/apis/batch/v1/namespaces/{namespace}/jobs", f"/api/v1/namespaces/{namespace}/pods")
            return not any([(await self._api.call("GET", kind))["items"] for kind in kinds])

        await cluster.wait_until(empty, "the first job going away", WARM_UP_SECONDS)

    async def _submit(self, namespace: str, jobs: int) -> list[str]:
        """Create the FineTuneJobs; what went wrong."""
        path, slots, errors = FINETUNEJOBS.format(namespace=namespace), asyncio.Semaphore(SUBMITTED_AT_ONCE), []

        async def submit(index: int) -> None:
            async with slots:
                try:
                    await self._api.call("POST", path, finetune_job(chain_name(index + 1), namespace))
                except Exception as error:  # noqa: BLE001  any failure is a result, and is told in the run's line
                    errors.append(repr(error))

        await asyncio.gather(*(submit(index) for index in range(jobs)))
        return errors

    async def _observe(self, namespace: str, jobs: int, stack: AsyncExitStack, *options: str) -> Any:
        """Start the observer; a task that ends with what it saw."""
        output = self._folder / f"{namespace}.json"
        program = PROGRAMS / "observer.py"
        process = await _start(stack, program, namespace, str(jobs), str(len(STAGES)), str(output), *options)
        await _line(process, "watching")

        async def seen() -> Any:
            if await process.wait() != 0:
                raise BenchProblem(f"the observer of {namespace} failed; its words are above")
            return json.loads(output.read_text())

        return asyncio.create_task(seen())

    async def _judge(
        self,
        arm: str,
        jobs: int,
        seen: Any,
        begun: float,
        before: Meter,
        cpu: float,
        memory: float,
        errors: list[str],
    ) -> Run:
        await asyncio.sleep(cluster.SETTLE_SECONDS)
        after = await self._read_meter()
        requests = after.requests - before.requests
        requests["LIST finetunejobs"] -= seen["lists_of_finetunejobs"]
        after_end, after_complete = [], []
        errors = [*errors, *(f"Job {name} failed" for name in seen["failed_jobs"])]
        if not seen["finished"]:
            errors.append("the run came to a halt before every stage was complete")
        for chain, stages in seen["times"].items():
            for stage in STAGES:
                times = stages.get(stage, {"jobs": 0})
                if times["jobs"] != 1:
                    errors.append(f"{chain} has {times['jobs']} Jobs of {stage}")
            for former, latter in itertools.pairwise(STAGES):
                ended, complete = (stages.get(former, {}).get(key) for key in ("ended", "complete"))
                created = stages.get(latter, {}).get("created")
                if ended is not None and created is not None:
                    after_end.append(created - ended)
                if complete is not None and created is not None:
                    after_complete.append(created - complete)
        return Run(
            arm=arm,
            jobs=jobs,
            seconds=seen["ended"] - begun,
            hand_offs_after_end=tuple(after_end),
            hand_offs_after_complete=tuple(after_complete),
            requests=requests,
            cpu_seconds=cpu,
            memory_mb=memory,
            errors=len(errors),
            components=after.components - before.components,
            notes=tuple(errors[:10]),
        )


def _is_trouble(line: str) -> bool:
    return " WARNING " in line or " ERROR " in line or line.startswith("Traceback")


async def _start(stack: AsyncExitStack, program: Path, *args: str) -> asyncio.subprocess.Process:
    """A program of ours, ended when `stack` is."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(program), *args, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )

    async def end() -> None:
        if process.returncode is None:
            process.kill()
            await process.wait()

    stack.push_async_callback(end)
    return process


async def _line(process: asyncio.subprocess.Process, expected: str = "") -> str:
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode().strip()
    if not line or (expected and line != expected):
        raise BenchProblem(f"a part of the benchmark said {line!r} instead of {expected or 'its result'!r}")
    return line


async def bench(args: argparse.Namespace, folder: Path) -> None:
    """All runs, the result, and nothing left in the cluster, however it ends."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with Api(await read_access()) as api, other_operators.paused(api):
        await cluster.clean_up(api)
        try:
            await cluster.make_nodes(api, args.nodes)
            runs = Bench(api, folder, args.profile)
            full: list[Run] = []
            light: list[Run] = []
            for rounds, size, into in ((args.rounds, args.jobs, full), (1, args.light, light)):
                for _ in range(rounds if size else 0):
                    for arm in ("floor", "operator"):
                        run = await runs.run(arm, size)
                        into.append(run)
                        say(json.dumps(run.as_json()))
            say(requests_table(full[-2], full[-1]))
            if args.profile is not None:
                say(f"profiles of the operator: {args.profile}")
            say(json.dumps(result(full, light)))
        finally:
            await asyncio.shield(cluster.clean_up(api))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000, help="FineTuneJobs of a full run")
    parser.add_argument("--light", type=int, default=20, help="FineTuneJobs of the light run; 0: none")
    parser.add_argument("--rounds", type=int, default=2, help="full runs of each arm")
    parser.add_argument("--nodes", type=int, default=50, help="fake nodes")
    parser.add_argument("--profile", type=Path, help="sample the operator, and write its profiles to this folder")
    parser.add_argument("--keep", type=Path, help="keep logs and observations in this folder")
    args = parser.parse_args()
    if not os.environ.get("KUBECONFIG"):
        print("bench: KUBECONFIG is not set; run it by `make bench-operator`", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory() as temporary:
            if args.keep is not None:
                args.keep.mkdir(parents=True, exist_ok=True)
            asyncio.run(bench(args, args.keep or Path(temporary)))
    except (BenchProblem, OtherOperatorRan) as problem:
        print(f"bench: {problem}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("bench: interrupted; what it had made is removed", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
