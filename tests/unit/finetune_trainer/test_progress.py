"""Progress reaches an endpoint when there is one, and never holds training up when there is none."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from train_runs import free_port, wait_until

from finetune_trainer.progress import Progress, ProgressPoster
from finetune_trainer.throughput import Speed

SPEED = Speed(2.0, 100.04, 0.5, 0.1, 0.25, 1 << 30, None)


def line(step: int) -> dict[str, Any]:
    """A line of training.jsonl."""
    return {"step": step, "loss": 2.5, "learningRate": 0.001, "gradientNorm": 1.25, "tokens": 99}


class Endpoint:
    """An operator's progress endpoint: what it received, and how it answers."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.received: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.status = 204
        self.hold = threading.Event()
        self.hold.set()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                endpoint.hold.wait(10)
                length = int(self.headers["Content-Length"])
                endpoint.received.append(json.loads(self.rfile.read(length)))
                endpoint.tokens.append(self.headers.get("Authorization"))
                self.send_response(endpoint.status)
                self.send_header("Location", "https://elsewhere.example/")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Tests want no access log."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        scheme = "https" if certificate else "http"
        self.url = f"{scheme}://127.0.0.1:{self.server.server_port}/progress"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[..., Endpoint]]:
    started: list[Endpoint] = []

    def start(certificate: Path | None = None) -> Endpoint:
        started.append(Endpoint(certificate))
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.server.shutdown()
        endpoint.server.server_close()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate of 127.0.0.1 with its key in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "operator")])
    start = datetime(2020, 1, 1, tzinfo=timezone.utc)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=36500))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "tls.pem"
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(encoded + signed.public_bytes(serialization.Encoding.PEM))
    return path


def test_facts_arrive_over_https_with_the_token_of_that_moment(
    serve: Callable[..., Endpoint], certificate: Path, tmp_path: Path
) -> None:
    endpoint = serve(certificate)
    token = tmp_path / "token"
    token.write_text("first\n")
    target = {"url": endpoint.url, "tokenPath": str(token), "caPath": str(certificate)}
    poster = ProgressPoster(target, min_interval=0.01)
    poster.post({"step": 1})
    wait_until(lambda: len(endpoint.received) == 1, 10, "the first POST did not arrive")
    token.write_text("second\n")
    poster.post({"step": 2})
    poster.close(10)
    assert endpoint.received == [{"step": 1}, {"step": 2}]
    assert endpoint.tokens == ["Bearer first", "Bearer second"]


def test_a_certificate_of_another_authority_gets_nothing(
    serve: Callable[..., Endpoint], certificate: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = serve(certificate)
    poster = ProgressPoster({"url": endpoint.url, "tokenPath": str(tmp_path / "token")})
    (tmp_path / "token").write_text("secret")
    poster.post({"step": 1})
    poster.close(10)
    assert endpoint.received == []
    said = capsys.readouterr().out
    assert "training goes on without it" in said
    assert "secret" not in said


def test_only_the_newest_facts_wait_while_a_request_is_on_its_way(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve()
    endpoint.hold.clear()
    poster = ProgressPoster({"url": endpoint.url}, min_interval=0.01)
    began = time.monotonic()
    for step in range(1000):
        poster.post({"step": step})
    assert time.monotonic() - began < 1.0
    endpoint.hold.set()
    poster.close(10)
    assert len(endpoint.received) <= 2
    assert endpoint.received[-1] == {"step": 999}


def test_requests_keep_their_distance(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve()
    poster = ProgressPoster({"url": endpoint.url}, min_interval=30)
    poster.post({"step": 1})
    wait_until(lambda: len(endpoint.received) == 1, 10, "the first POST did not arrive")
    poster.post({"step": 2})
    poster.post({"step": 3})
    assert len(endpoint.received) == 1
    poster.close(10)
    assert endpoint.received == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("status", [302, 401, 500])
def test_an_answer_that_is_no_success_is_said_once_and_not_followed(
    serve: Callable[..., Endpoint], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = serve()
    endpoint.status = status
    poster = ProgressPoster({"url": endpoint.url}, min_interval=0.001)
    for step in (1, 2):
        poster.post({"step": step})
        wait_until(lambda step=step: len(endpoint.received) == step, 10, "a POST did not arrive")
    poster.close(10)
    assert capsys.readouterr().out.count("training goes on without it") == 1


def test_an_endpoint_that_is_not_there_costs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(ProgressPoster({"url": f"http://127.0.0.1:{free_port()}/"}), 10)
    began = time.monotonic()
    progress.started(0)
    progress.logged(line(1), SPEED, 75)
    progress.saved(1, 0.25)
    progress.close()
    assert time.monotonic() - began < 5
    said = capsys.readouterr().out
    assert "step 1/10  loss 2.5000  lr 0.001  norm 1.25  100 tokens/s  MFU 25.0 %  00:01:15 left" in said
    assert "checkpoint of step 1 written in 0.25 s" in said


def test_progress_carries_all_that_is_known(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve()
    progress = Progress(ProgressPoster({"url": endpoint.url}), 10)
    progress.logged(line(4), SPEED, 60)
    progress.saved(4, 0.1)
    progress.close()
    assert endpoint.received[-1] == {
        "step": 4,
        "totalSteps": 10,
        "loss": 2.5,
        "learningRate": 0.001,
        "gradientNorm": 1.25,
        "seconds": 2.0,
        "tokensPerSecond": 100.0,
        "stepSeconds": 0.5,
        "dataWaitSeconds": 0.1,
        "mfu": 0.25,
        "hostMemoryBytes": 1 << 30,
        "secondsLeft": 60,
        "lastCheckpoint": 4,
    }


def test_every_step_and_every_save_is_told_to_the_operator_and_not_printed(
    serve: Callable[..., Endpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = serve()
    progress = Progress(ProgressPoster({"url": endpoint.url}, min_interval=0.001), 10)
    tell: list[tuple[Callable[[], None], dict[str, Any]]] = [
        (lambda: progress.started(4), {"step": 4, "totalSteps": 10, "lastCheckpoint": 4}),
        (lambda: progress.stepped(5), {"step": 5, "totalSteps": 10, "lastCheckpoint": 4}),
        (lambda: progress.saving(5), {"step": 5, "totalSteps": 10, "lastCheckpoint": 4, "phase": "saving"}),
        (lambda: progress.stepped(6), {"step": 6, "totalSteps": 10, "lastCheckpoint": 4}),
    ]
    for count, (call, expected) in enumerate(tell, 1):
        call()
        wait_until(lambda count=count: len(endpoint.received) == count, 10, f"post {count} did not arrive")
        assert endpoint.received[-1] == expected
    progress.close()
    assert capsys.readouterr().out == ""


def test_telling_of_a_step_takes_no_time_from_training(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve()
    endpoint.hold.clear()
    progress = Progress(ProgressPoster({"url": endpoint.url}), 100_000)
    began = time.monotonic()
    for step in range(10_000):
        progress.stepped(step)
    assert (time.monotonic() - began) / 10_000 < 0.0005, "seconds a step, while the operator does not answer"
    endpoint.hold.set()
    progress.close()
    assert endpoint.received[-1]["step"] == 9_999
