"""The progress endpoint's parts: certificates that a strict client trusts at any time, checked posts, few wakes."""

from __future__ import annotations

import asyncio
import base64
import copy
import math
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import aiohttp
import pytest
from cryptography import x509

from finetune_operator.config import LeaseSettings, OperatorConfig
from finetune_operator.core.cache import Cache
from finetune_operator.core.figures import Progress
from finetune_operator.core.settings import Settings
from finetune_operator.kube.client import ClusterError
from finetune_operator.progress.certificates import (
    CERTIFICATE_KEY,
    NEXT_CERTIFICATE_KEY,
    OVERLAP_DAYS,
    PRIVATE_KEY,
    Authorities,
    derive_authorities,
    follow_authorities,
    keep_authorities,
    make_authority,
    make_serving_pair,
    needs_serving_pair,
    read_authorities,
)
from finetune_operator.progress.endpoint import ProgressEndpoint
from finetune_operator.progress.forwarder import Forwarder
from finetune_operator.progress.senders import CACHE_SECONDS, MOST_REVIEWS, Sender, Senders
from finetune_operator.progress.server import WAKE_SECONDS, ProgressServer, ProgressStore

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
SENDER = Sender("team-a", "tiny", "train", 1, "0123456789abcdef")
KEY = ("team-a", "tiny")
URL = "https://progress.finetune-system.svc/v1/progress"


class KnownSenders:
    """One token and its sender; stands where TokenReview is asked in a cluster."""

    async def find(self, token: str) -> Sender | None:
        return SENDER if token == "good" else None


def make_store(clock: list[float], wakes: list[tuple[tuple[str, str], float]]) -> ProgressStore:
    return ProgressStore(lambda key, after: wakes.append((key, after)), lambda: clock[0])


def kept(store: ProgressStore) -> Progress:
    found = store.find(KEY)
    assert found is not None
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# posts


def test_a_post_is_kept_as_the_attempts_progress() -> None:
    store = make_store([0.0], [])
    facts = {"step": 3, "totalSteps": 10, "loss": 1.5, "tokensPerSecond": 9, "secondsLeft": 70, "lastCheckpoint": 2}
    facts |= {"mfu": 0.41, "gradientNorm": 2.5, "hostMemoryBytes": 1 << 30}
    store.keep(SENDER, facts, NOW)
    assert kept(store) == Progress(
        stage="train",
        attempt=1,
        step=3,
        total_steps=10,
        loss=1.5,
        tokens_per_second=9.0,
        checkpoint_step=2,
        checkpoint_time=NOW,
        seconds_left=70.0,
        digest="0123456789abcdef",
        advanced_at=NOW,
        mfu=0.41,
    )
    store.keep(SENDER, {**facts, "step": 4}, NOW + timedelta(seconds=9))
    assert kept(store).checkpoint_time == NOW, "the checkpoint is still the first one"
    store.forget(KEY)
    assert store.find(KEY) is None


LATER = NOW + timedelta(seconds=100)


@pytest.mark.parametrize(
    ("changes", "advances"),
    [
        pytest.param({}, False, id="the same again"),
        pytest.param({"loss": 1.0, "tokensPerSecond": 3}, False, id="other rates of the same step"),
        pytest.param({"step": 4}, True, id="a step"),
        pytest.param({"lastCheckpoint": 3}, True, id="a checkpoint"),
        pytest.param({"phase": "saving"}, True, id="another phase"),
    ],
)
def test_what_counts_as_advance(changes: dict[str, Any], advances: bool) -> None:
    store = make_store([0.0], [])
    facts = {"step": 3, "totalSteps": 10, "loss": 1.5, "lastCheckpoint": 2}
    store.keep(SENDER, facts, NOW)
    store.keep(SENDER, {**facts, **changes}, LATER)
    assert kept(store).advanced_at == (LATER if advances else NOW)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(Sender("team-a", "tiny", "train", 2, SENDER.digest), id="the next attempt"),
        pytest.param(Sender("team-a", "tiny", "train", 1, "fedcba9876543210"), id="the stage with other inputs"),
    ],
)
def test_an_attempt_takes_nothing_over_from_another(other: Sender) -> None:
    store = make_store([0.0], [])
    facts = {"step": 3, "totalSteps": 10, "lastCheckpoint": 2}
    store.keep(SENDER, facts, NOW)
    store.keep(other, facts, LATER)
    assert (kept(store).advanced_at, kept(store).checkpoint_time) == (LATER, LATER)


