"""LeaderElection: which of several operator processes works. The others stand by with full caches.

Started by handlers.py, which begins work in on_started and ends it in on_stopped. The protocol is client-go's
(k8s.io/client-go/tools/leaderelection), so `kubectl get lease` shows what it shows for every other controller:

- Whoever writes its name into the Lease leads; the API server's optimistic concurrency lets one of several writers win.
- A candidate judges by its own clock how long the record has not changed. Clocks are never compared.
- A leader that has not renewed for renew_seconds stops by itself. That is shorter than lease_seconds, which a candidate
  waits, so one has ended before another begins, provided that no clock runs faster than another by that ratio.
- A leader that ends in order stops its work, then gives the lease up: the next one begins at its next look.

This is no fence: a request on its way when its sender lost the lease still arrives. What such a request may do is kept
harmless elsewhere, by names that cannot be taken twice.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, Protocol

from finetune_operator.kube.client import ClusterError
from finetune_operator.kube.leases import LeaseRecord, lease_manifest, micro_time, parse_lease

logger = logging.getLogger(__name__)

RELEASE_SECONDS = 2.0
"""An API server that does not answer for so long does not hold up the end of the process."""
JITTER = 0.2
"""A candidate's pause is up to this share shorter, so that candidates do not write at the same moments."""

Raw = dict[str, Any]


def make_identity(pod_name: str, pod_ip: str) -> str:
    """The holderIdentity of a pod. It tells the others where to reach the leader."""
    return f"{pod_name}_{pod_ip}"


def find_address(identity: str) -> str | None:
    """The IP address in an identity of make_identity; None where there is none."""
    address = identity.rpartition("_")[2]
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return None


class LeaseClient(Protocol):
    """What leader election needs of kube.client.Client."""

    async def find(self, kind: str, namespace: str, name: str) -> Raw | None:
        """The object, or None."""

    async def create(self, kind: str, namespace: str, manifest: Mapping[str, Any]) -> Raw:
        """The new object; ClusterError 409 when there is one of that name."""

    async def replace(self, manifest: Mapping[str, Any]) -> Raw:
        """The object after it; ClusterError 409 when its resourceVersion is not the present one."""


