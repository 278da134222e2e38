"""Whole jobs during which the operator is killed around one of its API calls, and what has to be true afterwards.

Used by tests/contract for a sample and by tests/kills for every call. API server, scheduler, Job controller and garbage
collector are real; the pods stay without a node and get their status from the test. A Lane is one namespace with its
own operator process behind its own proxy; several lanes work side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubelet
from api_proxy import ApiProxy, Call, Moment, Strike
from builders import job_body
from operator_process import claim_manifest, environment
from raw_api import FINETUNEJOBS, JOBS, MERGE_PATCH, PODS, Access, Api, ApiError, Object
from warm_operator import WarmOperator

from finetune_operator.api import constants
from finetune_trainer import contract

JOB_SECONDS = 60.0
"""Longest time of a whole job with one death in it."""
QUIET_SECONDS = 0.5
"""An operator that watches and has made no call for so long has done all it wants to."""
POD_SECONDS = 0.05
"""How long a pod runs."""
SELECTOR = f"{constants.LABEL_MANAGED_BY}={constants.MANAGED_BY}"
CHILDREN = (JOBS, PODS, "/api/v1/namespaces/{namespace}/services", "/api/v1/namespaces/{namespace}/configmaps")
EVENTS = "/apis/events.k8s.io/v1/namespaces/{namespace}/events"


@dataclass(frozen=True)
class Death:
    """Kill the operator before or after its call `number` of a job."""

    number: int
    moment: Moment

    def __str__(self) -> str:
        return f"{self.moment} call {self.number}"


@dataclass(frozen=True)
class Verdict:
    """One job. `death` None: nobody was killed. `struck` None: the job had fewer calls than that."""

    death: Death | None
    struck: Call | None
    calls: tuple[Call, ...]
    problems: tuple[str, ...]
    seconds: float


class Plan:
    """Which deaths come next: every `step`-th call of each moment, until there are no more calls.

    Two jobs are never alike to the last call, since events that come together wake the operator once: so the end of a
    moment is when MISSES deaths beyond the last one that struck did not strike.
    """

    MISSES = 3

    def __init__(self, moments: Iterable[Moment] = Moment, first: int = 1, step: int = 1) -> None:
        self._next = dict.fromkeys(moments, first)
        self._step = step
        self._highest = dict.fromkeys(self._next, 0)
        self._missed: dict[Moment, set[int]] = {moment: set() for moment in self._next}

    def take(self) -> Death | None:
        """The next death; None when every call had its turn."""
        for moment, number in sorted(self._next.items(), key=lambda item: item[1]):
            beyond = [each for each in self._missed[moment] if each > self._highest[moment]]
            if len(beyond) < self.MISSES:
                self._next[moment] = number + self._step
                return Death(number, moment)
        return None

    def note(self, death: Death, struck: bool) -> None:
        """Whether the death came about."""
        if struck:
            self._highest[death.moment] = max(self._highest[death.moment], death.number)
        else:
            self._missed[death.moment].add(death.number)


class Lane:
    """One namespace, one operator at a time. Use as an asynchronous context manager.

    `access` is the test's own, `operators` the operator's, which its proxy shows the API server.
    """

    def __init__(self, access: Access, operators: Access, namespace: str, folder: Path) -> None:
        self.namespace = namespace
        self.log = folder / f"{namespace}.log"
        self._kubeconfig = folder / f"{namespace}.kubeconfig"
        self._proxy = ApiProxy(operators)
        self._api = Api(access)
        self._stack = AsyncExitStack()
        self._operator: WarmOperator | None = None
        self._jobs: dict[str, Object] = {}
        """Every Job that ever was in the namespace, by uid, as last seen."""
        self._finetunejobs: dict[str, Object] = {}
        self._ended_pods: set[str] = set()
        self._watches: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0

    async def __aenter__(self) -> Lane:
        await self._stack.enter_async_context(self._api)
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}}
        await self._api.call("POST", "/api/v1/namespaces", body)
        self._stack.push_async_callback(self._api.call, "DELETE", f"/api/v1/namespaces/{self.namespace}")
        claims = f"/api/v1/namespaces/{self.namespace}/persistentvolumeclaims"
        await self._api.call("POST", claims, claim_manifest(self.namespace))
        for path, note in ((JOBS, self._job), (PODS, self._pod), (FINETUNEJOBS, self._finetunejob)):
            self._watches.append(asyncio.create_task(self._follow(path.format(namespace=self.namespace), note)))
        self._stack.push_async_callback(self._end_tasks)
        await self._stack.enter_async_context(self._proxy)
        self._proxy.write_kubeconfig(self._kubeconfig)
        env = environment(self.namespace, KUBECONFIG=str(self._kubeconfig))
        self._operator = await asyncio.to_thread(WarmOperator, env, self.log)
        self._stack.callback(self._operator.close)
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await self._stack.__aexit__(*exception)

    async def _end_tasks(self) -> None:
        tasks = [*self._watches, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, path: str, note: Any) -> None:
        async for kind, item in self._api.watch(path):
            note(kind, item)

    def _job(self, _: str, job: Object) -> None:
        if constants.LABEL_STAGE in job["metadata"].get("labels", {}):
            self._jobs[job["metadata"]["uid"]] = job

    def _finetunejob(self, _: str, job: Object) -> None:
        self._finetunejobs[job["metadata"]["name"]] = job

    def _pod(self, kind: str, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        if kind != "DELETED" and constants.LABEL_STAGE in pod["metadata"]["labels"] and uid not in self._ended_pods:
            self._ended_pods.add(uid)
            self._spawn(self._play_kubelet(pod))

    async def _play_kubelet(self, pod: Object) -> None:
        """The pod runs, and ends with its report."""
        await self._set_status(pod, "Running", {"running": {"startedAt": _now()}})
        await asyncio.sleep(POD_SECONDS)
        ended = {"exitCode": 0, "reason": "Completed", "message": _report(pod), "finishedAt": _now()}
        await self._set_status(pod, "Succeeded", {"terminated": ended})

    async def _set_status(self, pod: Object, phase: str, state: Object) -> None:
        container = {
            "name": constants.CONTAINER_NAME,
            "image": "stage",
            "imageID": "",
            "ready": False,
            "restartCount": 0,
            "state": state,
        }
        body = {"status": {"phase": phase, "containerStatuses": [container]}}
        path = f"{PODS.format(namespace=self.namespace)}/{pod['metadata']['name']}/status"
        with contextlib.suppress(ApiError):  # deleted meanwhile
            await self._api.call("PATCH", path, body, content_type=MERGE_PATCH)

    async def run(self, death: Death | None) -> Verdict:
        """One FineTuneJob from its creation to its end, with one death of the operator on the way."""
        assert self._operator is not None
        begun = time.monotonic()
        self._count += 1
        name = f"kill-{self._count}"
        operator, proxy = self._operator, self._proxy
        proxy.arm(None if death is None else Strike(death.number, death.moment, operator.kill))
        path = FINETUNEJOBS.format(namespace=self.namespace)
        body = job_body(name=name, stages=kubelet.OVERRIDES)
        await self._api.call("POST", path, {**body, "metadata": {"name": name, "namespace": self.namespace}})
        operator.start()
        restarted = False
        while time.monotonic() - begun < JOB_SECONDS:
            for watch in self._watches:
                if watch.done():
                    watch.result()
            if proxy.struck is not None and not restarted:
                operator.start()
                restarted = True
            if self._is_finished(name) and self._is_settled():
                break
            await asyncio.sleep(0.02)
        operator.kill()
        proxy.next_life()
        problems = [problem async for problem in self._find_problems(name)]
        await self._api.call("DELETE", f"{path}/{name}")
        return Verdict(death, proxy.struck, tuple(proxy.calls), tuple(problems), time.monotonic() - begun)

    def _is_finished(self, name: str) -> bool:
        job = self._finetunejobs.get(name, {})
        return job.get("status", {}).get("phase") in ("Succeeded", "Failed")

    def _is_settled(self) -> bool:
        """The operator that runs now has begun to watch FineTuneJobs, and does nothing any more."""
        proxy = self._proxy
        watches = any(
            call.life == proxy.life and call.watch and call.path.endswith(constants.PLURAL) for call in proxy.calls
        )
        return watches and proxy.idle_seconds() > QUIET_SECONDS

    async def _find_problems(self, name: str) -> Any:
        """Sentences about what is wrong after a job; none when all is as if nobody had been killed."""
        path = FINETUNEJOBS.format(namespace=self.namespace)
        body = await self._api.call("GET", f"{path}/{name}")
        for problem in judge_status(body.get("status") or {}):
            yield problem
        uid = body["metadata"]["uid"]
        mine = [job for job in self._jobs.values() if job["metadata"]["labels"][constants.LABEL_JOB_UID] == uid]
        for problem in judge_jobs(mine):
            yield problem
        for kind in CHILDREN:
            query = {"labelSelector": f"{constants.LABEL_JOB_UID}={uid}"}
            for child in (await self._api.call("GET", kind.format(namespace=self.namespace), query=query))["items"]:
                if not _has_owner(child, {uid, *(job["metadata"]["uid"] for job in mine)}):
                    yield f"{kind.rpartition('/')[2]} {child['metadata']['name']} has no owner of this job"
        events = (await self._api.call("GET", EVENTS.format(namespace=self.namespace)))["items"]
        for problem in judge_events([event for event in events if event["regarding"].get("uid") == uid]):
            yield problem

    async def find_leftovers(self, seconds: float = 90) -> list[str]:
        """After all jobs are deleted: what of them is still there when the garbage collector had `seconds`."""
        ends = time.monotonic() + seconds
        left = ["not looked yet"]
        while left and time.monotonic() < ends:
            await asyncio.sleep(0.5)
            left = [
                f"{kind.rpartition('/')[2]} {child['metadata']['name']}"
                for kind in CHILDREN
                for child in (
                    await self._api.call(
                        "GET", kind.format(namespace=self.namespace), query={"labelSelector": SELECTOR}
                    )
                )["items"]
            ]
        return left

    def log_problems(self) -> list[str]:
        """What the operators' log has of bugs."""
        return [line for line in self.log.read_text().splitlines() if " ERROR " in line or line.startswith("Traceback")]