def test_a_new_leader_judges_by_posts_of_its_own_time() -> None:
    store = make_store([0.0], [])
    store.keep(SENDER, {"step": 3, "totalSteps": 10}, NOW)
    store.clear()
    assert store.find(KEY) is None
    store.keep(SENDER, {"step": 3, "totalSteps": 10}, LATER)
    assert kept(store).advanced_at == LATER


def test_many_posts_wake_the_job_every_ten_seconds() -> None:
    clock, wakes = [0.0], []
    store = make_store(clock, wakes)
    due = set()
    for tenth in range(300):
        clock[0] = tenth / 10
        before = len(wakes)
        store.keep(SENDER, {"step": tenth, "totalSteps": 400}, NOW)
        due |= {round(clock[0] + after, 6) for _, after in wakes[before:]}
    assert due == {0, WAKE_SECONDS, 2 * WAKE_SECONDS, 3 * WAKE_SECONDS}


def test_every_post_asks_for_a_round_since_one_in_between_may_have_come_before_it() -> None:
    clock, wakes = [0.0], []
    store = make_store(clock, wakes)
    for second in (0.0, 1.0, 2.0):
        clock[0] = second
        store.keep(SENDER, {"step": int(second), "totalSteps": 40}, NOW)
    assert wakes == [(KEY, 0), (KEY, WAKE_SECONDS - 1), (KEY, WAKE_SECONDS - 2)]


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
        pytest.param({"step": 1, "totalSteps": 2, "phase": 3}, id="a number as phase"),
        pytest.param({"step": 1, "totalSteps": 2, "phase": "x" * 33}, id="a long phase"),
    ],
)
def test_a_wrong_post_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"step|totalSteps|loss|tokensPerSecond|phase"):
        make_store([0.0], []).keep(SENDER, facts, NOW)


# who posts


class Reviews:
    """The API server's TokenReview: every token is pod train-0's but "nonsense"."""

    def __init__(self) -> None:
        self.count = 0

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert path == "/apis/authentication.k8s.io/v1/tokenreviews"
        self.count += 1
        await asyncio.sleep(0)
        if body["spec"]["token"] == "nonsense":
            return {"status": {"authenticated": False}}
        user = {
            "username": "system:serviceaccount:team-a:default",
            "extra": {
                "authentication.kubernetes.io/pod-name": ["train-0"],
                "authentication.kubernetes.io/pod-uid": ["uid-0"],
            },
        }
        return {"status": {"authenticated": True, "audiences": ["finetune-operator"], "user": user}}


class Pods(dict[str, str]):
    """The cache of watched pods: name to uid, all of one attempt."""

    def find(self, namespace: str, name: str) -> Any:
        assert namespace == "team-a"
        return (self[name], KEY, ("train", SENDER.digest, 1)) if name in self else None


@pytest.fixture
def clock() -> list[float]:
    return [1000.0]


async def test_a_token_is_reviewed_once_a_minute(clock: list[float]) -> None:
    reviews = Reviews()
    senders = Senders(reviews, lambda: clock[0], Pods({"train-0": "uid-0"}).find)
    assert [await senders.find("good") for _ in range(10)] == [SENDER] * 10
    assert reviews.count == 1
    clock[0] += CACHE_SECONDS
    assert await senders.find("good") == SENDER
    assert reviews.count == 2


async def test_a_flood_of_posts_is_reviewed_few_at_a_time(clock: list[float]) -> None:
    reviews = Reviews()
    senders = Senders(reviews, lambda: clock[0], Pods({"train-0": "uid-0"}).find)
    assert await asyncio.gather(*(senders.find("good") for _ in range(100))) == [SENDER] * 100
    assert reviews.count <= MOST_REVIEWS


async def test_a_pod_that_posts_before_its_event_has_come_is_known_a_moment_later(clock: list[float]) -> None:
    reviews, pods = Reviews(), Pods()
    senders = Senders(reviews, lambda: clock[0], pods.find)
    assert await senders.find("good") is None
    pods["train-0"] = "uid-0"
    assert await senders.find("good") == SENDER
    assert reviews.count == 1


@pytest.mark.parametrize(
    ("token", "pods"),
    [
        pytest.param("nonsense", {"train-0": "uid-0"}, id="no token"),
        pytest.param("good", {"train-0": "uid-1"}, id="of an earlier pod with that name"),
        pytest.param("good", {"train-1": "uid-0"}, id="of a pod that is no stage's"),
    ],
)
async def test_any_other_token_has_no_sender(clock: list[float], token: str, pods: dict[str, str]) -> None:
    assert await Senders(Reviews(), lambda: clock[0], Pods(pods).find).find(token) is None


# certificates


def days(count: float) -> timedelta:
    return timedelta(days=count)


