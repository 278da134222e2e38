"""The progress endpoint with the trainer's own client, real tokens and a real TokenReview."""

from __future__ import annotations

import base64
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
from posts import ca_file, write_token
from submitted import stage, submit, wait_for_job

from finetune_trainer.progress import ProgressPoster


@pytest.fixture
def url(endpoint: dict[str, str]) -> str:
    return endpoint["FINETUNE_PROGRESS_URL"]


@pytest.fixture
def operator(namespace: str, account: Account, tmp_path: Path, endpoint: dict[str, str]) -> Iterator[OperatorProcess]:
    make_claim(namespace)
    process = OperatorProcess(namespace, tmp_path / "operator.log", **account.environment, **endpoint)
    process.start()
    yield process
    process.stop()


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
        namespace,
        lambda job: job.get("status", {}).get("training", {}).get("step") == 10,
        reason="the posted step to be shown",
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
