"""Triggers in: kopf watches FineTuneJobs and their children, and every event only wakes the work queue.

The only module that imports kopf. Nothing is decided here, no state is kept but which of our own status writes need no
answer, and kopf writes nothing: no finalizers, no annotations, no events.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import kopf

from finetune_operator.api import constants
from finetune_operator.config import OperatorConfig
from finetune_operator.core import names
from finetune_operator.core.settings import Settings
from finetune_operator.health import HealthServer, WatchEchoes
from finetune_operator.kube.client import Client, ClusterError, connect
from finetune_operator.kube.observe import check_kind_is_served
from finetune_operator.progress.certificates import keep_authority
from finetune_operator.progress.senders import Senders
from finetune_operator.progress.server import ProgressServer, ProgressStore, monotonic
from finetune_operator.reconcile import reconcile
from finetune_operator.work_queue import Key, WorkQueue

logger = logging.getLogger(__name__)

CHILDREN = (("batch", "v1", "jobs"), ("", "v1", "pods"))
"""Kinds whose events wake a job's reconcile. ConfigMaps and Services are read then, and not watched."""


class Operator:
    """What lives between start and stop of one operator process."""

    def __init__(self, config: OperatorConfig) -> None:
        self.config = config
        self._settings: Settings = config.settings()
        self._client: Client | None = None
        self._queue: WorkQueue | None = None
        self._progress: ProgressStore | None = None
        self._server: ProgressServer | None = None
        self._health = HealthServer(self.problems)
        self._echoes = WatchEchoes(monotonic)
        self._written: dict[Key, str] = {}

    async def start(self) -> None:
        """Called again after a ClusterError, until it goes through."""
        if self._client is None:
            self._client = await connect()
        await check_kind_is_served(self._client)
        self._queue = WorkQueue(self._process)
        if self.config.progress_url:
            await self._serve_progress(self._client, self._queue)
        if self.config.health_port:
            await self._health.start(self.config.health_port)

    def problems(self) -> list[str]:
        """What shows that this process has frozen; empty while it works."""
        stuck = [f"reconcile of {namespace}/{name} does not end" for namespace, name in self._stuck()]
        deaf = [f"watch does not show our write of {namespace}/{name}" for namespace, name in self._echoes.overdue()]
        return stuck + deaf

    def _stuck(self) -> list[Key]:
        return self._queue.stuck() if self._queue is not None else []

    async def _serve_progress(self, client: Client, queue: WorkQueue) -> None:
        config = self.config
        authority = await keep_authority(client, config.namespace, config.tls_secret, _now())
        self._progress = ProgressStore(queue.wake, monotonic)
        self._server = ProgressServer(self._progress, Senders(client, monotonic), _now)
        await self._server.start(authority, config.progress_url, config.progress_port)
        self._settings = config.settings(authority.certificate.decode())

    async def stop(self) -> None:
        await self._health.stop()
        if self._server is not None:
            await self._server.stop()
        if self._queue is not None:
            await self._queue.close()
        if self._client is not None:
            await self._client.close()

    def job_changed(self, kind: str | None, namespace: str, name: str, version: str) -> None:
        """A FineTuneJob was added, changed or deleted."""
        key = (namespace, name)
        self._echoes.seen(key)
        if kind == "DELETED" and self._progress is not None:
            self._progress.forget(key)  # a new job of this name may be there before the next round
        if kind is not None and kind != "DELETED" and self._written.get(key) == version:
            return  # the echo of our own status write; a list (kind None) may stand for earlier events that were missed
        self._wake(key)

    def _forget(self, key: Key) -> None:
        """The job does not exist. Not done at its DELETED event: the round under way then may still note a write."""
        self._echoes.forget(key)
        self._written.pop(key, None)
        if self._progress is not None:
            self._progress.forget(key)

    def child_changed(self, namespace: str, labels: Mapping[str, str]) -> None:
        """A Job or pod of a FineTuneJob was added, changed or deleted."""
        job_name = labels.get(constants.LABEL_JOB_NAME)
        if job_name:
            self._wake((namespace, job_name))

    def _wake(self, key: Key) -> None:
        if self._queue is not None:
            self._queue.wake(key)

    async def _process(self, key: Key) -> float | None:
        if self._client is None:
            raise RuntimeError("the operator was not started")
        namespace, name = key
        begun = monotonic()
        progress = self._progress.find(key) if self._progress is not None else None
        done = await reconcile(
            self._client, namespace, name, self._settings, _now(), progress=progress, instance=self.config.pod_name
        )
        if done.gone:
            self._forget(key)
        if done.written_version is not None:
            self._written[key] = done.written_version
            self._echoes.written(key, begun)
        return done.again_after


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
    async def job_event(event: kopf.RawEvent, namespace: str | None, name: str, meta: kopf.Meta, **_: Any) -> None:
        operator.job_changed(event["type"], namespace or "", name, str(meta.get("resourceVersion")))

    async def child_event(namespace: str | None, labels: kopf.Labels, **_: Any) -> None:
        operator.child_changed(namespace or "", labels)

    for group, version, plural in CHILDREN:
        kopf.on.event(group, version, plural, registry=registry, id=f"{plural}_event")(child_event)
    return registry


def configure(settings: kopf.OperatorSettings) -> None:
    """kopf only watches: it posts nothing, stores nothing, looks for no other kinds, and filters on the server."""
    settings.posting.enabled = False
    settings.posting.loggers = False
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.persistence.finalizer = f"{constants.ANNOTATION_KOPF_PREFIX}/kopf"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=constants.ANNOTATION_KOPF_PREFIX)
    settings.watching.server_timeout = 600
    settings.queueing.exit_timeout = 2
    settings.networking.request_timeout = 30
    for group, version, plural in CHILDREN:
        settings.watching.label_selectors[group, version, plural] = names.managed_selector()


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