def fresh() -> Authorities:
    return Authorities(make_authority(NOW))


def test_the_serving_certificate_ends_before_its_ca() -> None:
    authority = make_authority(NOW)
    certificate, _ = make_serving_pair(authority, "https://x.team.svc/v1/progress", NOW + days(3600))
    ca = x509.load_pem_x509_certificate(authority.certificate)
    assert x509.load_pem_x509_certificate(certificate).not_valid_after_utc == ca.not_valid_after_utc


def test_a_serving_certificate_is_renewed_at_two_thirds_of_its_life_or_with_its_ca() -> None:
    authority = make_authority(NOW)
    certificate, _ = make_serving_pair(authority, URL, NOW)
    assert needs_serving_pair(None, authority, NOW)
    assert not needs_serving_pair(certificate, authority, NOW + days(243))
    assert needs_serving_pair(certificate, authority, NOW + days(244))
    assert needs_serving_pair(certificate, make_authority(NOW), NOW)


def test_nothing_is_done_while_a_ca_is_young() -> None:
    authorities = fresh()
    assert derive_authorities(authorities, NOW + days(2919)) is authorities


def test_a_ca_is_followed_by_one_that_stages_have_known_for_long() -> None:
    first = fresh()
    both = derive_authorities(first, NOW + days(2921))
    assert both.current == first.current
    assert both.next is not None
    assert both.bundle == first.current.certificate.decode() + both.next.certificate.decode()
    assert derive_authorities(both, NOW + days(3284)) is both
    switched = derive_authorities(both, NOW + days(3286))
    assert switched == Authorities(both.next, previous=first.current.certificate)
    assert first.current.certificate.decode() in switched.bundle, "the other replica may still serve under it"
    assert derive_authorities(switched, NOW + days(3651)) == Authorities(both.next), "the old one has ended"


def test_a_successor_made_late_signs_when_it_was_known_for_long_enough() -> None:
    both = derive_authorities(fresh(), NOW + days(3400))
    assert derive_authorities(both, NOW + days(3400 + OVERLAP_DAYS - 1)) is both
    assert derive_authorities(both, NOW + days(3400 + OVERLAP_DAYS)).current == both.next


def test_after_a_long_absence_there_is_a_ca_that_is_valid() -> None:
    late = NOW + days(3700)
    authorities = derive_authorities(fresh(), late)
    assert authorities.next is None
    assert authorities.previous is None
    assert not needs_serving_pair(make_serving_pair(authorities.current, URL, late)[0], authorities.current, late)
    both = derive_authorities(fresh(), NOW + days(3640))
    assert derive_authorities(both, late) == Authorities(both.next), "its successor, though known for 60 days only"


def test_whoever_runs_for_less_than_the_overlap_trusts_every_certificate_it_meets() -> None:
    """An operator that looks once a week for 30 years; pods start each week and live 179 days."""
    authorities = derive_authorities(None, NOW)
    certificate = None
    bundles: list[tuple[datetime, str]] = []
    signers = set()
    for week in range(30 * 52):
        now = NOW + days(7 * week)
        authorities = derive_authorities(authorities, now)
        if needs_serving_pair(certificate, authorities.current, now):
            certificate, _ = make_serving_pair(authorities.current, URL, now)
        assert certificate is not None
        serving = x509.load_pem_x509_certificate(certificate)
        assert serving.not_valid_before_utc <= now <= serving.not_valid_after_utc - days(7)
        bundles = [(start, bundle) for start, bundle in bundles if start > now - days(OVERLAP_DAYS)]
        bundles.append((now, authorities.bundle))
        signer = authorities.current.certificate.decode()
        signers.add(signer)
        assert all(signer in bundle for _, bundle in bundles)
    assert len(signers) == 4


