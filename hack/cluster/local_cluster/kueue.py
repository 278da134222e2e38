"""Kueue, the queue that HyperPod's task governance runs, as a process of this machine. Optional: `cluster.py kueue`.

From its module come the CRDs, the role of its controller and its webhooks (`config/components`); everything else of
its installation is for a Kueue that runs in a pod. Two things differ from it there: the API server reaches the
webhooks by URL with a certificate of the cluster's authority, and the role is bound to a user with a certificate.

Kueue is wanted from `start` until `stop`, of which its configuration file is the mark: `up` starts it again after a
crash, since no Job can be created or changed while its webhooks are registered and nobody answers them.
"""

import base64
import json
from collections.abc import Iterable
from pathlib import Path

from . import binaries, config, kubectl, leftovers, probes, processes, supervise
from .kubectl import Manifest
from .parts import kueue_part
from .problem import ClusterProblem
from .settings import KUEUE_HEALTH, KUEUE_METRICS, KUEUE_WEBHOOK, Settings
from .terminal import Progress, say

NAME = "kueue"
USER = "kueue"  # the subject of its client certificate, see pki.py
LABEL = {"finetune-cluster/add-on": NAME}
_SELECTOR = "finetune-cluster/add-on=kueue"
_PREFIX = "kueue-"  # that Kueue's own installation puts before the names in its module
# What is taken from config/components of the module.
_MANIFESTS = ("crd/bases", "webhook/manifests.yaml")
_ROLES = ("role", "role_binding", "metrics_auth_role", "metrics_auth_role_binding")
_WEBHOOK_KINDS = ("MutatingWebhookConfiguration", "ValidatingWebhookConfiguration")
_LOOK_AGAIN = "finetune-cluster/look-again"
_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


def configuration(settings: Settings) -> str:
    """Kueue's Configuration: batch Jobs with a queue label and nothing else. JSON, which is YAML too."""
    return json.dumps(
        {
            "apiVersion": "config.kueue.x-k8s.io/v1beta1",
            "kind": "Configuration",
            "namespace": "kueue-system",
            # A Job without a queue label is none of Kueue's business: other tests share the cluster.
            "manageJobsWithoutQueueName": False,
            "integrations": {"frameworks": ["batch/job"]},
            "webhook": {
                "host": KUEUE_WEBHOOK[0],
                "port": KUEUE_WEBHOOK[1],
                "certDir": str(certificate_folder(settings)),
            },
            "metrics": {"bindAddress": _address(KUEUE_METRICS)},
            "health": {"healthProbeBindAddress": _address(KUEUE_HEALTH)},
            # It would write its certificate into a Secret that only a pod can mount.
            "internalCertManagement": {"enable": False},
            "leaderElection": {"leaderElect": False},  # there is one
            # The figures of the module's own installation; the library's defaults are 20 and 30.
            "clientConnection": {"qps": 50, "burst": 100},
            "controller": {"groupKindConcurrency": {"Job.batch": 5, "Workload.kueue.x-k8s.io": 5}},
            # An aggregated API server for pending workloads, which wants port 8082 and an APIService.
            "featureGates": {"VisibilityOnDemand": False},
        },
        indent=1,
    )


def _address(place: tuple[str, int]) -> str:
    return f"{place[0]}:{place[1]}"


def certificate_folder(settings: Settings) -> Path:
    """Links named as controller-runtime wants them, to the certificate and key that pki.py made."""
    return settings.config / "kueue-certificates"


def is_ours_to_ask(webhook: Manifest) -> bool:
    """Whether a webhook of the module is registered: Kueue's own kinds and batch Jobs. Pure.

    The others are for integrations that are off. They would be asked all the same, about every pod among others, and
    answer yes.
    """
    return all(
        rule["apiGroups"] == ["kueue.x-k8s.io"] or (rule["apiGroups"] == ["batch"] and rule["resources"] == ["jobs"])
        for rule in webhook["rules"]
    )


def installed(manifest: Manifest, ca_bundle: str) -> Manifest:
    """An object of the module as it is applied here. Pure; the argument is left alone.

    Named as Kueue's own installation names it and labelled, so that `stop` finds it. Webhooks are those of
    `is_ours_to_ask`, by URL and with `ca_bundle` (base64); a role is bound to our user.
    """
    custom_kind = manifest["kind"] == "CustomResourceDefinition"
    name = manifest["metadata"]["name"]
    metadata = {**manifest["metadata"], "name": name if custom_kind else _PREFIX + name}
    metadata["labels"] = {**metadata.get("labels", {}), **LABEL}
    changed = {**manifest, "metadata": metadata}
    if manifest["kind"] in _WEBHOOK_KINDS:
        changed["webhooks"] = [
            _by_url(webhook, ca_bundle) for webhook in manifest["webhooks"] if is_ours_to_ask(webhook)
        ]
    if manifest["kind"] == "ClusterRoleBinding":
        group = "rbac.authorization.k8s.io"
        changed["subjects"] = [{"apiGroup": group, "kind": "User", "name": USER}]
        changed["roleRef"] = {**manifest["roleRef"], "name": _PREFIX + manifest["roleRef"]["name"]}
    return changed


def _by_url(webhook: Manifest, ca_bundle: str) -> Manifest:
    path = webhook["clientConfig"]["service"]["path"]
    return {**webhook, "clientConfig": {"url": f"https://{_address(KUEUE_WEBHOOK)}{path}", "caBundle": ca_bundle}}


def without_finalizers(objects: Iterable[Manifest]) -> list[Manifest]:
    """Those that have finalizers, without them. Pure."""
    return [
        {**item, "metadata": {**item["metadata"], "finalizers": []}}
        for item in objects
        if item["metadata"].get("finalizers")
    ]


