"""The observer: a process of its own that watches the Jobs and pods of a run and notes when it saw what.

    observer.py NAMESPACE CHAINS STAGES OUTPUT [--finetunejobs]

It is the same for both arms, so what it costs the API server is the same too. It prints `watching` once its watches
have begun, and ends by itself when the last stage of every chain is complete (and, with --finetunejobs, every
FineTuneJob says Succeeded or Failed), or when nothing has happened for STALL_SECONDS. All times are of the monotonic
clock, which every process of a machine shares.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests"))
from raw_api import FINETUNEJOBS, JOBS, PODS, Api, Object, read_access

from finetune_operator.api import constants

STALL_SECONDS = 120.0
POLL_SECONDS = 0.25
SELECTOR = f"{constants.LABEL_MANAGED_BY}={constants.MANAGED_BY}"

Times = dict[str, dict[str, dict[str, Any]]]
"""chain -> stage -> created, ended, complete, and the number of Jobs."""


def has_condition(job: Object, kind: str) -> bool:
    conditions = (job.get("status") or {}).get("conditions") or ()
    return any(each["type"] == kind and each["status"] == "True" for each in conditions)


def is_ended(pod: Object) -> bool:
    """True when no container of the pod runs any more."""
    containers = (pod.get("status") or {}).get("containerStatuses") or ()
    return bool(containers) and all("terminated" in each["state"] for each in containers)


class Observer:
    """What was seen. `last` is when something new was."""

    def __init__(self, chains: int, stages: int) -> None:
        self.chains = chains
        self.stages = stages
        self.times: Times = {}
        self.uids: set[str] = set()
        self.failed: set[str] = set()
        self.complete = 0
        self.last = time.monotonic()

    @property
    def is_done(self) -> bool:
        return self.complete >= self.chains * self.stages

    def _stage(self, item: Object) -> dict[str, Any]:
        labels = item["metadata"]["labels"]
        chain = self.times.setdefault(labels[constants.LABEL_JOB_NAME], {})
        return chain.setdefault(labels[constants.LABEL_STAGE], {"jobs": 0})

    def job(self, item: Object) -> None:
        now, stage = time.monotonic(), self._stage(item)
        uid = item["metadata"]["uid"]
        if uid not in self.uids:
            self.uids.add(uid)
            stage["jobs"] += 1
            stage.setdefault("created", now)
            self.last = now
        if "complete" not in stage and has_condition(item, "Complete"):
            stage["complete"] = now
            self.complete += 1
            self.last = now
        if has_condition(item, "Failed"):
            self.failed.add(item["metadata"]["name"])

    def pod(self, item: Object) -> None:
        stage = self._stage(item)
        if "ended" not in stage and is_ended(item):
            stage["ended"] = self.last = time.monotonic()


async def _follow(api: Api, path: str, note: Any, begun: asyncio.Event) -> None:
    listed = await api.call("GET", path, query={"labelSelector": SELECTOR})
    if listed["items"]:
        raise RuntimeError(f"{path} is not empty: another run goes on there")
    begun.set()
    async for kind, item in api.watch(path, selector=SELECTOR, version=listed["metadata"]["resourceVersion"]):
        if kind != "DELETED":
            note(item)


async def observe(namespace: str, chains: int, stages: int, with_finetunejobs: bool) -> dict[str, Any]:
    """Watch until the end; see the module's docstring."""
    observer = Observer(chains, stages)
    lists, phases = 0, {}
    async with Api(await read_access()) as api:
        begun = [asyncio.Event(), asyncio.Event()]
        watches = [
            asyncio.create_task(_follow(api, JOBS.format(namespace=namespace), observer.job, begun[0])),
            asyncio.create_task(_follow(api, PODS.format(namespace=namespace), observer.pod, begun[1])),
        ]
        await asyncio.gather(*(each.wait() for each in begun))
        print("watching", flush=True)
        observer.last = time.monotonic()
        finished = False
        while not finished and time.monotonic() - observer.last < STALL_SECONDS:
            await asyncio.wait(watches, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for watch in watches:
                if watch.done():
                    watch.result()
            finished = observer.is_done
            if finished and with_finetunejobs:
                lists += 1
                listed = await api.call("GET", FINETUNEJOBS.format(namespace=namespace))
                phases = {job["metadata"]["name"]: job.get("status", {}).get("phase", "") for job in listed["items"]}
                finished = all(phase in ("Succeeded", "Failed") for phase in phases.values())
        ended = time.monotonic()
        for watch in watches:
            watch.cancel()
    return {
        "ended": ended,
        "finished": finished,
        "times": observer.times,
        "failed_jobs": sorted(observer.failed),
        "phases": phases,
        "lists_of_finetunejobs": lists,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("namespace")
    parser.add_argument("chains", type=int)
    parser.add_argument("stages", type=int)
    parser.add_argument("output", type=Path)
    parser.add_argument("--finetunejobs", action="store_true")
    args = parser.parse_args()
    found = asyncio.run(observe(args.namespace, args.chains, args.stages, args.finetunejobs))
    args.output.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