class Secrets:
    """The operator's Secret on an API server that refuses a patch of another resourceVersion."""

    def __init__(self, data: dict[str, str] | None = None) -> None:
        self.there: dict[str, Any] = {"metadata": {"resourceVersion": "1"}, "data": data or {}}
        self.patches = 0

    async def find(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        await asyncio.sleep(0)
        return copy.deepcopy(self.there) if (kind, namespace, name) == ("Secret", "system", "tls") else None

    async def merge(self, kind: str, namespace: str, name: str, patch: dict[str, Any], *, field_manager: str) -> None:
        await asyncio.sleep(0)
        if patch["metadata"]["resourceVersion"] != self.there["metadata"]["resourceVersion"]:
            raise ClusterError(409, "Conflict", "the Secret has been modified")
        self.patches += 1
        self.there["metadata"]["resourceVersion"] = str(self.patches + 1)
        data = {**self.there["data"], **patch["data"]}
        self.there["data"] = {key: value for key, value in data.items() if value is not None}


async def test_replicas_that_start_at_once_on_an_empty_secret_have_the_same_ca() -> None:
    secrets = Secrets()
    found = await asyncio.gather(*(keep_authorities(secrets, "system", "tls", NOW) for _ in range(3)))
    assert found[0] == found[1] == found[2] == read_authorities(secrets.there["data"])
    assert secrets.patches == 1


async def test_a_secret_is_kept_as_it_is_until_something_is_due() -> None:
    secrets = Secrets({"note": "bWluZQ=="})
    first = await keep_authorities(secrets, "system", "tls", NOW)
    assert await keep_authorities(secrets, "system", "tls", NOW + days(2000)) == first
    assert secrets.patches == 1
    both = await keep_authorities(secrets, "system", "tls", NOW + days(2921))
    switched = await keep_authorities(secrets, "system", "tls", NOW + days(3286))
    assert switched.current == both.next
    assert NEXT_CERTIFICATE_KEY not in secrets.there["data"]
    assert secrets.there["data"]["note"] == "bWluZQ=="


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param({CERTIFICATE_KEY: "!"}, id="no base64"),
        pytest.param({CERTIFICATE_KEY: "bm9uZQ=="}, id="no certificate"),
        pytest.param({PRIVATE_KEY: base64.b64encode(make_authority(NOW).private_key).decode()}, id="another's key"),
        pytest.param({PRIVATE_KEY: ""}, id="no key"),
    ],
)
async def test_a_damaged_secret_is_mended(damage: dict[str, str]) -> None:
    secrets = Secrets()
    first = await keep_authorities(secrets, "system", "tls", NOW)
    secrets.there["data"].update(damage)
    mended = await keep_authorities(secrets, "system", "tls", NOW)
    assert mended != first
    assert read_authorities(secrets.there["data"]) == mended


async def test_a_missing_secret_is_told() -> None:
    with pytest.raises(ClusterError, match="create it, empty"):
        await keep_authorities(Secrets(), "system", "other", NOW)


async def test_the_daily_look_survives_an_api_server_that_is_away() -> None:
    authorities, used = fresh(), asyncio.Queue[Authorities]()
    answers: Iterator[Any] = iter([ClusterError(0, "NoAnswer", "away"), authorities, authorities])

    async def read() -> Authorities:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    task = asyncio.create_task(follow_authorities(read, used.put_nowait, check_seconds=0.001, retry_seconds=0.001))
    assert [await used.get(), await used.get()] == [authorities, authorities]
    task.cancel()


# the endpoint


def real_now() -> datetime:
    return datetime.now(timezone.utc)  # noqa: TID251  a handshake compares with the real clock


class Replica:
    """A progress endpoint on a port of 127.0.0.1; `url` is the one that stages know, whatever the port."""

    def __init__(self, leads: bool = True, peer: Replica | None = None, url: str = "") -> None:
        self.port = free_port()
        self.url = url or f"https://localhost:{self.port}/v1/progress"
        self.leads = leads
        self.leader_address: str | None = "127.0.0.1"
        self.ahead = timedelta()
        self.store = make_store([0.0], [])
        forwarder = Forwarder(
            lambda: self.leads, lambda: self.leader_address, self.url, peer.port if peer is not None else self.port
        )
        self.server = ProgressServer(self.store, KnownSenders(), lambda: real_now() + self.ahead, forwarder)

    async def start(self, authorities: Authorities) -> None:
        await self.server.start(authorities, self.url, self.port)

    async def post(self, authorities: Authorities, token: str = "good", host: str = "localhost", **facts: Any) -> int:
        """The status of a post by a client that trusts these CAs and nothing else."""
        context = ssl.create_default_context(cadata=authorities.bundle)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connector = aiohttp.TCPConnector(ssl=context, force_close=True)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post(f"https://{host}:{self.port}/v1/progress", json=facts, headers=headers) as answer,
        ):
            return answer.status


@pytest.fixture
def authorities() -> Authorities:
    return Authorities(make_authority(real_now()))


@pytest.fixture
async def leader(authorities: Authorities) -> AsyncIterator[Replica]:
    replica = Replica()
    await replica.start(authorities)
    yield replica
    await replica.server.stop()


@pytest.fixture
async def standby(authorities: Authorities, leader: Replica) -> AsyncIterator[Replica]:
    replica = Replica(leads=False, peer=leader, url=leader.url)
    await replica.start(authorities)
    yield replica
    await replica.server.stop()


