"""What of Kueue's module is installed in the local cluster, and how it is changed on the way."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from local_cluster import kueue
from local_cluster.parts import kueue_part
from local_cluster.pki import CERTIFICATES
from local_cluster.settings import KUEUE_WEBHOOK, Settings

SETTINGS = Settings(cache=Path("/c"), state=Path("/s"), run=Path("/r"), source=Path("/tree/hack/cluster"))


def _webhook(name: str, group: str, resources: list[str]) -> dict[str, Any]:
    """A webhook as it stands in config/components/webhook/manifests.yaml of the module."""
    return {
        "name": name,
        "admissionReviewVersions": ["v1"],
        "clientConfig": {"service": {"name": "webhook-service", "namespace": "system", "path": f"/mutate-{name}"}},
        "failurePolicy": "Fail",
        "rules": [{"apiGroups": [group], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": resources}],
        "sideEffects": "None",
    }


MUTATING = {
    "apiVersion": "admissionregistration.k8s.io/v1",
    "kind": "MutatingWebhookConfiguration",
    "metadata": {"name": "mutating-webhook-configuration"},
    "webhooks": [
        _webhook("mjob.kb.io", "batch", ["jobs"]),
        _webhook("mpod.kb.io", "", ["pods"]),
        _webhook("mdeployment.kb.io", "apps", ["deployments"]),
        _webhook("mworkload.kb.io", "kueue.x-k8s.io", ["workloads", "workloads/status"]),
    ],
}
BINDING = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRoleBinding",
    "metadata": {"name": "manager-rolebinding"},
    "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "manager-role"},
    "subjects": [{"kind": "ServiceAccount", "name": "controller-manager", "namespace": "system"}],
}


def test_kueue_takes_jobs_of_a_queue_and_no_others() -> None:
    made = json.loads(kueue.configuration(SETTINGS))
    assert made["integrations"] == {"frameworks": ["batch/job"]}
    assert made["manageJobsWithoutQueueName"] is False
    assert made["internalCertManagement"] == {"enable": False}


def test_kueue_listens_on_this_machine_only() -> None:
    made = json.loads(kueue.configuration(SETTINGS))
    bound = (made["webhook"]["host"], made["metrics"]["bindAddress"], made["health"]["healthProbeBindAddress"])
    assert {address.partition(":")[0] for address in bound} == {"127.0.0.1"}


def test_a_changed_configuration_restarts_kueue() -> None:
    part = kueue_part(SETTINGS, Path("/bin/kueue"))
    assert f"--config={part.files[0]}" in part.argv
    assert part.files[0].name == "kueue.json"


def test_webhooks_are_asked_by_url_about_jobs_and_kueues_own_kinds() -> None:
    made = kueue.installed(MUTATING, "Q0E=")
    assert made["metadata"]["name"] == "kueue-mutating-webhook-configuration"
    assert [webhook["name"] for webhook in made["webhooks"]] == ["mjob.kb.io", "mworkload.kb.io"]
    assert made["webhooks"][0]["clientConfig"] == {
        "url": f"https://127.0.0.1:{KUEUE_WEBHOOK[1]}/mutate-mjob.kb.io",
        "caBundle": "Q0E=",
    }
    assert made["webhooks"][0]["failurePolicy"] == "Fail"


def test_the_certificate_is_for_the_address_in_the_webhooks_url() -> None:
    leaf = next(leaf for leaf in CERTIFICATES if leaf.name == "kueue")
    assert f"IP:{KUEUE_WEBHOOK[0]}" in leaf.names
    assert leaf.subject == f"/CN={kueue.USER}"


def test_the_role_is_bound_to_our_user_and_to_nobody_else() -> None:
    made = kueue.installed(BINDING, "")
    assert made["roleRef"]["name"] == "kueue-manager-role"
    assert made["subjects"] == [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "kueue"}]


def test_a_kind_keeps_its_name() -> None:
    crd = {"kind": "CustomResourceDefinition", "metadata": {"name": "workloads.kueue.x-k8s.io"}, "spec": {}}
    made = kueue.installed(crd, "")
    assert made["metadata"] == {"name": "workloads.kueue.x-k8s.io", "labels": kueue.LABEL}


@pytest.mark.parametrize("manifest", [MUTATING, BINDING], ids=["webhooks", "binding"])
def test_what_the_module_says_is_left_alone(manifest: dict[str, Any]) -> None:
    before = copy.deepcopy(manifest)
    kueue.installed(manifest, "Q0E=")
    assert manifest == before


def test_finalizers_are_taken_off_only_where_there_are_any() -> None:
    held = {"metadata": {"name": "a", "finalizers": ["kueue.x-k8s.io/resource-in-use"]}}
    free = {"metadata": {"name": "b"}}
    assert kueue.without_finalizers([held, free]) == [{"metadata": {"name": "a", "finalizers": []}}]


def test_a_kind_that_the_api_server_gave_up_deleting_is_told_from_one_that_goes() -> None:
    def crd(reason: str) -> dict[str, Any]:
        return {"status": {"conditions": [{"type": "Terminating", "status": "True", "reason": reason}]}}

    assert kueue.is_stuck(crd("InstanceDeletionFailed"))
    assert not kueue.is_stuck(crd("InstanceDeletionInProgress"))
    assert not kueue.is_stuck({"status": {"conditions": [{"type": "Established", "reason": "InitialNamesAccepted"}]}})
