"""Who posts: a token of the endpoint's audience, checked by TokenReview, to the pod it is bound to and so to its job.

Called by server.py. Answers are kept for a short while, by the token's hash, so that a pod that posts every two seconds
costs one review a minute. Tokens are neither kept nor logged.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from finetune_operator.api import constants
from finetune_operator.core import names
from finetune_operator.kube.client import Client
from finetune_trainer import contract

CACHE_SECONDS = 60.0
CACHE_SIZE = 4096
MOST_REVIEWS = 4
"""TokenReviews at a time: anybody in the cluster can post, and a flood must not take the reconciles' connections."""
_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"


@dataclass(frozen=True)
class Sender:
    """The pod that posts, as the attempt that it belongs to."""

    namespace: str
    job_name: str
    stage: str
    attempt: int


class Senders:
    """Looks tokens up. `clock` gives seconds that never go back."""

    def __init__(self, client: Client, clock: Callable[[], float]) -> None:
        self._client = client
        self._clock = clock
        self._known: dict[str, tuple[float, Sender | None]] = {}
        self._reviews = asyncio.Semaphore(MOST_REVIEWS)

    async def find(self, token: str) -> Sender | None:
        """The sender of a valid token, None for any other; ClusterError when the API server cannot be asked."""
        key = hashlib.sha256(token.encode()).hexdigest()
        now = self._clock()
        until, sender = self._known.get(key, (0.0, None))
        if now < until:
            return sender
        async with self._reviews:
            sender = await self._review(token)
        if len(self._known) >= CACHE_SIZE:
            self._known.clear()
        self._known[key] = (now + CACHE_SECONDS, sender)
        return sender

    async def _review(self, token: str) -> Sender | None:
        review = await self._client.post(
            "/apis/authentication.k8s.io/v1/tokenreviews",
            {
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "TokenReview",
                "spec": {"token": token, "audiences": [contract.PROGRESS_AUDIENCE]},
            },
        )
        status = review.get("status") or {}
        if not status.get("authenticated") or contract.PROGRESS_AUDIENCE not in (status.get("audiences") or ()):
            return None
        user = status.get("user") or {}
        extra = user.get("extra") or {}
        parts = str(user.get("username") or "").split(":")
        name, uid = (next(iter(extra.get(field) or ()), "") for field in (_POD_NAME, _POD_UID))
        if parts[:2] != ["system", "serviceaccount"] or len(parts) != 4 or not name:
            return None
        return await self._sender(parts[2], name, uid)

    async def _sender(self, namespace: str, pod_name: str, pod_uid: str) -> Sender | None:
        pods = await self._client.list(
            "Pod", namespace, names.managed_selector(), field_selector=f"metadata.name={pod_name}"
        )
        for pod in pods:
            metadata = pod["metadata"]
            labels = metadata["labels"]
            attempt = labels.get(constants.LABEL_ATTEMPT, "")
            if metadata["uid"] == pod_uid and attempt.isdigit():
                job_name, stage = labels.get(constants.LABEL_JOB_NAME, ""), labels.get(constants.LABEL_STAGE, "")
                return Sender(namespace, job_name, stage, int(attempt))
        return None
