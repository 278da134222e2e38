"""Who posts: a token of the endpoint's audience, checked by TokenReview, to the pod it is bound to and so to its job.

Called by server.py. Answers are kept for a short while, by the token's hash, so that a pod that posts every two seconds
costs one review a minute. Tokens are neither kept nor logged.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from finetune_operator.core.observed import AttemptKey
from finetune_operator.kube.client import Client
from finetune_trainer import contract

CACHE_SECONDS = 60.0
CACHE_SIZE = 4096
MOST_REVIEWS = 4
"""TokenReviews at a time: anybody in the cluster can post, and a flood must not take the reconciles' connections."""
_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"

FindPod = Callable[[str, str], tuple[str, tuple[str, str], AttemptKey] | None]
"""(namespace, pod's name) to (pod's uid, (namespace, FineTuneJob's name), (stage, digest label, attempt)); None for a
pod that is no stage's, or not known yet. Asked of the cache of watched pods, not of the API server."""


@dataclass(frozen=True)
class Sender:
    """The pod that posts, as the attempt that it belongs to. `digest` is the label of the stage's digest."""

    namespace: str
    job_name: str
    stage: str
    attempt: int
    digest: str = ""


@dataclass(frozen=True)
class _Reviewed:
    """What a TokenReview said, good until `until`: the pod that the token is bound to, "" for a refused token."""

    until: float
    namespace: str = ""
    pod_name: str = ""
    pod_uid: str = ""
    sender: Sender | None = None


class Senders:
    """Looks tokens up. `clock` gives seconds that never go back."""

    def __init__(self, client: Client, clock: Callable[[], float], find_pod: FindPod) -> None:
        self._client = client
        self._clock = clock
        self._find_pod = find_pod
        self._known: dict[str, _Reviewed] = {}
        self._reviews = asyncio.Semaphore(MOST_REVIEWS)

    async def find(self, token: str) -> Sender | None:
        """The sender of a valid token, None for any other; ClusterError when the API server cannot be asked."""
        key = hashlib.sha256(token.encode()).hexdigest()
        reviewed = self._known.get(key)
        if reviewed is None or self._clock() >= reviewed.until:
            async with self._reviews:
                reviewed = self._known.get(key)  # a post that waited before this one may have had it reviewed
                if reviewed is None or self._clock() >= reviewed.until:
                    reviewed = await self._review(token)
                    self._keep(key, reviewed)
        if reviewed.sender is None and reviewed.pod_name:
            # A pod may post before its event has come: only what is found is kept.
            sender = self._sender(reviewed)
            if sender is not None:
                reviewed = replace(reviewed, sender=sender)
                self._keep(key, reviewed)
        return reviewed.sender

    def _keep(self, key: str, reviewed: _Reviewed) -> None:
        if len(self._known) >= CACHE_SIZE and key not in self._known:
            self._known.clear()
        self._known[key] = reviewed

    async def _review(self, token: str) -> _Reviewed:
        review = await self._client.post(
            "/apis/authentication.k8s.io/v1/tokenreviews",
            {
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "TokenReview",
                "spec": {"token": token, "audiences": [contract.PROGRESS_AUDIENCE]},
            },
        )
        until = self._clock() + CACHE_SECONDS
        status = review.get("status") or {}
        if not status.get("authenticated") or contract.PROGRESS_AUDIENCE not in (status.get("audiences") or ()):
            return _Reviewed(until)
        user = status.get("user") or {}
        extra = user.get("extra") or {}
        parts = str(user.get("username") or "").split(":")
        name, uid = (next(iter(extra.get(field) or ()), "") for field in (_POD_NAME, _POD_UID))
        if parts[:2] != ["system", "serviceaccount"] or len(parts) != 4 or not name:
            return _Reviewed(until)
        return _Reviewed(until, parts[2], name, uid)

    def _sender(self, reviewed: _Reviewed) -> Sender | None:
        found = self._find_pod(reviewed.namespace, reviewed.pod_name)
        if found is None:
            return None
        uid, (namespace, job_name), (stage, digest, attempt) = found
        if uid != reviewed.pod_uid:
            return None  # a pod of that name which is not the token's
        return Sender(namespace, job_name, stage, attempt, digest)
