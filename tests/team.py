"""What an end-to-end test does to a cluster as a user: a namespace with a workspace, jobs, and a look at their files.

Used by tests/e2e; kube.py has the client underneath.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kube
from reports import report_of

ROOT = Path(__file__).resolve().parents[1]
CLAIM = "workspace"
LOCAL = os.environ.get("CLUSTER", "local") == "local"


@dataclass(frozen=True)
class Team:
    """A namespace with a workspace, as a user of the product has it."""

    namespace: str
    trainer_image: str

    def toolbox(self, script: str, *args: str) -> str:
        """Run a Python script in the toolbox pod, the workspace at /workspace; its standard output."""
        return kube.kubectl(
            "exec", "-i", "-n", self.namespace, "toolbox", "--", "python3", "-", *args, stdin=script, timeout=180
        )

    def write(self, path: str, text: str) -> None:
        """Write a file of the workspace; `path` is relative to it."""
        self.toolbox(
            "import pathlib, sys\n"
            f"path = pathlib.Path('/workspace') / {path!r}\n"
            "path.parent.mkdir(parents=True, exist_ok=True)\n"
            f"path.write_text({text!r}, encoding='utf-8')\n"
        )

    def list_files(self, pattern: str) -> list[str]:
        """Workspace-relative paths that match a glob."""
        return json.loads(  # type: ignore[no-any-return]
            self.toolbox(
                "import json, pathlib\n"
                "root = pathlib.Path('/workspace')\n"
                f"print(json.dumps(sorted(str(p.relative_to(root)) for p in root.glob({pattern!r}))))\n"
            )
        )

    def apply(self, job: dict[str, Any]) -> None:
        kube.apply(job)

    def job(self, name: str) -> dict[str, Any]:
        return kube.get("finetunejob", name, "-n", self.namespace)

    def k8s_jobs(self, name: str) -> list[dict[str, Any]]:
        """The batch/v1 Jobs of a FineTuneJob, oldest first."""
        found = kube.items("jobs", "-n", self.namespace, "-l", f"finetune-operator.io/job-name={name}")
        return sorted(found, key=lambda item: item["metadata"]["creationTimestamp"])

    def wait(self, name: str, until: Any, deadline: float, reason: str, unless: Any = lambda _: None) -> dict[str, Any]:
        return kube.wait_for(
            "finetunejob", name, "-n", self.namespace, until=until, deadline=deadline, reason=reason, unless=unless
        )


def condition(job: dict[str, Any], kind: str) -> dict[str, Any]:
    """The condition of that type, or an empty object."""
    conditions = job.get("status", {}).get("conditions", [])
    return next((c for c in conditions if c["type"] == kind), {})


def succeeded(job: dict[str, Any]) -> bool:
    return condition(job, "Succeeded").get("status") == "True"


def failed(job: dict[str, Any]) -> str | None:
    """Why the job failed, or None while it has not."""
    found = condition(job, "Succeeded")
    return f"the job failed: {found['reason']}: {found['message']}" if found.get("status") == "False" else None


def stage(job: dict[str, Any], name: str) -> dict[str, Any]:
    """The entry of status.stages, or an empty object."""
    return next((s for s in job.get("status", {}).get("stages", []) if s["name"] == name), {})


def training_pods(team: Team, name: str) -> list[dict[str, Any]]:
    """The training pods of a FineTuneJob that are there, of whatever attempt, by rank within it."""
    labels = f"finetune-operator.io/job-name={name},finetune-operator.io/stage=train"
    found = kube.items("pods", "-n", team.namespace, "-l", labels)
    return sorted(
        found, key=lambda pod: int(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"])
    )


def stage_metrics(team: Team, name: str, stage_name: str, attempt: int = 1) -> dict[str, Any]:
    """What an attempt of a stage that came to a good end has reported of itself."""
    return report_of(team.k8s_jobs(name), stage_name, attempt)["metrics"]  # type: ignore[no-any-return]


def training_metrics(team: Team, name: str, attempt: int) -> dict[str, Any]:
    """What an attempt of train that came to a good end has reported of itself."""
    return stage_metrics(team, name, "train", attempt)


def logged_steps(team: Team, job: dict[str, Any]) -> list[int]:
    """The steps in train's log, which has a line for each that was kept, and others for held-out losses."""
    path = stage(job, "train")["artifact"]["path"] + "/training.jsonl"
    lines = team.toolbox(f"print(open('/workspace/{path}').read())").splitlines()
    found = [json.loads(line) for line in lines if line]
    return [line["step"] for line in found if "loss" in line]