FACTS: dict[str, Any] = {"step": 1, "totalSteps": 2}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_client_that_trusts_the_ca_posts_over_https(host: str, authorities: Authorities) -> None:
    port = free_port()
    replica = Replica(url=f"https://{host}:{port}/v1/progress")
    await replica.start(authorities)
    try:
        assert await replica.post(authorities, host=host, **FACTS) == 204
        assert kept(replica.store).step == 1
        assert await replica.post(authorities, token="bad", host=host, **FACTS) == 403
        assert await replica.post(authorities, token="", host=host, **FACTS) == 401
        assert await replica.post(authorities, host=host) == 400
        assert await replica.post(authorities, host=host, **FACTS, phase="x" * 5000) == 413
    finally:
        await replica.server.stop()


async def test_a_post_to_a_standby_reaches_the_leader(
    authorities: Authorities, leader: Replica, standby: Replica
) -> None:
    assert await standby.post(authorities, **FACTS) == 204
    assert kept(leader.store).step == 1
    assert standby.store.find(KEY) is None
    assert await standby.post(authorities, token="bad", **FACTS) == 403
    assert await standby.post(authorities) == 400


async def test_a_standby_without_a_leader_says_so(authorities: Authorities, leader: Replica, standby: Replica) -> None:
    standby.leader_address = None
    assert await standby.post(authorities, **FACTS) == 503
    standby.leader_address = "127.0.0.1"
    await leader.server.stop()
    assert await standby.post(authorities, **FACTS) == 503


async def test_a_post_does_not_go_round_between_two_that_stand_by(
    authorities: Authorities, leader: Replica, standby: Replica
) -> None:
    leader.leads = False
    assert await standby.post(authorities, **FACTS) == 503
    assert leader.store.find(KEY) is None


async def test_a_standby_gives_the_token_to_no_server_of_another_ca(
    authorities: Authorities, leader: Replica, standby: Replica
) -> None:
    standby.server._forwarder.trust(Authorities(make_authority(real_now())))  # type: ignore[union-attr]
    assert await standby.post(authorities, **FACTS) == 503
    assert leader.store.find(KEY) is None


async def test_certificates_change_under_a_running_endpoint(authorities: Authorities, leader: Replica) -> None:
    assert not leader.server.renew(authorities), "its certificate is young"
    leader.ahead = timedelta(minutes=30)
    assert not leader.server.renew(authorities)
    assert await leader.post(authorities, **FACTS) == 204
    switched = Authorities(make_authority(real_now()), previous=authorities.current.certificate)
    assert leader.server.renew(switched)
    assert await leader.post(switched, **FACTS) == 204
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await leader.post(authorities, **FACTS)


class Apis(Secrets, Reviews):
    """The API server's part in the whole endpoint: the Secret and TokenReviews."""

    def __init__(self) -> None:
        Secrets.__init__(self)
        Reviews.__init__(self)


async def test_the_endpoint_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    config = OperatorConfig(
        Settings(trainer_image="registry.example/trainer:1"),
        namespace="system",
        pod_name="operator-a",
        pod_ip="127.0.0.1",
        progress_url=f"https://localhost:{port}/v1/progress",
        progress_port=port,
        tls_secret="tls",
        lease=LeaseSettings("finetune-operator"),
    )
    cache, leader, trusted = Cache(), ["operator-b_127.0.0.9"], list[str]()
    monkeypatch.setattr(cache, "find_pod", Pods({"train-0": "uid-0"}).find)
    endpoint = ProgressEndpoint(
        config,
        cache,
        lambda key, after: None,
        lambda: leader[0],
        clock=asyncio.get_running_loop().time,
        now=real_now,
        on_trust=trusted.append,
    )
    apis = Apis()
    assert endpoint.trusted() == ""
    await endpoint.start(apis)  # type: ignore[arg-type]
    try:
        await endpoint.start(apis)  # type: ignore[arg-type]
        client = Replica(url=config.progress_url)
        client.port = port
        authorities = read_authorities(apis.there["data"])
        assert authorities is not None
        assert endpoint.trusted() == authorities.bundle
        assert await client.post(authorities, **FACTS) == 503, "another leads, and does not answer"
        leader[0] = "operator-a_127.0.0.1"
        assert await client.post(authorities, **FACTS) == 204
        assert endpoint.find(KEY) is not None
        endpoint.clear()
        assert endpoint.find(KEY) is None
        switched = Authorities(make_authority(real_now()), previous=authorities.current.certificate)
        endpoint._use(authorities)
        assert trusted == []
        endpoint._use(switched)
        assert trusted == [switched.bundle] == [endpoint.trusted()]
        assert await client.post(switched, **FACTS) == 204
    finally:
        await endpoint.stop()
