"""The progress endpoint with the trainer's own client, real tokens and a real TokenReview."""

from __future__ import annotations

import base64
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import kube
import kubelet
import pytest
from operator_account import Account
from operator_process import OperatorProcess, make_claim
from submitted import stage, submit, wait_for_job

from finetune_operator.api import constants
from finetune_trainer import contract
from finetune_trainer.progress import ProgressPoster


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def url() -> str:
    return f"https://localhost:{free_port()}/v1/progress"


@pytest.fixture
def operator(namespace: str, account: Account, tmp_path: Path, url: str) -> Iterator[OperatorProcess]:
    make_claim(namespace)
    kube.kubectl("create", "secret", "generic", account.tls_secret, "-n", account.namespace)
    process = OperatorProcess(
        namespace,
        tmp_path / "operator.log",
        **account.environment,
        FINETUNE_TLS_SECRET=account.tls_secret,
        FINETUNE_PROGRESS_URL=url,
        FINETUNE_PROGRESS_PORT=url.split(":")[2].split("/")[0],
    )
    process.start()
    yield process
    kube.kubectl("delete", "secret", account.tls_secret, "-n", account.namespace)
    process.stop()


def write_token(namespace: str, pod: kube.Object, path: Path, audience: str = contract.PROGRESS_AUDIENCE) -> str:
    """A token as the kubelet would mount it into the pod."""
    name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
    bound = [f"--bound-object-{key}={value}" for key, value in (("kind", "Pod"), ("name", name), ("uid", uid))]
    path.write_text(kube.kubectl("create", "token", "default", "-n", namespace, f"--audience={audience}", *bound))
    return str(path)


def ca_file(pod: kube.Object, folder: Path) -> str:
    path = folder / "ca.crt"
    path.write_text(pod["metadata"]["annotations"][constants.ANNOTATION_PROGRESS_CA])
    return str(path)


def test_what_a_training_posts_is_seen_in_the_status(
    namespace: str, account: Account, operator: OperatorProcess, url: str, tmp_path: Path
) -> None:
    submit(namespace)
    kubelet.walk(namespace, "prepare")
    pod, other = kubelet.pods(namespace, "train", 1, 2)
    for each in (pod, other):
        kubelet.run(namespace, each)
    target = {"url": url, "caPath": ca_file(pod, tmp_path)}
    sources = pod["spec"]["volumes"][0]["projected"]["sources"]
    assert {
        "serviceAccountToken": {"audience": "finetune-operator", "expirationSeconds": 3600, "path": "progress/token"}
    } in sources

    poster = ProgressPoster({**target, "tokenPath": write_token(namespace, pod, tmp_path / "token")}, min_interval=0.1)
    poster.post(
        {"step": 10, "totalSteps": 40, "loss": 2.5, "tokensPerSecond": 120.5, "secondsLeft": 65, "lastCheckpoint": 5}
    )
    job = wait_for_job(
        namespace, lambda job: job["status"].get("training", {}).get("step") == 10, reason="the posted step to be shown"
    )
    training = job["status"]["training"]
    assert (training["totalSteps"], training["loss"], training["tokensPerSecond"]) == (40, 2.5, 120.5)
    assert training["lastCheckpoint"]["step"] == 5
    assert job["status"]["eta"] == "1m05s"
    assert stage(job, "train")["state"] == "Running"

    secret = ("secret", account.tls_secret, "-n", account.namespace)
    certificate = kube.get(*secret)["data"]["ca.crt"]
    operator.restart()

    def second_post_is_shown() -> bool:
        poster.post({"step": 20, "totalSteps": 40})  # what is posted while nobody listens is dropped
        return bool(kube.get("ftj", "tiny", "-n", namespace)["status"]["training"]["step"] == 20)

    kube.eventually(second_post_is_shown, deadline=30, reason="a post to the new operator, trusted by the same CA")
    poster.close()
    assert kube.get(*secret)["data"]["ca.crt"] == certificate
    assert base64.b64decode(certificate).decode() == Path(target["caPath"]).read_text()


def test_other_tokens_and_wrong_posts_are_refused(
    namespace: str, operator: OperatorProcess, url: str, tmp_path: Path
) -> None:
    submit(namespace)
    (pod,) = kubelet.pods(namespace, "prepare", 1)
    context = ssl.create_default_context(cafile=ca_file(pod, tmp_path))

    def post(token: str, body: bytes = b'{"step": 1, "totalSteps": 2}') -> int:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(url, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, context=context, timeout=10) as answer:
                status: int = answer.status
                return status
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    good = Path(write_token(namespace, pod, tmp_path / "good")).read_text().strip()
    elsewhere = Path(write_token(namespace, pod, tmp_path / "elsewhere", audience="other")).read_text().strip()
    unbound = kube.kubectl("create", "token", "default", "-n", namespace, "--audience=finetune-operator").strip()
    assert post(good) == 204
    assert post("") == 401
    assert post("nonsense") == 403
    assert post(elsewhere) == 403
    assert post(unbound) == 403
    assert post(good, b"[]") == 400
    assert post(good, b'{"step": -1, "totalSteps": 2}') == 400
    assert post(good, b"x" * 5000) == 413
