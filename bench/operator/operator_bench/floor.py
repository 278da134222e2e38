"""The floor: a bare client that runs chains of Jobs with nothing around them. No custom resource, no status, no memory.

    floor.py NAMESPACE CHAINS

One watch of the Jobs by their label, one POST for each: the first Job of every chain at once, each next one when the
watch shows the former complete. Whatever creates the same Jobs in the same order makes these requests at least. It
prints `ready`, begins when a line comes on its standard input, and ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests"))
from measures import peak_memory_mb
from observer import SELECTOR, has_condition
from raw_api import JOBS, Api, read_access
from workload import STAGES, Chain, capture, chain_name

from finetune_operator.api import constants

AT_ONCE = 32
"""Requests under way at the same time."""


class Floor:
    """The chains of one run. `next_stage` of a chain is the index of the Job to create next."""

    def __init__(self, api: Api, namespace: str, chain: Chain, chains: int) -> None:
        self._api = api
        self._path = JOBS.format(namespace=namespace)
        self._chain = chain
        self._names = [chain_name(index + 1) for index in range(chains)]
        self._uids = {name: f"{index:032x}" for index, name in enumerate(self._names)}
        self._next = dict.fromkeys(self._names, 0)
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._done = asyncio.Event()
        self._open = chains
        self.errors: list[str] = []
        self.cpu_seconds = 0.0

    async def run(self) -> float:
        """Seconds of the monotonic clock when the first request was sent."""
        listed = await self._api.call("GET", self._path, query={"labelSelector": SELECTOR, "limit": "1"})
        version = listed["metadata"]["resourceVersion"]
        watcher = asyncio.create_task(self._watch(version))
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        begun, cpu = time.monotonic(), time.process_time()
        for name in self._names:
            self._create(name)
        done = asyncio.create_task(self._done.wait())
        await asyncio.wait([done, watcher], return_when=asyncio.FIRST_COMPLETED)
        if watcher.done():
            watcher.result()
        watcher.cancel()
        self.cpu_seconds = time.process_time() - cpu
        return begun

    async def _watch(self, version: str) -> None:
        async for kind, job in self._api.watch(self._path, selector=SELECTOR, version=version):
            labels = job["metadata"]["labels"]
            name, stage = labels[constants.LABEL_JOB_NAME], STAGES.index(labels[constants.LABEL_STAGE])
            if kind == "MODIFIED" and stage == self._next[name] - 1 and has_condition(job, "Complete"):
                if self._next[name] < len(self._chain):
                    self._create(name)
                else:
                    self._next[name] += 1
                    self._open -= 1
                    if self._open == 0:
                        self._done.set()

    def _create(self, name: str) -> None:
        stage = self._next[name]
        self._next[name] += 1
        task = asyncio.create_task(self._post(self._chain.job(stage, name, self._uids[name])))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _post(self, text: bytes) -> None:
        async with self._slots:
            try:
                await self._api.call("POST", self._path, text)
            except Exception as error:  # noqa: BLE001  any failure is a result of the benchmark, and is told in its line
                self.errors.append(repr(error))


async def run(namespace: str, chains: int) -> None:
    async with Api(await read_access()) as api:
        floor = Floor(api, namespace, capture(namespace), chains)
        begun = await floor.run()
    told = {"begun": begun, "cpu_seconds": floor.cpu_seconds, "memory_mb": peak_memory_mb(os.getpid())}
    print(json.dumps({**told, "errors": floor.errors}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("namespace")
    parser.add_argument("chains", type=int)
    args = parser.parse_args()
    asyncio.run(run(args.namespace, args.chains))
    return 0


if __name__ == "__main__":
    sys.exit(main())
