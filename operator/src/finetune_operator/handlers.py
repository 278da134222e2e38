"""Triggers in: what is watched, and which events wake which job.

The only module that imports kopf. kopf starts and stops the process, logs in, and follows FineTuneJobs; it writes
nothing: no finalizers, no annotations, no events. kube/reflector.py follows children, nodes and Kueue's Workloads.
All of it ends in one cache and wakes the work queue; nothing is decided here. Every replica keeps its cache filled, and
only the one that holds the Lease works.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import kopf

from finetune_operator.api import constants
from finetune_operator.config import OperatorConfig
from finetune_operator.core import names
from finetune_operator.core.cache import JOB, NODE, POD, SERVICE, WORKLOAD, Cache, Wake
from finetune_operator.core.measures import derive_observations
from finetune_operator.core.queueing import GROUP as KUEUE
from finetune_operator.core.queueing import find_api_version
from finetune_operator.core.settings import Settings
from finetune_operator.health import ApiServerAnswers, HealthServer, WatchEchoes, silent_watches
from finetune_operator.job_audit import JobAudit
from finetune_operator.kube.client import OUTAGE_RETRY_SECONDS, Client, ClusterError, connect
from finetune_operator.kube.observe import Facts, check_kind_is_served, read_if_served
from finetune_operator.kube.reflector import Reflector
from finetune_operator.leadership import LeaderElection, make_identity
from finetune_operator.metrics import Metrics, Sources
from finetune_operator.progress.endpoint import ProgressEndpoint
from finetune_operator.progress.server import monotonic
from finetune_operator.reconcile import Cluster, Report, reconcile, write_report
from finetune_operator.work_queue import Key, WorkQueue

logger = logging.getLogger(__name__)

LAZY_SECONDS = 1.0
"""Events that only change what is shown are gathered for so long: an ordinary start of a pod is one status write."""
STATUSES_AT_ONCE = 2
"""Status writes under way at a time. They are the dearest requests there are (some 25 ms of the API server's processor
each), and nothing waits for them: what a stage's end sets going comes first, and a job's newest status is enough."""
STATUS_SECONDS = 0.5
"""A status waits for so long: stages of other jobs that end at the same moment are followed first, and what comes right
after one another is one write."""
KUEUE_LOOK_SECONDS = 10.0
"""How often it is looked whether Kueue has come or gone."""
FIRST_LOOK_SECONDS = 1.0
"""How often before that was ever found out: no job is looked at before."""


class _Feed:
    """Puts what a reflector tells of one kind into the cache."""

    def __init__(self, cache: Cache, kind: str, namespace: str, on_wakes: Callable[[Iterable[Wake]], None]) -> None:
        self._cache = cache
        self._kind = kind
        self._namespace = namespace
        self._on_wakes = on_wakes

    def put(self, raw: dict[str, Any]) -> None:
        self._on_wakes(self._cache.put(self._kind, raw))

    def remove(self, raw: dict[str, Any]) -> None:
        self._on_wakes(self._cache.remove(self._kind, raw))

    def replace_all(self, raws: list[dict[str, Any]], list_version: int) -> None:
        self._on_wakes(self._cache.replace_all(self._kind, raws, list_version, namespace=self._namespace))


class Operator:
    """What lives between start and stop of one operator process."""

    def __init__(self, config: OperatorConfig) -> None:
        self.config = config
        self._settings: Settings = config.settings()
        self._cache = Cache()
        self._client: Client | None = None
        self._cluster: Cluster | None = None
        self._queue: WorkQueue | None = None
        self._reports: dict[Key, Report] = {}
        self._report_queue: WorkQueue | None = None
        self._audit: JobAudit | None = None
        self._election: LeaderElection | None = None
        self._reflectors: dict[tuple[str, str], Reflector] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._kueue_version: str | None = None
        self._kueue_known = asyncio.Event()
        """Set once it is known whether Kueue is there, and what Workloads there are."""
        self._echoes = WatchEchoes(monotonic)
        self._answers = ApiServerAnswers(monotonic)
        self._metrics = Metrics(
            Sources(
                is_leader=lambda: self._leads,
                statuses=lambda: (job.status for job in self._cache.jobs()),
                watch_ages=self._watch_ages,
                now=_now,
            ),
            version("finetune-operator"),
        )
        self._health = HealthServer(self.problems, self.missing, self._metrics.render if config.metrics else None)
        self._progress: ProgressEndpoint | None = None
        if config.progress_url:
            self._progress = ProgressEndpoint(
                config, self._cache, self._wake, self._leader, clock=monotonic, now=_now, on_trust=self._trust
            )

    @property
    def _leads(self) -> bool:
        return self._election.is_leader if self._election is not None else self._queue is not None

    def _leader(self) -> str:
        return self._election.leader if self._election is not None else ""

    async def start(self) -> None:
        """Called again after a ClusterError, until it goes through."""
        if self._client is None:
            self._client = await connect(self._requested)
        await check_kind_is_served(self._client)
        if self._progress is not None:
            await self._progress.start(self._client)
            self._trust(self._progress.trusted())
        if self.config.health_port:
            await self._health.start(self.config.health_port)
        # Nothing from here on may fail: it would be done a second time.
        self._cluster = Cluster(self._client, self._cache, Facts(self._client, monotonic), lambda: self._kueue_version)
        self._audit = JobAudit(self._client, self._cache, self.config.watch_namespaces, self._on_wakes, monotonic)
        self._spawn(self._audit.run(), "audit")
        for kind, path in (
            (JOB, "/apis/batch/v1/{}jobs"),
            (POD, "/api/v1/{}pods"),
            (SERVICE, "/api/v1/{}services"),
        ):
            self._follow(kind, path, label_selector=names.managed_selector())
        if self._settings.nodes.watch:
            self._reflect(NODE, "", "/api/v1/nodes", optional=True)
        if self._settings.queue_enabled:
            self._spawn(self._follow_kueue(self._client), "kueue")
        else:
            self._kueue_known.set()
        self._spawn(self._begin(self._client), "begin")

    def _trust(self, certificates: str) -> None:
        """Attempts that begin from now on trust these for the progress endpoint."""
        self._settings = self.config.settings(certificates)

    async def _begin(self, client: Client) -> None:
        """Once the caches are filled: take part in the election, or work at once where there is none."""
        await asyncio.gather(*(each.synced.wait() for each in self._reflectors.values()), self._audit_synced())
        # Without this a job that holds quota would look as if it had lost it.
        await self._kueue_known.wait()
        logger.info("caches are filled: %s", dict(self._cache.count_children()))
        config, lease = self.config, self.config.lease
        if lease is None:
            self._lead()
            return
        self._election = LeaderElection(
            client,
            config.namespace,
            lease.name,
            make_identity(config.pod_name, config.pod_ip),
            clock=monotonic,
            now=_now,
            on_started=self._lead,
            on_stopped=self._stand_by,
            lease_seconds=lease.lease_seconds,
            renew_seconds=lease.renew_seconds,
            retry_seconds=lease.retry_seconds,
        )
        await self._election.run()

    async def _audit_synced(self) -> None:
        if self._audit is not None:
            await self._audit.synced.wait()

    def _lead(self) -> None:
        """Begin to work: every job is looked at."""
        logger.info("this replica works")
        if self._progress is not None:
            self._progress.clear()
        self._queue = WorkQueue(self._process)
        self._report_queue = WorkQueue(self._write_report, concurrency=STATUSES_AT_ONCE)
        for job in self._cache.jobs():
            self._queue.wake(job.key)

    async def _stand_by(self) -> None:
        """End the work: another replica goes on with it."""
        queues = (self._queue, self._report_queue)
        self._queue = self._report_queue = None
        self._reports.clear()
        for queue in queues:
            if queue is not None:
                await queue.close()
        if queues[0] is not None:
            logger.info("this replica stands by")

    def _follow(
        self, kind: str, path: str, *, label_selector: str = "", optional: bool = False
    ) -> list[asyncio.Task[None]]:
        """Follow a kind in every namespace that is served."""
        return [
            self._reflect(
                kind,
                namespace,
                path.format(f"namespaces/{namespace}/" if namespace else ""),
                label_selector=label_selector,
                optional=optional,
            )
            for namespace in self.config.watch_namespaces or ("",)
        ]

    def _reflect(
        self, kind: str, namespace: str, path: str, *, label_selector: str = "", optional: bool = False
    ) -> asyncio.Task[None]:
        if self._client is None:
            raise RuntimeError("the operator was not started")
        feed = _Feed(self._cache, kind, namespace, self._on_wakes)
        reflector = Reflector(
            self._client, kind, path, feed, monotonic, label_selector=label_selector, optional=optional
        )
        self._reflectors[kind, namespace] = reflector
        return self._spawn(reflector.run(), f"watch {kind} {namespace}")

    async def _follow_kueue(self, client: Client) -> None:
        """Follow Workloads while Kueue is there, whenever it comes or goes. Jobs that name a queue wait for it."""
        watches: list[asyncio.Task[None]] = []
        while True:
            try:
                found = find_api_version(await read_if_served(client, f"/apis/{KUEUE}"))
            except ClusterError as error:
                logger.warning("it could not be found out whether Kueue is there: %s", error)
            else:
                if found != self._kueue_version:
                    self._forget_kueue(watches)
                    watches = await self._meet_kueue(found) if found is not None else []
                    self._on_wakes([Wake(job.key) for job in self._cache.jobs()])
                self._kueue_known.set()
            await asyncio.sleep(KUEUE_LOOK_SECONDS if self._kueue_known.is_set() else FIRST_LOOK_SECONDS)

    async def _meet_kueue(self, api_version: str) -> list[asyncio.Task[None]]:
        """Kueue is there, as soon as its Workloads are in the cache; the tasks that follow them."""
        watches = self._follow(WORKLOAD, f"/apis/{api_version}/{{}}workloads", optional=True)
        await asyncio.gather(*(each.synced.wait() for (kind, _), each in self._reflectors.items() if kind == WORKLOAD))
        logger.info("Kueue is there: %s", api_version)
        self._kueue_version, self._cache.kueue_installed = api_version, True
        return watches

    def _forget_kueue(self, watches: Iterable[asyncio.Task[None]]) -> None:
        if self._kueue_version is None:
            return
        logger.info("Kueue is gone")
        for watch in watches:
            watch.cancel()
        self._reflectors = {key: each for key, each in self._reflectors.items() if key[0] != WORKLOAD}
        self._kueue_version, self._cache.kueue_installed = None, False
        self._cache.forget_workloads()

    def _spawn(self, work: Any, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.append(task)
        return task

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stand_by()
        if self._progress is not None:
            await self._progress.stop()
        await self._health.stop()
        if self._client is not None:
            await self._client.close()

    # what wakes

    def job_changed(self, kind: str | None, raw: dict[str, Any]) -> None:
        """A FineTuneJob was added, changed or deleted."""
        metadata = raw["metadata"]
        key = (metadata.get("namespace") or "default", metadata["name"])
        self._echoes.seen(key)
        if self._audit is not None:
            self._audit.seen(key, int(metadata.get("resourceVersion") or 0))
        if kind == "DELETED":
            if self._progress is not None:
                self._progress.forget(key)  # a new job of this name may be there before the next round
            wake = self._cache.remove_job(key, metadata["uid"])
        else:
            wake = self._cache.put_job(raw)
        if wake is not None:
            self._on_wakes([wake])

    def _on_wakes(self, wakes: Iterable[Wake]) -> None:
        for wake in wakes:
            self._wake(wake.key, 0.0 if wake.urgent else LAZY_SECONDS)

    def _wake(self, key: Key, after: float = 0.0) -> None:
        if self._queue is not None:
            self._queue.wake(key, after)

    async def _process(self, key: Key) -> float | None:
        if self._cluster is None:
            raise RuntimeError("the operator was not started")
        begun = monotonic()
        progress = self._progress.find(key) if self._progress is not None else None
        error: BaseException | None = None
        try:
            done = await reconcile(self._cluster, key, self._settings, _now(), progress=progress)
        except BaseException as caught:
            error = caught
            raise
        finally:
            if not isinstance(error, asyncio.CancelledError):
                self._metrics.reconciled(monotonic() - begun, error)
        if done.gone:
            self._forget(key)
        if done.report is None:
            self._reports.pop(key, None)
        else:
            self._reports[key] = done.report
            if self._report_queue is not None:
                self._report_queue.wake(key, STATUS_SECONDS)
        return done.again_after

    async def _write_report(self, key: Key) -> None:
        """Write the newest report of a job, or have it made anew when it was derived from what is not so any more."""
        report = self._reports.get(key)
        if report is None or self._cluster is None:
            return
        begun = monotonic()
        if await write_report(self._cluster, report, self._settings, _now(), self.config.pod_name):
            if self._cache.find_job(key) is not None:  # of a job that went meanwhile no echo will come
                self._echoes.written(key, begun)
            self._metrics.observe(derive_observations(report.before, report.after))
        else:
            self._wake(key)
        if self._reports.get(key) is report:
            del self._reports[key]

    def _forget(self, key: Key) -> None:
        """The job does not exist."""
        self._echoes.forget(key)
        if self._progress is not None:
            self._progress.forget(key)

    # what is wrong

    def problems(self) -> list[str]:
        """What shows that this process has frozen; empty while it works."""
        queues = (self._queue, self._report_queue)
        stuck = [each for queue in queues if queue is not None for each in queue.stuck()]
        deaf = {*self._echoes.overdue(), *(self._audit.overdue() if self._audit is not None else ())}
        return [
            *(f"reconcile of {namespace}/{name} does not end" for namespace, name in stuck),
            *(f"watch does not show changes of {namespace}/{name}" for namespace, name in sorted(deaf)),
            *silent_watches(self._watch_ages(), self._answers),
            *(f"{task.get_name()} has ended: {task.exception()!r}" for task in self._tasks if _has_failed(task)),
        ]

    def missing(self) -> list[str]:
        """What keeps this replica from being ready; empty when its caches are filled."""
        waiting = [
            f"{kind} {namespace}".strip()
            for (kind, namespace), each in self._reflectors.items()
            if not each.synced.is_set()
        ]
        if self._audit is None or not self._audit.synced.is_set():
            waiting.append(constants.KIND)
        return [f"{what} not listed yet" for what in waiting]

    def _watch_ages(self) -> Mapping[str, float]:
        ages: dict[str, float] = {}
        for (kind, _), reflector in self._reflectors.items():
            age = reflector.last_event_age()
            if age is not None:
                ages[kind] = max(age, ages.get(kind, 0.0))
        return ages

    def _requested(self, verb: str, code: int, seconds: float) -> None:
        self._metrics.requested(verb, code, seconds)
        self._answers.requested(code)


def _has_failed(task: asyncio.Task[None]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None


def _now() -> datetime:
    return datetime.now(timezone.utc)  # noqa: TID251  the one place that reads the clock


def build_registry(operator: Operator) -> kopf.OperatorRegistry:
    """The handlers of one operator; nothing is registered globally."""
    registry = kopf.OperatorRegistry()

    @kopf.on.startup(registry=registry, backoff=5)
    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings)
        try:
            await operator.start()
        except ClusterError as error:
            raise kopf.TemporaryError(str(error), delay=5) from error

    @kopf.on.cleanup(registry=registry)
    async def stop(**_: Any) -> None:
        await operator.stop()

    @kopf.on.login(registry=registry)
    def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.event(constants.GROUP, constants.VERSION, constants.PLURAL, registry=registry)
    async def job_event(event: kopf.RawEvent, **_: Any) -> None:
        operator.job_changed(event["type"], dict(event["object"]))

    return registry


class Backoffs:
    """kopf's waits between the tries of one request. They have no end: after the last one kopf ends the process."""

    def __iter__(self) -> Iterator[float]:
        return itertools.chain((0.5, 1.0, 2.0), itertools.repeat(OUTAGE_RETRY_SECONDS))


def configure(settings: kopf.OperatorSettings) -> None:
    """kopf only watches: it posts nothing, stores nothing, and looks for no other kinds."""
    settings.posting.enabled = False
    settings.posting.loggers = False
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.persistence.finalizer = f"{constants.ANNOTATION_KOPF_PREFIX}/kopf"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=constants.ANNOTATION_KOPF_PREFIX)
    settings.watching.server_timeout = 600
    settings.queueing.exit_timeout = 2
    settings.networking.request_timeout = 30
    settings.networking.error_backoffs = Backoffs()


def run(config: OperatorConfig) -> None:
    """Run until a signal ends it. Blocks."""
    operator = Operator(config)
    asyncio.run(
        kopf.operator(
            registry=build_registry(operator),
            standalone=True,
            clusterwide=not config.watch_namespaces,
            namespaces=config.watch_namespaces,
        )
    )
