"""The API server by the user's own kubeconfig: JSON in, JSON out, watches with a deadline, every failure a ClientError.

Used by client.py and nothing else. The official client does configuration, authentication and TLS; its typed models are
not used, for every object here is JSON that the operator's own models parse. Nothing is retried in silence: an API
server that is away for OUTAGE_SECONDS in a watch, or at a request, is told.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune_client.errors import ClientError, ClusterUnreachable, Forbidden, JobExists, JobNotFound, Refused

Raw = dict[str, Any]

REQUEST_SECONDS = 30.0
WATCH_SECONDS = 240
"""Longest single watch; API servers end them after five to ten minutes anyway."""
OUTAGE_SECONDS = 60.0
RETRY_SECONDS = 2.0
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Cluster:
    """One API server, as one user. `namespace` is the one that is meant where none is named."""

    def __init__(self, api: Any, namespace: str, where: str) -> None:
        self._api = api
        self.namespace = namespace
        self.where = where
        """Host, and context if there is one: what messages call the cluster."""

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> Raw:
        """The answer's JSON object. ClientError when it is refused or none comes."""
        response = self._open(method, path, query or {}, body, content_type, (REQUEST_SECONDS, REQUEST_SECONDS))
        try:
            data = response.data
        finally:
            response.release_conn()
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ClusterUnreachable(f"{self.where} answered {method} {path} with something else than JSON: a proxy?")
        return value

    def lines(self, path: str, query: Mapping[str, str], *, silence_seconds: float | None) -> Iterator[str]:
        """The lines of a text answer, such as a pod's log, as they come. It may be silent for `silence_seconds`."""
        response = self._open("GET", path, query, None, "application/json", (REQUEST_SECONDS, silence_seconds))
        yield from self._read_lines(response, path)

    def follow(self, path: str, query: Mapping[str, str], *, seconds: float) -> Iterator[tuple[str, Raw]]:
        """(event, object) of a collection: the present objects as LISTED, then each change, for at most `seconds`.

        Expired watches and short outages are gone over; after either the objects are LISTED again. A round of a list
        ends with the event SYNCED and an empty object, so that an empty collection says something too.
        """
        ends = time.monotonic() + seconds
        away_since: float | None = None
        answered = False
        pause = threading.Event()
        while time.monotonic() < ends:
            try:
                listed = self.call("GET", path, query=query)
                away_since, answered = None, True
                for item in listed.get("items") or ():
                    yield "LISTED", item
                yield "SYNCED", {}
                yield from self._watch(path, query, (listed.get("metadata") or {}).get("resourceVersion") or "", ends)
            except ClusterUnreachable:
                away_since = time.monotonic() if away_since is None else away_since
                if not answered or time.monotonic() - away_since > OUTAGE_SECONDS:
                    raise
                pause.wait(max(0.0, min(RETRY_SECONDS, ends - time.monotonic())))

    def _watch(self, path: str, query: Mapping[str, str], version: str, ends: float) -> Iterator[tuple[str, Raw]]:
        """Changes after `version` until `ends`, or until the server says that it has to be listed again."""
        pause = threading.Event()
        while (left := ends - time.monotonic()) > 0:
            begun, heard = time.monotonic(), False
            seconds = int(min(WATCH_SECONDS, max(1, left)))
            asked = {
                **query,
                "watch": "true",
                "resourceVersion": version,
                "timeoutSeconds": str(seconds),
                "allowWatchBookmarks": "true",
            }
            try:
                response = self._open("GET", path, asked, None, "application/json", (REQUEST_SECONDS, seconds + 5.0))
            except Refused:
                return  # 410: the version is too old
            for line in self._read_lines(response, path):
                event = json.loads(line)
                raw = event.get("object") or {}
                if event.get("type") == "ERROR":
                    return
                heard = True
                version = (raw.get("metadata") or {}).get("resourceVersion") or version
                if event.get("type") != "BOOKMARK":
                    yield event["type"], raw
            if not heard and time.monotonic() - begun < 1:
                pause.wait(min(RETRY_SECONDS, left))  # something between here and the server cuts watches short

    def _read_lines(self, response: Any, path: str) -> Iterator[str]:
        import urllib3

        rest = b""
        try:
            for chunk in response.stream(65536, decode_content=True):
                *whole, rest = (rest + chunk).split(b"\n")
                yield from (line.decode(errors="replace") for line in whole)
            if rest:
                yield rest.decode(errors="replace")
        except urllib3.exceptions.HTTPError as error:
            raise ClusterUnreachable(f"{self.where}: the answer to GET {path} broke off: {error}") from error
        finally:
            response.close()

    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None,
        content_type: str,
        timeout: tuple[float, float | None],
    ) -> Any:
        """The answer, its body not read yet."""
        import urllib3
        from kubernetes.client.exceptions import ApiException

        try:
            return self._api.call_api(
                path,
                method,
                query_params=list(query.items()),
                header_params={"Accept": "*/*", "Content-Type": content_type},
                body=None if body is None else dict(body),
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=timeout,
            )
        except ApiException as error:
            raise self._refusal(method, path, error) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise ClusterUnreachable(
                f"{self.where} does not answer: {reason}; look at `kubectl cluster-info`, or name another --context"
            ) from error

    def _refusal(self, method: str, path: str, error: Any) -> ClientError:
        status = int(error.status or 0)
        body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or "")
        try:
            words = str(json.loads(body).get("message") or body)
        except (ValueError, AttributeError):
            words = body[:500] or str(error.reason)
        if status == 401:
            return ClusterUnreachable(f"{self.where} does not know you: {words}; log in again, as for kubectl")
        if status == 403:
            return Forbidden(
                f"{self.where}: {words}; ask for the chart's role finetune-operator-edit (or -view, to look)"
            )
        if status == 404 and ("could not find the requested resource" in words or "page not found" in words):
            return ClusterUnreachable(f"{self.where} has no FineTuneJobs: install the chart finetune-operator there")
        if status == 404:
            return JobNotFound(words)
        if status == 409:
            return JobExists(words)
        if status in (0, 429) or status >= 500:
            return ClusterUnreachable(f"{self.where}: {method} {path}: {status}: {words}")
        return Refused(words)


