"""Passes a post that reached a standby on to the leader, as it came: the leader checks the token.

Called by server.py. The leader's address is in the Lease (leadership.make_identity); its certificate is checked against
the installation's CAs under the Service's host, which is what every replica's certificate is for.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import ssl
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import aiohttp

from finetune_operator.progress.certificates import Authorities

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 3.0
"""Shorter than the stages' own patience of 5 seconds, so that they get an answer."""
MOST_AT_ONCE = 16
"""Anybody in the cluster can post: a flood must not make this replica flood the leader."""
ANSWER_MAX_BYTES = 1024
_MARK = "Finetune-Forwarded"


class Unreachable(Exception):
    """There is no leader, or it did not answer. The message is for the stage's log."""


def was_forwarded(headers: Mapping[str, str]) -> bool:
    """Whether another replica passed this post on."""
    return _MARK in headers


class Forwarder:
    """Posts to whichever replica leads. `url` is the endpoint's as stages know it; `port` is where replicas listen.

    `is_leader` tells whether this replica leads, `leader_address` the leader's IP address, None while there is none.
    """

    def __init__(
        self, is_leader: Callable[[], bool], leader_address: Callable[[], str | None], url: str, port: int
    ) -> None:
        self.is_leader = is_leader
        self._leader_address = leader_address
        self._host = urlsplit(url).hostname or ""
        self._path = urlsplit(url).path or "/"
        self._port = port
        self._bundle = ""
        self._context: ssl.SSLContext | None = None
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(MOST_AT_ONCE)

    def trust(self, authorities: Authorities) -> None:
        """The CAs to check the leader's certificate with, from the next connection on."""
        if authorities.bundle != self._bundle:
            self._bundle = authorities.bundle
            self._context = ssl.create_default_context(cadata=self._bundle)

    async def forward(self, authorization: str, body: bytes) -> tuple[int, str]:
        """(HTTP status, text) of the leader's answer; Unreachable when there is none."""
        address = self._leader_address()
        if address is None or self._context is None:
            raise Unreachable("no replica leads")
        if self._slots.locked():
            raise Unreachable("too many posts wait for the leader")
        headers = {"Authorization": authorization, "Content-Type": "application/json", _MARK: "1"}
        async with self._slots:
            try:
                async with self._connected().post(
                    f"https://{_bracketed(address)}:{self._port}{self._path}",
                    data=body,
                    headers=headers,
                    ssl=self._context,
                    server_hostname=self._host,
                    allow_redirects=False,
                ) as answer:
                    text = await answer.content.read(ANSWER_MAX_BYTES)
                    return answer.status, text.decode(errors="replace")
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                logger.warning("a progress post did not reach the leader at %s: %r", address, error)
                raise Unreachable("the leader does not answer") from error

    async def close(self) -> None:
        """Close the connections to the leader."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS))
        return self._session


def _bracketed(address: str) -> str:
    return f"[{address}]" if ipaddress.ip_address(address).version == 6 else address
