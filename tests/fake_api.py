"""An API server of one kind for tests of the client: FineTuneJobs with watches, pods and their logs, over real HTTP.

It answers as the real one does in what the client uses: resource versions, 409 for a taken name, 404 and 403 with a
Status, merge patches that count generations, lists by field and label, watches that begin at a version and end after
timeoutSeconds. `operator` is called with a job's object after every change of its spec and returns its new status, as
an operator would write it; `trouble` is asked first and may refuse a request.
"""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from finetune_operator.api.constants import API_VERSION, KIND

Raw = dict[str, Any]
Trouble = Callable[[str, str], int | None]

_JOBS = re.compile(rf"/apis/{API_VERSION}(?:/namespaces/(?P<namespace>[^/]+))?/finetunejobs(?:/(?P<name>[^/]+))?")
_PODS = re.compile(r"/api/v1/namespaces/(?P<namespace>[^/]+)/pods(?:/(?P<name>[^/]+)/log)?")


class FakeApi:
    """The server's memory. Every change goes through put and remove, which wake the watches."""

    def __init__(self) -> None:
        self.jobs: dict[tuple[str, str], Raw] = {}
        self.pods: list[Raw] = []
        self.logs: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self.operator: Callable[[Raw], Raw | None] = lambda job: None
        self.trouble: Trouble = lambda method, path: None
        self.token: str | None = None
        self.url = ""
        self.version = 1
        self.events: list[tuple[int, str, Raw]] = []
        self.changed = threading.Condition()
        self.open = True

    def put(self, job: Raw) -> Raw:
        """Make or replace a job; the operator sees it if its spec changed."""
        with self.changed:
            metadata = job["metadata"]
            key = metadata["namespace"], metadata["name"]
            before = self.jobs.get(key)
            self._store(key, job, "ADDED" if before is None else "MODIFIED")
            if before is None or before["spec"] != job["spec"]:
                status = self.operator(copy.deepcopy(self.jobs[key]))
                if status is not None:
                    self._store(key, {**self.jobs[key], "status": status}, "MODIFIED")
            return copy.deepcopy(self.jobs[key])

    def _store(self, key: tuple[str, str], job: Raw, event: str) -> None:
        self.version += 1
        stored = copy.deepcopy(job)
        stored["metadata"]["resourceVersion"] = str(self.version)
        stored["metadata"].setdefault("uid", f"uid-{key[1]}")
        self.jobs[key] = stored
        self.events.append((self.version, event, stored))
        self.changed.notify_all()

    def set_status(self, namespace: str, name: str, status: Raw) -> None:
        """What an operator does on its own time."""
        with self.changed:
            self._store((namespace, name), {**self.jobs[namespace, name], "status": status}, "MODIFIED")

    def remove(self, namespace: str, name: str) -> None:
        with self.changed:
            job = self.jobs.pop((namespace, name))
            self.version += 1
            self.events.append((self.version, "DELETED", job))
            self.changed.notify_all()

    def kubeconfig(self, path: Path, *, namespace: str = "research") -> Path:
        """A kubeconfig for this server, with one context."""
        user = {"token": self.token} if self.token is not None else {}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "me", "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "fake", "user": "me", "namespace": namespace}}],
        }
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path


