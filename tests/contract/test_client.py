"""kubectl finetune against a real API server and the operator under test, as people with the chart's own roles.

The client runs with a kubeconfig whose token may do what the chart's roles for people allow in one namespace, so a
right that a command needs and the role lacks makes a test fail. The test plays the kubelet.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import kube
import kubelet
import operator_account
import pytest
from builders import job_manifest
from job_specs import job_spec
from kubelet import STAGES
from operator_process import OperatorProcess

from finetune_client import FineTuneClient, Forbidden, JobExists, JobFailed, JobNotFound, NothingToRetry, SpecError
from finetune_client.commands import run
from finetune_client.errors import Exit
from finetune_trainer.contract import ExitCode

PATIENCE_SECONDS = 60.0
CHART_ROLES = {"view": ("view",), "edit": ("view", "edit")}
"""What the chart adds to Kubernetes' own roles of these names."""

Person = Callable[[str], Path]


@pytest.fixture
def person(namespace: str, tmp_path: Path) -> Iterator[Person]:
    """Makes a user with the chart's part of the role `view` or `edit` in the test's namespace; the kubeconfig."""
    made: list[str] = []

    def make(role: str) -> Path:
        kube.kubectl("create", "serviceaccount", role, "-n", namespace)
        for part in CHART_ROLES[role]:
            name = f"{namespace}-{part}"
            if name not in made:
                kube.apply(_role(namespace, part, name))
                made.append(name)
            binding = ("rolebinding", f"{role}-{part}", f"--clusterrole={name}", f"--serviceaccount={namespace}:{role}")
            kube.kubectl("create", *binding, "-n", namespace)
        token = kube.kubectl("create", "token", role, "-n", namespace, "--duration=1h").strip()
        config = operator_account.kubeconfig_of(token)
        config["contexts"][0]["context"]["namespace"] = namespace
        path = tmp_path / f"{role}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(json.dumps(config))
        asked = ("auth", "can-i", "list", "finetunejobs", "-n", namespace, "--kubeconfig", str(path))
        kube.eventually(
            lambda: kube.kubectl(*asked, check=False).strip() == "yes", deadline=30, reason="the roles to be in force"
        )
        return path

    yield make
    for name in made:
        kube.kubectl("delete", "clusterrole", name, "--ignore-not-found")


def _role(namespace: str, part: str, name: str) -> kube.Object:
    """The chart's role for people, under a name of the test's and without the labels that would spread it."""
    (role,) = (
        each
        for each in operator_account.render(f"{namespace}-finetune-operator", namespace)
        if each["kind"] == "ClusterRole" and each["metadata"]["name"].endswith(f"-{part}")
    )
    return {**role, "metadata": {"name": name}}


@pytest.fixture
def client(person: Person) -> FineTuneClient:
    return FineTuneClient(kubeconfig=person("edit"))


def fail_train(namespace: str, attempt: int) -> None:
    message = kubelet.failure("train", ExitCode.OUT_OF_DEVICE_MEMORY, "OutOfDeviceMemory", "2 GiB more were asked for")
    pods = kubelet.pods(namespace, "train", attempt, 2)
    kubelet.end(namespace, pods[0], ExitCode.OUT_OF_DEVICE_MEMORY, message)
    kubelet.remove(namespace, *pods[1:])


def test_a_person_submits_follows_and_understands_a_job(
    namespace: str, operator: OperatorProcess, client: FineTuneClient, capsys: pytest.CaptureFixture[str]
) -> None:
    made = client.submit(job_manifest(stages=kubelet.OVERRIDES))
    assert (made.namespace, made.name) == (namespace, "tiny")
    seen: list[str] = []

    def follow() -> None:
        seen.extend(job.status.stage or "" for job in client.watch("tiny", timeout=PATIENCE_SECONDS))

    follower = threading.Thread(target=follow)
    follower.start()
    kubelet.walk(namespace, *STAGES)
    done = client.wait("tiny", timeout=PATIENCE_SECONDS)
    follower.join(PATIENCE_SECONDS)
    assert done.succeeded
    assert seen[-1] == "5/5 evaluate"
    found = client.report("tiny")
    assert set(found.artifacts) >= {"adapter", "model", "evaluation", "prepare", "train"}
    assert found.folder == f"finetune/jobs/{namespace}/tiny"
    assert [job.name for job in client.list()] == ["tiny"]
    with pytest.raises(NothingToRetry, match="has not failed"):
        client.retry("tiny")
    client.delete("tiny", wait=PATIENCE_SECONDS)
    with pytest.raises(JobNotFound):
        client.get("tiny")


