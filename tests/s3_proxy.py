"""An S3 server for tests with what Amazon's does and moto's leaves out, and with faults on request.

S3Proxy stands between a client and moto over real HTTP. Like S3 it compares each body with its x-amz-checksum-sha256
and answers BadDigest where they differ. A Fault meets the requests that its pattern finds in "METHOD /path?query".
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moto.server import ThreadedMotoServer

SLOW_DOWN, DENIED, FAILED = (503, "SlowDown"), (403, "AccessDenied"), (500, "InternalError")
CUT, LOST_ANSWER, DAMAGE, CALL = "cut", "lost answer", "damage", "call"
_PER_CONNECTION = frozenset({"connection", "keep-alive", "transfer-encoding", "expect"})


@dataclass
class Fault:
    """What happens to the requests that `pattern` finds, `times` of them, the first `after` left alone.

    `kind` is (status, code) to answer so, CUT before the server hears of it, LOST_ANSWER after it did, DAMAGE for a bit
    that flips on the way, or CALL for `call`, which is then answered as usual.
    """

    pattern: str
    kind: Any
    times: int = 1
    after: int = 0
    call: Callable[[], None] | None = None
    seen: int = 0

    def meets(self, request: str) -> bool:
        if not re.search(self.pattern, request):
            return False
        self.seen += 1
        return self.after < self.seen <= self.after + self.times


@dataclass
class S3Proxy:
    """The server's address, what was asked of it, and the faults to come."""

    endpoint: str = ""
    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def reset(self) -> None:
        self.requests.clear()
        self.faults.clear()

    def met(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            return next((fault for fault in self.faults if fault.meets(request)), None)


@contextmanager
def s3_proxy() -> Iterator[S3Proxy]:
    """moto behind a proxy, for as long as the block lasts."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    proxy = S3Proxy()

    class Handler(_Handler):
        behind = moto.get_host_and_port()
        state = proxy

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
        moto.stop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    behind: tuple[str, int]
    state: S3Proxy

    def do_GET(self) -> None:
        self._pass()

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET  # noqa: N815 - the names that the base class calls

    def log_message(self, *_: Any) -> None:
        pass

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.state.met(f"{self.command} {self.path}")
        kind = fault.kind if fault is not None else None
        if kind == CUT:
            return self._hang_up()
        if isinstance(kind, tuple):
            return self._refuse(*kind)
        if kind == CALL and fault is not None and fault.call is not None:
            fault.call()
        if kind == DAMAGE and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        told = self.headers.get("x-amz-checksum-sha256")
        if told and told != base64.b64encode(hashlib.sha256(body).digest()).decode():
            return self._refuse(400, "BadDigest")
        connection = http.client.HTTPConnection(*self.behind, timeout=30)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _PER_CONNECTION}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            if kind == LOST_ANSWER:
                return self._hang_up()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in _PER_CONNECTION and not (name.lower() == "content-length" and data):
                    self.send_header(name, value)
            if data:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        finally:
            connection.close()

    def _refuse(self, status: int, code: str) -> None:
        data = (
            b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        )
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
