"""Progress of a training, posted by a test in place of the training: with the trainer's own client and real tokens."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import kube
from operator_account import Account

from finetune_operator.api import constants
from finetune_trainer import contract
from finetune_trainer.progress import ProgressPoster


@contextmanager
def endpoint(account: Account) -> Iterator[dict[str, str]]:
    """The environment of an operator that serves the progress endpoint, with the Secret for its certificate."""
    secret = ("secret", account.tls_secret, "-n", account.namespace)
    kube.kubectl("create", "secret", "generic", *secret[1:])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        yield {
            "FINETUNE_TLS_SECRET": account.tls_secret,
            "FINETUNE_PROGRESS_URL": f"https://localhost:{port}/v1/progress",
            "FINETUNE_PROGRESS_PORT": str(port),
        }
    finally:
        kube.kubectl("delete", *secret)


def write_token(namespace: str, pod: kube.Object, path: Path, audience: str = contract.PROGRESS_AUDIENCE) -> str:
    """A token as the kubelet would mount it into the pod."""
    name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
    bound = [f"--bound-object-{key}={value}" for key, value in (("kind", "Pod"), ("name", name), ("uid", uid))]
    path.write_text(kube.kubectl("create", "token", "default", "-n", namespace, f"--audience={audience}", *bound))
    return str(path)


def ca_file(pod: kube.Object, folder: Path) -> str:
    """What the pod trusts the endpoint by, as a file."""
    path = folder / "ca.crt"
    path.write_text(pod["metadata"]["annotations"][constants.ANNOTATION_PROGRESS_CA])
    return str(path)


@contextmanager
def poster(url: str, namespace: str, pod: kube.Object, folder: Path) -> Iterator[ProgressPoster]:
    """Posts as the stage in that pod does. Files go into `folder`, which every pod needs for itself."""
    folder.mkdir()
    token = write_token(namespace, pod, folder / "token")
    made = ProgressPoster({"url": url, "caPath": ca_file(pod, folder), "tokenPath": token}, min_interval=0.1)
    try:
        yield made
    finally:
        made.close()