def test_a_failed_job_is_explained_and_tried_again_from_the_stage_that_failed(
    namespace: str, operator: OperatorProcess, person: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(person("edit"))
    client = FineTuneClient(kubeconfig=config)
    client.submit(job_manifest(stages=kubelet.OVERRIDES))
    kubelet.walk(namespace, "prepare")
    fail_train(namespace, 1)
    with pytest.raises(JobFailed, match="OutOfDeviceMemory"):
        client.wait("tiny", timeout=PATIENCE_SECONDS)
    assert run(["why", "tiny", "--kubeconfig", config]) == Exit.JOB_FAILED
    told = capsys.readouterr().out
    assert "Stage train of tiny failed: OutOfDeviceMemory" in told
    assert "training.microBatchSize" in told

    assert run(["retry", "tiny", "--from", "train", "--kubeconfig", config]) == Exit.OK
    kubelet.pods(namespace, "train", 2, 2)
    kubelet.walk(namespace, "train", attempt=2)
    kubelet.walk(namespace, "consolidate", "merge", "evaluate")
    assert client.wait("tiny", timeout=PATIENCE_SECONDS).succeeded
    prepare = kube.items("jobs", "-n", namespace, "-l", kubelet.selector("prepare"))
    assert len(prepare) == 1, "what was complete is not run again"


def test_suspending_and_resuming(namespace: str, operator: OperatorProcess, client: FineTuneClient) -> None:
    client.submit(job_manifest(stages=kubelet.OVERRIDES))
    pods = kubelet.pods(namespace, "prepare", 1)
    client.suspend("tiny")
    kubelet.remove(namespace, *pods)
    assert client.suspend("tiny", wait=PATIENCE_SECONDS).phase == "Suspended"
    client.resume("tiny")
    kubelet.pods(namespace, "prepare", 2)


def test_a_plan_is_the_operators_and_leaves_nothing(
    namespace: str, operator: OperatorProcess, client: FineTuneClient
) -> None:
    job = client.plan(job_manifest(stages=kubelet.OVERRIDES), timeout=PATIENCE_SECONDS)
    assert job.status.plan is not None
    assert [stage.name for stage in job.status.plan.stages] == list(STAGES)
    kube.eventually(lambda: not kube.items("ftj", "-n", namespace), deadline=30, reason="the dry run to be gone")
    assert kube.items("jobs", "-n", namespace) == []


def test_whoever_may_look_can_look_and_not_change(
    namespace: str, operator: OperatorProcess, person: Person, client: FineTuneClient
) -> None:
    client.submit(job_manifest(stages=kubelet.OVERRIDES))
    (pod,) = kubelet.pods(namespace, "prepare", 1)
    looker = FineTuneClient(kubeconfig=person("view"))
    assert looker.get("tiny").name == "tiny"
    assert list(looker.logs("tiny")) == [], "the pod has no log yet"
    assert pod["metadata"]["namespace"] == namespace
    for change in (looker.suspend, looker.resume, looker.delete):
        with pytest.raises(Forbidden, match="finetune-operator-edit"):
            change("tiny")
    with pytest.raises(Forbidden, match="cannot list"):
        looker.list(all_namespaces=True)


def test_the_servers_own_refusal_is_told_in_its_words(namespace: str, client: FineTuneClient) -> None:
    with pytest.raises(SpecError, match="spec.dataset.maxLength"):
        client.submit({"metadata": {"name": "tiny"}, "spec": job_spec(dataset={"maxLength": 3})})
    made = client.submit(job_manifest(), dry_run=True)
    assert made.spec.training.max_steps == 40
    assert list(client.list()) == []
    client.submit(job_manifest())
    with pytest.raises(JobExists, match="delete it, choose another name"):
        client.submit(job_manifest())