def judge_status(status: Object) -> Iterator[str]:
    """What is wrong with the status of a job that lost nothing but its operator."""
    if status.get("phase") != "Succeeded":
        yield f"phase is {status.get('phase')}: {status.get('message') or status.get('reason')}"
    for stage in status.get("stages") or ():
        if stage["state"] != "Succeeded" or stage.get("attempt", 1) != 1:
            yield f"stage {stage['name']} is {stage['state']} in attempt {stage.get('attempt')}"
    if len(status.get("stages") or ()) != len(kubelet.STAGES):
        yield f"status has {len(status.get('stages') or ())} stages"
    if status.get("restarts"):
        yield f"restarts is {status['restarts']}"
    if status.get("attempts"):
        yield f"attempts is {status['attempts']}"


def judge_jobs(jobs: list[Object]) -> Iterator[str]:
    """What is wrong with all the Jobs that a FineTuneJob ever had: there shall be attempt 1 of each stage, once."""
    labels = [job["metadata"]["labels"] for job in jobs]
    made = Counter((each[constants.LABEL_STAGE], each[constants.LABEL_ATTEMPT]) for each in labels)
    for stage in kubelet.STAGES:
        if made.pop((stage, "1"), 0) != 1:
            count = sum(each[constants.LABEL_STAGE] == stage for each in labels)
            yield f"{count} Jobs were made of stage {stage}, attempt 1 is not there exactly once"
    for (stage, attempt), count in made.items():
        yield f"{count} Jobs were made of stage {stage}, attempt {attempt}"