class LeaderElection:
    """One process's part in the election. `clock` gives seconds that never go back; `now` is shown to people only.

    `on_started` is called when this process begins to lead and has to return at once. `on_stopped` is awaited when it
    leads no more and has to end the work: within lease_seconds - renew_seconds, for another may begin then.
    ValueError for times that do not keep renew < lease and retry < renew.
    """

    def __init__(
        self,
        client: LeaseClient,
        namespace: str,
        name: str,
        identity: str,
        *,
        clock: Callable[[], float],
        now: Callable[[], datetime],
        on_started: Callable[[], None],
        on_stopped: Callable[[], Awaitable[None]],
        lease_seconds: int = 10,
        renew_seconds: float = 7,
        retry_seconds: float = 2,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        if not 0 < retry_seconds < renew_seconds < lease_seconds:
            raise ValueError(
                f"leader election needs retry < renew < lease, has {retry_seconds:g}, {renew_seconds:g} and "
                f"{lease_seconds} seconds"
            )
        self.identity = identity
        self._client = client
        self._namespace = namespace
        self._name = name
        self._clock = clock
        self._now = now
        self._on_started = on_started
        self._on_stopped = on_stopped
        self._lease_seconds = lease_seconds
        self._renew_seconds = renew_seconds
        self._retry_seconds = retry_seconds
        self._jitter = jitter
        self._there: Raw | None = None
        self._seen = LeaseRecord()
        self._seen_at = float("-inf")
        self._leading = False
        self._leads_until = float("-inf")

    @property
    def is_leader(self) -> bool:
        """True while this process may work. By the clock, so a process that was halted knows as soon as it goes on."""
        return self._leading and self._clock() < self._leads_until

    @property
    def leader(self) -> str:
        """Identity of the process that holds the lease as last seen, empty when none does or its time is over."""
        return self._seen.holder if self._clock() < self._expires_at else ""

    @property
    def _expires_at(self) -> float:
        return self._seen_at + self._seen.lease_seconds

    async def run(self) -> None:
        """Take part until cancelled, then stop leading and give the lease up."""
        try:
            while True:
                await asyncio.sleep(await self.turn())
        finally:
            await self._step_down()
            await self._release()

    async def turn(self) -> float:
        """One try to take or to keep the lease; the seconds until the next. Called by run()."""
        limit = self._leads_until - self._clock() if self._leading else self._renew_seconds
        held: bool | None = None
        try:
            async with asyncio.timeout(max(0.0, limit)):
                held = await self._take_or_keep()
        except (ClusterError, TimeoutError) as error:
            done = "renewed" if self._leading else "taken"
            logger.warning("Lease %s could not be %s: %s", self._name, done, str(error) or "no answer in time")
        if self._leading and (held is False or not self.is_leader):
            logger.error("%s leads no more: Lease %s is %s", self.identity, self._name, self._whose(held))
            await self._step_down()
        elif held and not self._leading:
            logger.info("%s leads now (Lease %s)", self.identity, self._name)
            self._leading = True
            self._on_started()
        return self._pause()

    def _whose(self, held: bool | None) -> str:
        if held is False:
            return f"held by {self._seen.holder or 'nobody'}"
        return f"not renewed for {self._renew_seconds:g} s"

    def _pause(self) -> float:
        """Not later than the moment at which something is due: the end of our own lease, or of another's."""
        if self._leading:
            return max(0.0, min(self._retry_seconds, self._leads_until - self._clock()))
        pause = self._retry_seconds * (1 - JITTER * self._jitter())
        left = self._expires_at - self._clock()
        return min(pause, left) if left > 0 else pause

    async def _take_or_keep(self) -> bool:
        """True when the lease is ours after it, False when it is another's. ClusterError when that is not known."""
        if self._leading and self._there is not None:
            try:
                return await self._write(self._there, self._seen)
            except ClusterError as error:
                if error.status not in (404, 409):
                    raise  # else: somebody wrote or deleted the Lease, so it has to be looked at
        there = await self._client.find("Lease", self._namespace, self._name)
        if there is not None:
            self._see(there)
        if there is None:
            self._seen, self._seen_at = LeaseRecord(), float("-inf")
        elif self._is_anothers():
            return False
        try:
            return await self._write(there, self._seen)
        except ClusterError as error:
            if error.status == 409:
                return False  # another was faster
            raise

    def _is_anothers(self) -> bool:
        """Whether the lease as seen must be left alone. While we lead, any other name means that we were followed."""
        if self._seen.holder == self.identity:
            return False
        return self._leading or (self._seen.holder != "" and self._clock() < self._expires_at)

    async def _write(self, there: Raw | None, before: LeaseRecord) -> bool:
        """Write our name over `there`, or make the Lease. The time to lead is counted from before the request."""
        begun, moment = self._clock(), micro_time(self._now())
        record = LeaseRecord(self.identity, self._lease_seconds, moment, moment, before.transitions)
        if before.holder == self.identity:
            record = replace(record, acquire_time=before.acquire_time or moment)
        elif there is not None:
            record = replace(record, transitions=before.transitions + 1)
        manifest = lease_manifest(self._namespace, self._name, record, there)
        if there is None:
            written = await self._client.create("Lease", self._namespace, manifest)
        else:
            written = await self._client.replace(manifest)
        self._see(written)
        self._leads_until = begun + self._renew_seconds
        return True

    def _see(self, raw: Raw) -> None:
        """Keep the Lease. Only a record that changed counts as a sign of life."""
        record = parse_lease(raw)
        if self._there is None or record != self._seen:
            self._seen, self._seen_at = record, self._clock()
        self._there = raw

    async def _step_down(self) -> None:
        if self._leading:
            self._leading = False
            await self._on_stopped()

    async def _release(self) -> None:
        """Give the lease up if it is still ours; best effort, since it ends by itself."""
        if self._there is None or self._seen.holder != self.identity:
            return
        try:
            async with asyncio.timeout(RELEASE_SECONDS):
                await self._give_up(self._there)
        except (ClusterError, TimeoutError) as error:
            why = str(error) or "no answer in time"
            logger.warning("Lease %s was not given up and ends by itself: %s", self._name, why)

    async def _give_up(self, there: Raw) -> None:
        """Write nobody's name over `there`. A renewal that was cut off on its way may have been carried out since."""
        moment = micro_time(self._now())
        record = LeaseRecord("", 1, moment, moment, self._seen.transitions)
        try:
            await self._client.replace(lease_manifest(self._namespace, self._name, record, there))
        except ClusterError as error:
            newer = await self._client.find("Lease", self._namespace, self._name) if error.status == 409 else None
            if newer is None or parse_lease(newer).holder != self.identity:
                raise
            await self._client.replace(lease_manifest(self._namespace, self._name, record, newer))