@contextmanager
def serving(api: FakeApi) -> Iterator[FakeApi]:
    """The server, on a port of its own, until the block ends."""

    class Handler(_Handler):
        memory = api

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    api.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield api
    finally:
        with api.changed:
            api.open = False
            api.changed.notify_all()
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    memory: FakeApi
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PATCH(self) -> None:
        self._answer("PATCH")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        api, parts = self.memory, urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        api.requests.append((method, self.path))
        code = api.trouble(method, parts.path)
        if api.token is not None and self.headers.get("Authorization") != f"Bearer {api.token}":
            code = 401
        if code is not None:
            words = {401: "Unauthorized", 403: 'finetunejobs is forbidden: User "me" cannot do that'}
            self._status(code, words.get(code, "no"))
        elif match := _JOBS.fullmatch(parts.path):
            self._jobs(method, match["namespace"], match["name"], query, body)
        elif match := _PODS.fullmatch(parts.path):
            self._pods(match["namespace"], match["name"], query)
        else:
            self._text("404 page not found\n", code=404)

    def _jobs(self, method: str, namespace: str | None, name: str | None, query: Raw, body: Raw) -> None:
        api = self.memory
        if method == "GET" and query.get("watch") == "true":
            self._watch(namespace, query)
        elif method == "GET" and name is None:
            with api.changed:
                found = [job for job in api.jobs.values() if _is_meant(job, namespace, query)]
                version = str(api.version)
            self._json({"kind": f"{KIND}List", "metadata": {"resourceVersion": version}, "items": found})
        elif method == "POST":
            body["metadata"].setdefault("namespace", namespace)
            if (namespace, body["metadata"]["name"]) in api.jobs:
                self._status(409, f'finetunejobs "{body["metadata"]["name"]}" already exists')
                return
            body["metadata"]["generation"] = 1
            self._json(body if query.get("dryRun") else api.put(body), code=201)
        elif (namespace, name) not in api.jobs:
            self._status(404, f'finetunejobs.finetune-operator.io "{name}" not found')
        elif method == "GET":
            self._json(api.jobs[str(namespace), str(name)])
        elif method == "PATCH":
            job = copy.deepcopy(api.jobs[str(namespace), str(name)])
            if any(job["spec"].get(key) != value for key, value in body["spec"].items()):
                job["metadata"]["generation"] += 1
            job["spec"] = {**job["spec"], **body["spec"]}
            self._json(api.put(job))
        else:
            api.remove(str(namespace), str(name))
            self._json({"kind": "Status", "status": "Success"})

    def _watch(self, namespace: str | None, query: Raw) -> None:
        """Events after the version, as lines, until timeoutSeconds are over."""
        api, seen = self.memory, int(query["resourceVersion"] or 0)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        done = threading.Event()
        timer = threading.Timer(float(query["timeoutSeconds"]), lambda: (done.set(), self._wake()))
        timer.daemon = True
        timer.start()
        try:
            while True:
                with api.changed:
                    while not done.is_set() and api.open and api.version <= seen:
                        api.changed.wait()
                    fresh = [each for each in api.events if each[0] > seen]
                    seen = api.version
                if (done.is_set() or not api.open) and not fresh:
                    self.wfile.write(b"0\r\n\r\n")
                    return
                for _, kind, job in fresh:
                    if _is_meant(job, namespace, query):
                        line = json.dumps({"type": kind, "object": job}).encode() + b"\n"
                        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                self.wfile.flush()
        except OSError:
            self.close_connection = True  # whoever watched has seen enough
        finally:
            timer.cancel()

    def _wake(self) -> None:
        with self.memory.changed:
            self.memory.changed.notify_all()

    def _pods(self, namespace: str, name: str | None, query: Raw) -> None:
        api = self.memory
        if name is not None:
            log = api.logs.get(name)
            if log is None:
                self._status(400, f'container "stage" in pod "{name}" is waiting to start: ContainerCreating')
                return
            lines = log.splitlines(keepends=True)
            self._text("".join(lines[-int(query["tailLines"]) :] if "tailLines" in query else lines))
            return
        wanted = dict(pair.split("=") for pair in query.get("labelSelector", "").split(",") if pair)
        found = [
            pod
            for pod in api.pods
            if pod["metadata"]["namespace"] == namespace and wanted.items() <= pod["metadata"]["labels"].items()
        ]
        if query.get("watch") == "true":
            self._text("")
            return
        self._json({"kind": "PodList", "metadata": {"resourceVersion": "1"}, "items": found})

    def _json(self, value: Raw, *, code: int = 200) -> None:
        self._send(json.dumps(value).encode(), "application/json", code)

    def _text(self, text: str, *, code: int = 200) -> None:
        self._send(text.encode(), "text/plain", code)

    def _status(self, code: int, message: str) -> None:
        self._json({"kind": "Status", "code": code, "message": message}, code=code)

    def _send(self, data: bytes, kind: str, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _is_meant(job: Raw, namespace: str | None, query: Raw) -> bool:
    named = query.get("fieldSelector", "").removeprefix("metadata.name=")
    metadata = job["metadata"]
    return namespace in (None, metadata["namespace"]) and named in ("", metadata["name"])