def judge_events(events: list[Object]) -> Iterator[str]:
    """The same event twice is a lie; one that a death has swallowed is not."""
    for (reason, note), count in Counter((event["reason"], event["note"]) for event in events).items():
        if count > 1:
            yield f"event {reason} was posted {count} times: {note}"


def _has_owner(child: Object, uids: set[str]) -> bool:
    owners = child["metadata"].get("ownerReferences") or ()
    return any(owner.get("controller") and owner["uid"] in uids for owner in owners)


def _report(pod: Object) -> str:
    labels = pod["metadata"]["labels"]
    stage = labels[constants.LABEL_STAGE]
    folder = f"finetune/jobs/{labels[constants.LABEL_JOB_NAME]}/{stage}-{labels[constants.LABEL_STAGE_DIGEST]}"
    artifacts = {stage: contract.ArtifactRef(folder, contract.digest_of(folder))}
    if stage == contract.PREPARE:
        artifacts[contract.MODEL_INPUT] = contract.ArtifactRef("finetune/models/tiny", contract.digest_of("model"))
    done = contract.Report(stage, 0, artifacts=artifacts, metrics=kubelet.METRICS.get(stage, {}))
    return contract.encode_report(done).decode()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


async def sweep(
    access: Access,
    operators: Access,
    prefix: str,
    folder: Path,
    lanes: int,
    plan: Plan,
    tell: Callable[[Verdict], None],
) -> tuple[list[Verdict], list[str]]:
    """Every death of `plan`, on `lanes` lanes at once: the verdicts, and what was left over or logged in the end."""
    verdicts: list[Verdict] = []

    async def work(number: int) -> list[str]:
        async with Lane(access, operators, f"{prefix}-{number}", folder) as lane:
            while (death := plan.take()) is not None:
                verdict = await lane.run(death)
                plan.note(death, verdict.struck is not None)
                verdicts.append(verdict)
                tell(verdict)
            left = [f"{name} is left over in {lane.namespace}" for name in await lane.find_leftovers()]
            return [*left, *lane.log_problems()]

    problems = await asyncio.gather(*(work(number) for number in range(lanes)))
    return verdicts, [problem for each in problems for problem in each]
