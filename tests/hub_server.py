"""A hub on this machine: the part of its HTTP interface that huggingface_hub 0.36 uses to read repositories.

Repository information with blob ids and LFS hashes, the tree, and files with ETag, X-Repo-Commit and ranges. Errors
carry the hub's own status codes and headers: unknown or private repository, gated repository, wrong token, unknown
revision, unknown file. A download can be cut half way. Use as a context manager; `requests` lists what was asked.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

LFS_FROM = 4096
"""Files of at least this many bytes are answered as kept in LFS, whose ETag is a sha256."""

_INFO = re.compile(r"/api/(models|datasets)/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(r"/api/(models|datasets)/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")
_FILE = re.compile(r"/(datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Repo:
    """One repository. `tokens` may read its files; empty means everyone. `gated` shows its listing to everyone."""

    files: dict[str, bytes]
    gated: bool = False
    tokens: frozenset[str] = frozenset()
    branches: tuple[str, ...] = ("main",)

    @property
    def commit(self) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for path in sorted(self.files):
            digest.update(path.encode() + b"\0" + self.files[path])
        return digest.hexdigest()


@dataclass
class Hub:
    """The server. `accounts` are the tokens that belong to someone; any other one is refused."""

    repos: dict[str, Repo] = field(default_factory=dict)
    accounts: set[str] = field(default_factory=set)
    cut_at: dict[str, list[int]] = field(default_factory=dict)
    """Path of a file -> how many bytes its next downloads send before the connection is closed."""
    held: dict[str, threading.Event] = field(default_factory=dict)
    """Path of a file -> its downloads begin only once this event is set."""
    broken: set[str] = field(default_factory=set)
    """Paths of files that arrive with another last byte."""
    moved: dict[str, str] = field(default_factory=dict)
    """Path of a file -> the address that its downloads are sent to, as a hub sends large ones to its storage."""
    refused: int = 0
    """Status that every request gets where it is not 0."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range header) of every request."""

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def downloads(self, path: str) -> list[str]:
        """The Range headers of every download of the file `path`."""
        return [ranged for method, asked, ranged in self.requests if method == "GET" and asked.endswith("/" + path)]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True  # the client went away, as a killed one does

    def log_message(self, *args: object) -> None:
        """Quiet: `requests` is the record."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, unquote(path), self.headers.get("Range", "")))
        if self.hub.refused:
            self._error(self.hub.refused, "", "refused")
            return
        for pattern, respond in ((_TREE, self._tree), (_INFO, self._info), (_FILE, self._file)):
            match = pattern.fullmatch(path)
            if match is not None:
                values = {name: unquote(value or "") for name, value in match.groupdict().items()}
                repo = self._open(values["repo"], values["revision"] or "main", listing=pattern is not _FILE)
                if repo is not None:
                    respond(repo, values.get("path", ""))
                return
        self._error(404, "", "no such page")

    def _open(self, name: str, revision: str, *, listing: bool) -> Repo | None:
        """The repository, or None once an error has been answered."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.accounts:
            return self._error(401, "", "Invalid credentials in Authorization header")
        repo = self.hub.repos.get(name)
        allowed = repo is not None and (not repo.tokens or token in repo.tokens)
        if repo is None or (not allowed and not repo.gated):
            return self._error(404 if token else 401, "RepoNotFound", "Repository not found")
        if not allowed and not listing:
            return self._error(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
        if revision not in repo.branches and revision != repo.commit:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo

    def _info(self, repo: Repo, _path: str) -> None:
        siblings = []
        for path, data in sorted(repo.files.items()):
            sibling: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": _git_id(data)}
            if len(data) >= LFS_FROM:
                sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(sibling)
        self._json({"id": "x/y", "sha": repo.commit, "siblings": siblings, "private": False, "tags": []})

    def _tree(self, repo: Repo, _path: str) -> None:
        self._json(
            [
                {"type": "file", "path": path, "size": len(data), "oid": _git_id(data)}
                for path, data in sorted(repo.files.items())
            ]
        )

    def _file(self, repo: Repo, path: str) -> None:
        data = repo.files.get(path)
        if data is None:
            self._error(404, "EntryNotFound", "Entry not found", repo)
            return
        if path in self.hub.broken:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or ["", "0"])[1])
        body = data[start:]
        self.send_response(302 if path in self.hub.moved else 206 if start else 200)
        if path in self.hub.moved:
            self.send_header("Location", self.hub.moved[path])
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        original = repo.files[path]
        if len(data) >= LFS_FROM:
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(original).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("ETag", f'"{_git_id(original)}"')
        self.send_header("X-Repo-Commit", repo.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if path in self.hub.held:
            self.hub.held[path].wait(60)
        cuts = self.hub.cut_at.get(path)
        if cuts:
            self.wfile.write(body[: cuts.pop(0)])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(body)

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str, message: str, repo: Repo | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        if repo is not None:
            self.send_header("X-Repo-Commit", repo.commit)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _git_id(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()