def connect(*, context: str | None = None, kubeconfig: str | None = None, namespace: str | None = None) -> Cluster:
    """The cluster of the context, else of the current one, else the one that this process runs in.

    `kubeconfig` is in place of $KUBECONFIG and ~/.kube/config. ClusterUnreachable where none is there.
    """
    from kubernetes import client as kubernetes_client
    from kubernetes import config as kubernetes_config

    configuration = kubernetes_client.Configuration()
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # what it warns of is told by what is raised
    # Said each time: the official client reads the variable only once, when it is imported.
    file = kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
    try:
        contexts, active = kubernetes_config.list_kube_config_contexts(config_file=file)
        chosen = active if context is None else next((each for each in contexts if each["name"] == context), None)
        if chosen is None:
            names = ", ".join(sorted(each["name"] for each in contexts)) or "none"
            raise ClusterUnreachable(f"--context: the kubeconfig has no context {context!r}; it has: {names}")
        kubernetes_config.load_kube_config(config_file=file, context=chosen["name"], client_configuration=configuration)
        found = (chosen.get("context") or {}).get("namespace")
        where = f"{configuration.host} (context {chosen['name']})"
    except kubernetes_config.ConfigException as error:
        if context is not None or kubeconfig is not None:
            raise ClusterUnreachable(f"the kubeconfig cannot be used: {error}") from error
        try:
            kubernetes_config.load_incluster_config(client_configuration=configuration)
        except kubernetes_config.ConfigException:
            raise ClusterUnreachable(
                f"no cluster to talk to: {error}; set KUBECONFIG, or make one that `kubectl get ftj` works with"
            ) from error
        found = _NAMESPACE_FILE.read_text(encoding="utf-8").strip() if _NAMESPACE_FILE.exists() else None
        where = configuration.host
    configuration.retries = False
    return Cluster(kubernetes_client.ApiClient(configuration), namespace or found or "default", where)
