"""ProgressEndpoint: the endpoint as one thing, from start() to stop(), for handlers.py.

It ties together who may post (senders.py), what is kept (server.py), which replica gets it (forwarder.py) and what
stages trust (certificates.py), and renews the certificates while it runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime

from finetune_operator.config import OperatorConfig
from finetune_operator.core.cache import Cache
from finetune_operator.core.figures import Progress
from finetune_operator.kube.client import Client
from finetune_operator.leadership import find_address, make_identity
from finetune_operator.progress.certificates import Authorities, follow_authorities, keep_authorities
from finetune_operator.progress.forwarder import Forwarder
from finetune_operator.progress.senders import Senders
from finetune_operator.progress.server import Key, ProgressServer, ProgressStore


class ProgressEndpoint:
    """Progress of the jobs of one operator. `leader` gives the identity of the replica that leads, "" while none does.

    `wake(key, after)` has a job's reconcile done in `after` seconds; `clock` gives seconds that never go back.
    `on_trust` is called when what stages have to trust (CA certificates, PEM) has changed since start().
    """

    def __init__(
        self,
        config: OperatorConfig,
        cache: Cache,
        wake: Callable[[Key, float], None],
        leader: Callable[[], str],
        *,
        clock: Callable[[], float],
        now: Callable[[], datetime],
        on_trust: Callable[[str], None],
    ) -> None:
        self._config = config
        self._cache = cache
        self._leader = leader
        self._clock = clock
        self._now = now
        self._on_trust = on_trust
        self._identity = make_identity(config.pod_name, config.pod_ip)
        self._store = ProgressStore(wake, clock)
        self._server: ProgressServer | None = None
        self._authorities: Authorities | None = None
        self._renewal: asyncio.Task[None] | None = None

    async def start(self, client: Client) -> None:
        """Serve. Called again after a ClusterError, until it goes through."""
        if self._server is not None:
            return
        config = self._config
        self._authorities = await self._keep(client)
        forwarder = Forwarder(self._is_leader, self._leader_address, config.progress_url, config.progress_port)
        server = ProgressServer(self._store, Senders(client, self._clock, self._cache.find_pod), self._now, forwarder)
        await server.start(self._authorities, config.progress_url, config.progress_port)
        self._server = server
        self._renewal = asyncio.create_task(
            follow_authorities(lambda: self._keep(client), self._use), name="certificates"
        )

    async def stop(self) -> None:
        """Serve no more. Harmless when it was not started."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.gather(self._renewal, return_exceptions=True)
            self._renewal = None
        if self._server is not None:
            await self._server.stop()
            self._server = None

    def trusted(self) -> str:
        """The CA certificates (PEM) that a stage which starts now has to trust; "" before start()."""
        return self._authorities.bundle if self._authorities is not None else ""

    def find(self, key: Key) -> Progress | None:
        """What a job's stage last posted."""
        return self._store.find(key)

    def forget(self, key: Key) -> None:
        """The job is gone."""
        self._store.forget(key)

    def clear(self) -> None:
        """This replica begins to lead: what it kept from before says nothing about who hangs now."""
        self._store.clear()

    def _is_leader(self) -> bool:
        return self._config.lease is None or self._leader() == self._identity

    def _leader_address(self) -> str | None:
        return find_address(self._leader())

    async def _keep(self, client: Client) -> Authorities:
        return await keep_authorities(client, self._config.namespace, self._config.tls_secret, self._now())

    def _use(self, authorities: Authorities) -> None:
        changed = authorities.bundle != self.trusted()
        self._authorities = authorities
        if self._server is not None:
            self._server.renew(authorities)
        if changed:
            self._on_trust(authorities.bundle)