STAGES = ["prepare", "train", "consolidate", "merge", "evaluate"]
"""The stages of tiny_job."""

RECORDS = [
    {"instruction": f"What is the number after {i}?", "context": "", "response": f"It is {i + 1}.", "category": "qa"}
    for i in range(40)
]
"""A data set in dolly's schema, small enough that an epoch takes a second."""


def records_text(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def tiny_job(team: Team, name: str, **spec: Any) -> dict[str, Any]:
    """A FineTuneJob of the tiny model on two training pods; keywords replace fields of its spec."""
    return {
        "apiVersion": "finetune-operator.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": team.namespace},
        "spec": {
            "model": {"source": "workspace:///sources/tiny"},
            "dataset": {
                "source": "workspace:///sources/records.jsonl",
                "format": "dolly",
                "maxLength": 64,
                "packing": "none",
                "validationPercent": 10,
            },
            "method": {"type": "lora", "lora": {"rank": 4, "alpha": 8, "targetModules": ["q_proj", "v_proj"]}},
            "training": TRAINING,
            "accelerator": {"type": "cpu", "nodes": 2},
            "workspace": {"claimName": CLAIM},
            "evaluate": {
                "prompts": [{"text": "What is the number after 7?", "expected": "It is 8."}],
                "maxNewTokens": 64,
            },
            "retryPolicy": {"maxRetries": 3},
            **spec,
        },
    }


TRAINING = {
    "maxSteps": 10,
    "learningRate": 0.01,
    "warmupSteps": 0,
    "microBatchSize": 4,
    "gradientAccumulationSteps": 1,
    "precision": "fp32",
    "seed": 7,
    "checkpointEverySteps": 5,
    "keepCheckpoints": 2,
}


def make_sources(team: Team) -> None:
    """The tiny model and its data set, in the workspace."""
    team.toolbox((ROOT / "tests" / "tiny_model.py").read_text(), "/workspace/sources/tiny")
    team.write("sources/records.jsonl", records_text(RECORDS))


def workspace_manifests(namespace: str) -> str:
    """A volume and claim: a folder of the node on the local cluster, WORKSPACE_STORAGE_CLASS on an existing one."""
    if LOCAL:
        command = ["python3", "hack/cluster/cluster.py", "workspace-pvc", "--namespace", namespace, "--name", CLAIM]
        return subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout
    spec: dict[str, Any] = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "5Gi"}}}
    if name := os.environ.get("WORKSPACE_STORAGE_CLASS"):
        spec["storageClassName"] = name
    metadata = {"name": CLAIM, "namespace": namespace}
    return json.dumps({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec})


def remove_namespace(namespace: str, claim: str) -> None:
    """Delete the namespace, and on the local cluster its volume and folder, which nothing else removes."""
    kube.kubectl("delete", "namespace", namespace, "--wait=false", "--ignore-not-found")
    if LOCAL:
        volume = f"{namespace}-{claim}"
        kube.kubectl("delete", "pv", volume, "--wait=false", "--ignore-not-found")
        shutil.rmtree(Path(os.environ["CLUSTER_WORKSPACE"]) / volume, ignore_errors=True)


def toolbox_pod(namespace: str, image: str) -> dict[str, Any]:
    """A pod that waits, with the workspace mounted, under the same restrictions as a stage's."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "toolbox", "namespace": namespace},
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "runAsGroup": 65532,
                "fsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "toolbox",
                    "image": image,
                    "imagePullPolicy": "Never" if LOCAL else "IfNotPresent",
                    "command": ["python3", "-c", "import signal; signal.pause()"],
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [
                        {"name": "workspace", "mountPath": "/workspace"},
                        {"name": "scratch", "mountPath": "/tmp"},
                    ],
                }
            ],
            "volumes": [
                {"name": "workspace", "persistentVolumeClaim": {"claimName": CLAIM}},
                {"name": "scratch", "emptyDir": {}},
            ],
        },
    }