def is_stuck(crd: Manifest) -> bool:
    """Whether the API server has given up deleting a kind's objects, as it does soon after the kind was made. Pure.

    Its finalizer's second try comes with the kind as it was before the first one ("storage is (re)initializing"), is
    refused for that, and no other follows until something else changes of the kind.
    """
    conditions = crd.get("status", {}).get("conditions", [])
    return any(each["type"] == "Terminating" and each["reason"] == "InstanceDeletionFailed" for each in conditions)


def versions(objects: Iterable[Manifest]) -> str:
    """A word that differs whenever one of the objects does. Pure."""
    return "-".join(item["metadata"]["resourceVersion"] for item in objects)


def start(settings: Settings) -> None:
    """Install, start and wait until a Job can be created. Safe to repeat, also after a crash."""
    config.write(settings.config / "kueue.json", configuration(settings))
    _link_certificates(settings)
    folder = binaries.resources(settings, NAME)
    files = [folder / name for name in _MANIFESTS] + [folder / "rbac" / f"{name}.yaml" for name in _ROLES]
    ca_bundle = base64.b64encode((settings.pki / "ca.crt").read_bytes()).decode()
    manifests = [installed(manifest, ca_bundle) for manifest in kubectl.parse(settings, files)]
    webhooks = [manifest for manifest in manifests if manifest["kind"] in _WEBHOOK_KINDS]
    kubectl.apply(settings, [manifest for manifest in manifests if manifest not in webhooks])
    kubectl.run(settings, "wait", "crd", "-l", _SELECTOR, "--for=condition=Established", "--timeout=60s")
    supervise.ensure(settings, kueue_part(settings, binaries.programs(settings)[NAME]))
    kubectl.apply(settings, webhooks)
    if _job_problem(settings) is None:
        return
    with Progress("kueue's webhooks") as line:
        probes.wait(line, "kueue", 30.0, lambda: _job_problem(settings))


def resume(settings: Settings) -> None:
    """Start it again after a crash of it or of the machine; nothing is done while it runs."""
    if not supervise.is_ready(settings, kueue_part(settings, binaries.programs(settings)[NAME])):
        start(settings)


def _link_certificates(settings: Settings) -> None:
    for folder in (certificate_folder(settings), leftovers.KUEUE_METRICS_CERTIFICATES):
        folder.mkdir(parents=True, exist_ok=True)
        for link, target in (("tls.crt", "kueue.crt"), ("tls.key", "kueue.key")):
            path = folder / link
            if path.exists() and not path.is_symlink():
                raise ClusterProblem(f"{path} is somebody else's: Kueue reads its certificate there, so move it away")
            path.unlink(missing_ok=True)
            path.symlink_to(settings.pki / target)


def _job_problem(settings: Settings) -> str | None:
    """Why no Job with a queue label can be created now, or None. Nothing is created."""
    container = {"name": "none", "image": "none"}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"generateName": "probe-", "namespace": "default", "labels": {_QUEUE_LABEL: "probe"}},
        "spec": {"suspend": True, "template": {"spec": {"restartPolicy": "Never", "containers": [container]}}},
    }
    try:
        kubectl.run(settings, "create", "--dry-run=server", "-f", "-", stdin=json.dumps(job))
    except ClusterProblem as problem:
        return str(problem)
    return None


def stop(settings: Settings) -> None:
    """Remove it from the cluster, whether its process lives or not: afterwards Jobs are created without it.

    The webhooks go first, or nothing could be changed once the process has ended; then finalizers are taken off, which
    only Kueue would take off in its time, and the kinds are deleted with every object of them.
    """
    kinds = "mutatingwebhookconfiguration,validatingwebhookconfiguration"
    kubectl.run(settings, "delete", kinds, "-l", _SELECTOR)
    processes.stop(settings, NAME)
    with Progress("kueue", done="removed") as line:
        kubectl.run(settings, "delete", "crd", "-l", _SELECTOR, "--wait=false")
        probes.wait(line, "removing kueue", 60.0, lambda: _release_objects(settings))
        kubectl.run(settings, "delete", "clusterrole,clusterrolebinding", "-l", _SELECTOR)
        leftovers.remove_kueue_links(settings)
        (settings.config / "kueue.json").unlink(missing_ok=True)
        probes.wait(line, "creating Jobs", 30.0, lambda: _job_problem(settings))
    suspended = [job for job in kubectl.find(settings, "jobs", "-A", "-l", _QUEUE_LABEL) if job["spec"].get("suspend")]
    if suspended:
        say(f"  {len(suspended)} Jobs of queues stay suspended: nobody admits them now")


def _release_objects(settings: Settings) -> str | None:
    """Take the finalizers off what is left of Kueue's kinds. None once the kinds are gone, else what is left."""
    found = kubectl.find(settings, "crd", "-l", _SELECTOR)
    kinds = [crd["metadata"]["name"] for crd in found]
    if not kinds:
        return None
    try:
        if any(map(is_stuck, found)):
            kubectl.run(settings, "annotate", "crd", "-l", _SELECTOR, f"{_LOOK_AGAIN}={versions(found)}", "--overwrite")
        held = without_finalizers(kubectl.find(settings, ",".join(kinds), "-A"))
        if held:
            listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": held})
            kubectl.run(settings, "replace", "-f", "-", stdin=listed)
    except ClusterProblem as problem:  # a kind or an object went away in between: looked at again
        return str(problem)
    return f"{', '.join(kinds)} are still there"
