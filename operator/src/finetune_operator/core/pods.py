"""The pod template of a stage: one container, restricted security, the workspace, stage.json and secrets as files.

Called by desired.py. Everything here satisfies the restricted Pod Security Standard; a pod gets no API token of its own
but the audience-bound one for the progress endpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
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
CONFIG_KEY = "stage.json"
CA_KEY = "ca.crt"
_CONFIG_FOLDER = PurePosixPath(contract.CONFIG_PATH).parent
_READABLE_BY_GROUP = 0o440
PROGRESS_TOKEN_SECONDS = 3600
"""Life of the token for the progress endpoint; the kubelet renews it."""


def pod_template(job: FineTuneJob, start: Start, settings: Settings, labels: Mapping[str, str]) -> dict[str, Any]:
    """The `template` of the attempt's Job."""
    stage = start.config.stage
    defaults, overrides = settings.of(stage), job.spec.stages.of(stage)
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
    selector = {**defaults.node_selector, **overrides.node_selector}
    if selector:
        spec["nodeSelector"] = selector
    tolerations = [dict(each) for each in defaults.tolerations] + [each.as_json() for each in overrides.tolerations]
    if tolerations:
        spec["tolerations"] = tolerations
    if settings.priority_class:
        spec["priorityClassName"] = settings.priority_class
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    if start.completions > 1:
        spec["subdomain"] = start.name
    return {"metadata": {"labels": dict(labels)}, "spec": spec}


def _container(job: FineTuneJob, start: Start, settings: Settings) -> dict[str, Any]:
    stage = start.config.stage
    defaults, overrides = settings.of(stage), job.spec.stages.of(stage)
    accelerator = accelerators.of(job)
    env = {
        "HOME": contract.SCRATCH_PATH,
        **accelerator.env(stage),
        **defaults.env,
        **{each.name: each.value for each in overrides.env},
    }
    requests, limits = dict(defaults.requests), dict(defaults.limits)
    if overrides.resources is not None:
        requests, limits = dict(overrides.resources.requests), dict(overrides.resources.limits)
    devices = accelerator.resources(stage)
    return {
        "name": constants.CONTAINER_NAME,
        "image": start.config.image,
        "imagePullPolicy": settings.image_pull_policy,
        "args": [stage, "--config", contract.CONFIG_PATH],
        "env": [{"name": name, "value": value} for name, value in sorted(env.items())],
        "resources": {"requests": {**requests, **devices}, "limits": {**limits, **devices}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": contract.TERMINATION_PATH,
        # A stage that dies without a report leaves the end of its log as evidence.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "config", "mountPath": str(_CONFIG_FOLDER), "readOnly": True},
            {"name": "workspace", "mountPath": contract.WORKSPACE_PATH},
            {"name": "scratch", "mountPath": contract.SCRATCH_PATH},
        ],
    }


def _sources(job: FineTuneJob, start: Start) -> list[dict[str, Any]]:
    """All below /etc/finetune in one projected volume: stage.json, secrets, the progress endpoint's token and CA."""
    items = [{"key": CONFIG_KEY, "path": PurePosixPath(contract.CONFIG_PATH).name}]
    sources: list[dict[str, Any]] = []
    if start.config.progress:
        items.append({"key": CA_KEY, "path": _below_config(start.config.progress["caPath"])})
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
    return [{"configMap": {"name": start.name, "items": items}}, *sources]


def _below_config(path: str) -> str:
    return str(PurePosixPath(path).relative_to(_CONFIG_FOLDER))
