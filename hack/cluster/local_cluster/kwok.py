"""KWOK, which plays the kubelet of nodes that do not exist, as a process of this machine. Optional: `cluster.py kwok`.

It manages nodes with the annotation `kwok.x-k8s.io/node: fake` and the pods bound to them, and no other. What becomes
of such a pod is said by Stage objects in files of the caller: when it is running, when it ends, with which exit code
and termination message. Nodes are the caller's too, except for the plain ones of `--nodes`.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from . import binaries, config, kubectl, processes, supervise
from .kubectl import Manifest
from .parts import kwok_part
from .problem import ClusterProblem
from .settings import KWOK_SERVER, Settings
from .terminal import Progress

NAME = "kwok"
USER = "kwok"  # the subject of its client certificate, see pki.py
FAKE = "kwok.x-k8s.io/node"
LABEL = {"finetune-cluster/add-on": NAME}
_SELECTOR = "finetune-cluster/add-on=kwok"


def configuration(settings: Settings) -> str:
    """KwokConfiguration as JSON: which nodes it plays, and where the API server finds their pods' logs."""
    return json.dumps(
        {
            "apiVersion": "config.kwok.x-k8s.io/v1alpha1",
            "kind": "KwokConfiguration",
            "options": {
                "manageAllNodes": False,
                "manageNodesWithAnnotationSelector": f"{FAKE}=fake",
                "enableCRDs": [],  # stages come from files, so nothing is installed in the cluster
                # A lease a node every 10 s, as a kubelet's; without it every heartbeat would be a write to the node.
                "nodeLeaseDurationSeconds": 40,
                "nodeLeaseParallelism": 4,
                "podPlayStageParallelism": 8,
                "nodePlayStageParallelism": 4,
                # One watch over all pods, not one a node.
                "enablePodsOnNodeSyncStreamWatch": True,
                "enablePodsOnNodeSyncListPager": False,
                "cidr": "10.245.0.1/16",  # addresses of fake pods; nothing answers there
                # The kubelet's server of every fake node, so `kubectl logs` is answered: from ClusterLogs in the files.
                "nodeIP": KWOK_SERVER[0],
                "nodePort": KWOK_SERVER[1],
                "serverAddress": f"{KWOK_SERVER[0]}:{KWOK_SERVER[1]}",
                "tlsCertFile": str(settings.pki / "kwok.crt"),
                "tlsPrivateKeyFile": str(settings.pki / "kwok.key"),
            },
        },
        indent=1,
    )


def fake_node(number: int) -> Manifest:
    """A plain fake node. The taint keeps pods off that do not ask for a fake node. Pure."""
    size = {"cpu": "64", "memory": "256Gi", "pods": "250"}
    name = f"kwok-{number}"
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {FAKE: "fake"},
            "labels": {"kubernetes.io/hostname": name, "type": "kwok", **LABEL},
        },
        "spec": {"taints": [{"key": FAKE, "value": "fake", "effect": "NoSchedule"}]},
        "status": {"allocatable": size, "capacity": size},
    }


def bound_role(manifest: Manifest) -> Manifest:
    """KWOK's role or its binding as it is applied here: labelled, and bound to our user. Pure."""
    metadata = {**manifest["metadata"], "labels": LABEL}
    if manifest["kind"] != "ClusterRoleBinding":
        return {**manifest, "metadata": metadata}
    subject = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": USER}
    return {**manifest, "metadata": metadata, "subjects": [subject]}


def start(settings: Settings, stages: Sequence[Path], nodes: int) -> None:
    """Start it with these stage files, restarted if they differ from those it runs with; KWOK's own without any.

    `nodes`: how many plain fake nodes there shall be at least. Raises ClusterProblem if a file is missing, or with the
    end of KWOK's log if it refuses one.
    """
    missing = [str(file) for file in stages if not file.is_file()]
    if missing:
        raise ClusterProblem(f"no such stage file: {', '.join(missing)}")
    _copy(settings, stages)
    config.write(settings.config / "kwok.json", configuration(settings))
    folder = binaries.resources(settings, NAME)
    roles = kubectl.parse(settings, [folder / "role.yaml", folder / "role_binding.yaml"])
    kubectl.apply(settings, [bound_role(role) for role in roles])
    resume(settings)
    if nodes:
        kubectl.apply(settings, [fake_node(number) for number in range(nodes)])


def _copy(settings: Settings, stages: Sequence[Path]) -> None:
    """Copies, so that KWOK can be started again when the caller's files are gone."""
    folder = stage_folder(settings)
    kept = {f"{number:02}-{file.name}": file.read_text() for number, file in enumerate(stages)}
    for file in folder.glob("*"):
        if file.name not in kept:
            file.unlink()
    for name, text in kept.items():
        config.write(folder / name, text)


def stage_folder(settings: Settings) -> Path:
    return settings.config / "kwok-stages"


def resume(settings: Settings) -> None:
    """Start it again as it was last asked for, unless it runs."""
    stages = sorted(stage_folder(settings).glob("*"))
    supervise.ensure(settings, kwok_part(settings, binaries.programs(settings)[NAME], stages))


def stop(settings: Settings) -> None:
    """End it and delete every fake node; Kubernetes collects the pods on them within a minute."""
    with Progress("kwok", done="removed"):
        processes.stop(settings, NAME)
        fake = [
            node["metadata"]["name"]
            for node in kubectl.find(settings, "nodes")
            if node["metadata"].get("annotations", {}).get(FAKE) == "fake"
        ]
        if fake:
            kubectl.run(settings, "delete", "node", "--ignore-not-found", *fake)
        kubectl.run(settings, "delete", "clusterrole,clusterrolebinding", "-l", _SELECTOR)
        shutil.rmtree(stage_folder(settings), ignore_errors=True)
        (settings.config / "kwok.json").unlink(missing_ok=True)
