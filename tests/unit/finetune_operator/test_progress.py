"""The progress endpoint's parts: certificates that a strict client trusts, checked posts, few wakes."""

from __future__ import annotations

import math
import socket
import ssl
from datetime import datetime, timedelta, timezone
from typing import Any

import aiohttp
import pytest
from cryptography import x509

from finetune_operator.core.figures import Progress
from finetune_operator.progress.certificates import make_authority, make_serving_pair
from finetune_operator.progress.senders import Sender
from finetune_operator.progress.server import ProgressServer, ProgressStore

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
SENDER = Sender("team-a", "tiny", "train", 1)
KEY = ("team-a", "tiny")


class KnownSenders:
    """One token and its sender; stands where TokenReview is asked in a cluster."""

    async def find(self, token: str) -> Sender | None:
        return SENDER if token == "good" else None


def make_store(clock: list[float], wakes: list[tuple[tuple[str, str], float]]) -> ProgressStore:
    return ProgressStore(lambda key, after: wakes.append((key, after)), lambda: clock[0])


def test_a_post_is_kept_as_the_attempts_progress() -> None:
    store = make_store([0.0], [])
    facts = {"step": 3, "totalSteps": 10, "loss": 1.5, "tokensPerSecond": 9, "secondsLeft": 70, "lastCheckpoint": 2}
    store.keep(SENDER, facts, NOW)
    assert store.find(KEY) == Progress("train", 1, 3, 10, 1.5, 9.0, 2, NOW, 70.0)
    store.keep(SENDER, {**facts, "step": 4}, NOW + timedelta(seconds=9))
    kept = store.find(KEY)
    assert kept is not None
    assert kept.checkpoint_time == NOW, "the checkpoint is still the first one"
    store.forget(KEY)
    assert store.find(KEY) is None


def test_many_posts_wake_the_job_every_five_seconds() -> None:
    clock, wakes = [0.0], []
    store = make_store(clock, wakes)
    for tenth in range(101):
        clock[0] = tenth / 10
        store.keep(SENDER, {"step": tenth, "totalSteps": 200}, NOW)
    times = [round(clock_time, 1) for clock_time in (0.0, 5.0, 10.0)]
    assert len(wakes) == len(times) + 1
    assert all(0 <= after <= 5 for _, after in wakes)


@pytest.mark.parametrize(
    "facts",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"step": 1}, id="no total"),
        pytest.param({"step": 1.5, "totalSteps": 2}, id="half a step"),
        pytest.param({"step": True, "totalSteps": 2}, id="a truth value"),
        pytest.param({"step": -1, "totalSteps": 2}, id="a negative step"),
        pytest.param({"step": 1, "totalSteps": 2, "loss": math.inf}, id="an infinite loss"),
        pytest.param({"step": 1, "totalSteps": 2, "tokensPerSecond": "9"}, id="a text"),
        pytest.param({"step": 1, "totalSteps": 2**63}, id="more than 64 bits"),
        pytest.param({"step": 1, "totalSteps": 2, "loss": 10**400}, id="more than a float holds"),
    ],
)
def test_a_wrong_post_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"step|totalSteps|loss|tokensPerSecond"):
        make_store([0.0], []).keep(SENDER, facts, NOW)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_client_that_trusts_the_ca_posts_over_https(host: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"https://{host}:{port}/v1/progress"
    now = datetime.now(timezone.utc)  # noqa: TID251  a handshake compares with the real clock
    authority = make_authority(now)
    store = make_store([0.0], [])
    server = ProgressServer(store, KnownSenders(), lambda: now)
    await server.start(authority, url, port)
    context = ssl.create_default_context(cadata=authority.certificate.decode())
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    connector = aiohttp.TCPConnector(ssl=context, force_close=True)
    try:
        async with aiohttp.ClientSession(connector=connector) as session:
            answers = []
            for token, body in (("good", {"step": 1, "totalSteps": 2}), ("bad", {}), ("good", {}), ("", {})):
                headers = {"Authorization": f"Bearer {token}"}
                async with session.post(url, json=body, headers=headers) as answer:
                    answers.append(answer.status)
        assert answers == [204, 403, 400, 401]
        assert store.find(KEY) is not None
    finally:
        await server.stop()


def test_the_serving_certificate_ends_before_its_ca() -> None:
    authority = make_authority(NOW)
    late = NOW + timedelta(days=3600)
    certificate, _ = make_serving_pair(authority, "https://x.team.svc/v1/progress", late)
    ca = x509.load_pem_x509_certificate(authority.certificate)
    assert x509.load_pem_x509_certificate(certificate).not_valid_after_utc == ca.not_valid_after_utc
