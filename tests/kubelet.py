"""The kubelet's part, played by a test: pods that no node takes get the status that a kubelet would report for them.

Contract tests give every stage a node selector that no node has. Scheduler, Job controller and garbage collector are
real.
"""

from __future__ import annotations

import json
import time
from typing import Any

import kube

from finetune_operator.api import constants
from finetune_trainer import contract

NOWHERE = {"no-such-node": "true"}
STAGES = ("prepare", "train", "consolidate", "merge", "evaluate")
OVERRIDES = {stage: {"nodeSelector": NOWHERE} for stage in STAGES}
"""spec.stages of a job whose pods stay unscheduled."""

METRICS: dict[str, dict[str, Any]] = {
    "train": {"step": 40, "totalSteps": 40, "loss": 0.25, "tokensPerSecond": 120.5, "trainableParameters": 4096},
    "evaluate": {
        "baseLoss": 5.0,
        "tunedLoss": 0.5,
        "prompts": [{"prompt": "What is a node?", "expected": "A machine.", "base": "??", "tuned": "A machine."}],
    },
}


def selector(stage: str, attempt: int | None = None) -> str:
    chosen = f"{constants.LABEL_STAGE}={stage}"
    return chosen if attempt is None else f"{chosen},{constants.LABEL_ATTEMPT}={attempt}"


def pods(namespace: str, stage: str, attempt: int, count: int = 1, *, deadline: float = 30) -> list[kube.Object]:
    """The pods of an attempt once there are `count` of them."""

    def found() -> list[kube.Object]:
        present = kube.items("pods", "-n", namespace, "-l", selector(stage, attempt))
        return present if len(present) >= count else []

    found_pods: list[kube.Object] = kube.eventually(
        found, deadline=deadline, reason=f"{count} pods of {stage}, attempt {attempt}"
    )
    return found_pods


def report(namespace: str, pod: kube.Object, *, reused: bool = False) -> str:
    """The termination message of a stage that did its work, as its stage.json asks for it."""
    labels = pod["metadata"]["labels"]
    stage = labels[constants.LABEL_STAGE]
    config = json.loads(pod["metadata"]["annotations"][constants.ANNOTATION_STAGE_JSON])
    artifacts = {stage: contract.ArtifactRef(config["output"], contract.digest_of([stage, config["output"]]))}
    if stage == contract.PREPARE:
        artifacts["model"] = contract.ArtifactRef("finetune/models/tiny", contract.digest_of("model"))
    done = contract.Report(
        stage=stage,
        exit_code=0,
        artifacts=artifacts,
        metrics=METRICS.get(stage, {}),
        reused=reused,
    )
    return contract.encode_report(done).decode()


def bind(namespace: str, pod: kube.Object, node: str = "no-such-node") -> None:
    """The scheduler's part: the pod is given a node. One that does not exist leaves the kubelet's part to the test."""
    name = pod["metadata"]["name"]
    binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": {"name": node}}
    path = f"/api/v1/namespaces/{namespace}/pods/{name}/binding"
    kube.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(binding))


def hold(namespace: str, pod: kube.Object, reason: str, message: str = "") -> None:
    """The pod's container waits, for that reason."""
    _patch(namespace, pod, "Pending", {"waiting": {"reason": reason, "message": message}})


def warn(namespace: str, pod: kube.Object, reason: str, message: str) -> None:
    """A warning event about the pod, as a kubelet posts it."""
    about = {key: pod["metadata"][key] for key in ("name", "uid")}
    event = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{about['name']}.", "namespace": namespace},
        "involvedObject": {"apiVersion": "v1", "kind": "Pod", "namespace": namespace, **about},
        "reason": reason,
        "message": message,
        "type": "Warning",
        "source": {"component": "kubelet"},
        "firstTimestamp": _now(),
        "lastTimestamp": _now(),
        "count": 1,
    }
    kube.kubectl("create", "-f", "-", stdin=json.dumps(event))


def run(namespace: str, pod: kube.Object) -> None:
    """The pod's container runs."""
    _patch(namespace, pod, "Running", {"running": {"startedAt": _now()}})


def end(namespace: str, pod: kube.Object, code: int = 0, message: str | None = None, reason: str = "") -> None:
    """The pod's container ends; by default well and with its report."""
    if message is None:
        message = report(namespace, pod) if code == 0 else ""
    terminated = {
        "exitCode": code,
        "reason": reason or ("Completed" if code == 0 else "Error"),
        "message": message,
        "startedAt": _now(),
        "finishedAt": _now(),
    }
    _patch(namespace, pod, "Succeeded" if code == 0 else "Failed", {"terminated": terminated})


def remove(namespace: str, *pods: kube.Object) -> None:
    """What a kubelet does at last with pods that were deleted and whose containers have ended."""
    names = [pod["metadata"]["name"] for pod in pods]
    kube.kubectl(
        "delete", "pod", *names, "-n", namespace, "--grace-period=0", "--force", "--wait=false", "--ignore-not-found"
    )


def failure(stage: str, code: contract.ExitCode, reason: str, message: str) -> str:
    """The termination message of a stage that failed."""
    return contract.encode_report(contract.Report(stage=stage, exit_code=code, reason=reason, message=message)).decode()


def walk(namespace: str, *stages: str, attempt: int = 1, nodes: int = 2) -> None:
    """Let each of `stages` run and end well."""
    for stage in stages:
        for pod in pods(namespace, stage, attempt, nodes if stage == contract.TRAIN else 1):
            end(namespace, pod)


def _patch(namespace: str, pod: kube.Object, phase: str, state: dict[str, Any]) -> None:
    container = {
        "name": constants.CONTAINER_NAME,
        "image": "stage",
        "imageID": "",
        "ready": False,
        "restartCount": 0,
        "state": state,
    }
    status = {"phase": phase, "containerStatuses": [container]}
    patch = json.dumps({"status": status})
    name = pod["metadata"]["name"]
    kube.kubectl("patch", "pod", name, "-n", namespace, "--subresource=status", "--type=merge", "-p", patch)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
