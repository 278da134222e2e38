"""The pod template of a stage: one container, restricted security, the workspace, stage.json and secrets as files.

Called by desired.py. Everything here satisfies the restricted Pod Security Standard; a pod gets no API token of its own
but the audience-bound one for the progress endpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from finetune_operator.api import constants
from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.core import accelerators
from finetune_operator.core.inputs import Start, secret_references
from finetune_operator.core.settings import Settings
from finetune_trainer import contract

USER_ID = 65532
"""Numeric user and group of every stage; the workspace's files belong to this group."""
_CONFIG_FOLDER = PurePosixPath(contract.CONFIG_PATH).parent
_READABLE_BY_GROUP = 0o440
PROGRESS_TOKEN_SECONDS = 3600
"""Life of the token for the progress endpoint; the kubelet renews it."""


@dataclass(frozen=True)
class Placement:
    """Where the pods of an attempt may run, beside what the stage's own settings say.

    `affinity` is a Kubernetes nodeAffinity; selector and tolerations are those of a queue's reservation.
    """

    affinity: Mapping[str, Any] | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()


def pod_template(
    job: FineTuneJob, start: Start, settings: Settings, labels: Mapping[str, str], placement: Placement
) -> dict[str, Any]:
    """The `template` of the attempt's Job. stage.json is one of its annotations: Job and config are one object."""
    stage = start.config.stage
    defaults, overrides = settings.of(stage), job.spec.stages.of(stage)
    accelerator = accelerators.of(job, settings.instance_types, start.device_resource)
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": defaults.termination_grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(job, start, settings)],
        "volumes": [
            {"name": "config", "projected": {"defaultMode": _READABLE_BY_GROUP, "sources": _sources(job, start)}},
            {"name": "workspace", "persistentVolumeClaim": {"claimName": job.spec.workspace.claim_name}},
            {"name": "scratch", "emptyDir": {}},
        ],
    }
    shared_memory = accelerator.shared_memory(stage)
    if shared_memory is not None:
        # The runtime's 64 MiB of /dev/shm are too small for collectives between the processes of a node.
        spec["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}})
    selector = {
        **accelerator.node_selector(stage),
        **placement.node_selector,
        **defaults.node_selector,
        **overrides.node_selector,
    }
    if selector:
        spec["nodeSelector"] = selector
    tolerations = [
        *(dict(each) for each in accelerator.tolerations(stage)),
        *(dict(each) for each in placement.tolerations),
        *(dict(each) for each in defaults.tolerations),
        *(each.as_json() for each in overrides.tolerations),
    ]
    if tolerations:
        spec["tolerations"] = [each for n, each in enumerate(tolerations) if each not in tolerations[:n]]
    if placement.affinity is not None:
        spec["affinity"] = {"nodeAffinity": dict(placement.affinity)}
    if stage == contract.PUBLISH and job.spec.publish is not None and job.spec.publish.service_account_name:
        spec["serviceAccountName"] = job.spec.publish.service_account_name
    if settings.priority_class:
        spec["priorityClassName"] = settings.priority_class
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    if start.completions > 1:
        spec["subdomain"] = start.name
    annotations = {constants.ANNOTATION_STAGE_JSON: contract.canonical_json(start.config.as_json()).decode()}
    if settings.progress is not None:
        annotations[constants.ANNOTATION_PROGRESS_CA] = settings.progress.ca_certificate
    return {"metadata": {"labels": dict(labels), "annotations": annotations}, "spec": spec}


def _container(job: FineTuneJob, start: Start, settings: Settings) -> dict[str, Any]:
    stage = start.config.stage
    accelerator = accelerators.of(job, settings.instance_types, start.device_resource)
    env = container_env(job, stage, settings)
    requests, limits = container_resources(job, stage, settings, start.device_resource)
    mounts = [
        {"name": "config", "mountPath": str(_CONFIG_FOLDER), "readOnly": True},
        {"name": "workspace", "mountPath": contract.WORKSPACE_PATH},
        {"name": "scratch", "mountPath": contract.SCRATCH_PATH},
    ]
    if accelerator.shared_memory(stage) is not None:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    return {
        "name": constants.CONTAINER_NAME,
        "image": start.config.image,
        "imagePullPolicy": settings.image_pull_policy,
        "args": [stage, "--config", contract.CONFIG_PATH],
        "env": [{"name": name, "value": value} for name, value in sorted(env.items())],
        "resources": {"requests": requests, "limits": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": contract.TERMINATION_PATH,
        # A stage that dies without a report leaves the end of its log as evidence.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }


def container_env(job: FineTuneJob, stage: str, settings: Settings) -> dict[str, str]:
    """Variables of the stage's container: the accelerator's, over them the installation's, over them the spec's."""
    return {
        "HOME": contract.SCRATCH_PATH,
        **accelerators.of(job, settings.instance_types).env(stage),
        **settings.of(stage).env,
        **{each.name: each.value for each in job.spec.stages.of(stage).env},
    }


def container_resources(
    job: FineTuneJob, stage: str, settings: Settings, device_resource: str | None
) -> tuple[dict[str, str], dict[str, str]]:
    """(requests, limits) of the stage's container: the installation's, in their place the spec's, and the devices."""
    defaults, overrides = settings.of(stage), job.spec.stages.of(stage)
    requests, limits = dict(defaults.requests), dict(defaults.limits)
    accelerator = accelerators.of(job, settings.instance_types, device_resource)
    # Devices cannot be had in part, and cpu and memory of an accelerator's node are there for its one pod.
    devices, node = accelerator.resources(stage), accelerator.requests(stage)
    requests, limits = {**requests, **node}, {**limits, **{key: node[key] for key in node if key in limits}}
    if overrides.resources is not None:
        requests, limits = dict(overrides.resources.requests), dict(overrides.resources.limits)
    return {**requests, **devices}, {**limits, **devices}


def _sources(job: FineTuneJob, start: Start) -> list[dict[str, Any]]:
    """All below /etc/finetune in one projected volume: stage.json, secrets, the progress endpoint's token and CA."""
    items = [_annotation(constants.ANNOTATION_STAGE_JSON, PurePosixPath(contract.CONFIG_PATH).name)]
    sources: list[dict[str, Any]] = []
    if start.config.progress:
        items.append(_annotation(constants.ANNOTATION_PROGRESS_CA, _below_config(start.config.progress["caPath"])))
        token = {
            "audience": contract.PROGRESS_AUDIENCE,
            "expirationSeconds": PROGRESS_TOKEN_SECONDS,
            "path": _below_config(start.config.progress["tokenPath"]),
        }
        sources.append({"serviceAccountToken": token})
    references = secret_references(job)
    for key, path in start.config.secrets.items():
        name, secret_key = references[key]
        sources.append({"secret": {"name": name, "items": [{"key": secret_key, "path": _below_config(path)}]}})
    return [{"downwardAPI": {"items": items}}, *sources]


def _annotation(name: str, path: str) -> dict[str, Any]:
    return {"path": path, "fieldRef": {"apiVersion": "v1", "fieldPath": f"metadata.annotations['{name}']"}}


def _below_config(path: str) -> str:
    return str(PurePosixPath(path).relative_to(_CONFIG_FOLDER))
