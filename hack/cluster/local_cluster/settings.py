"""Where the cluster lives: folders, addresses, ports, names. Read from the environment once, by cli.py.

Three kinds of folder, told apart by what may be deleted when:
`cache` survives everything (binaries, base image), `state` holds what `down` keeps (image store, workspace) and, in
`state/cluster`, what `down` deletes; `run` holds sockets and records of what is running.
"""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

KUBERNETES_VERSION = "v1.34.4"
NODE_NAME = "finetune-node"
BRIDGE = "ftcluster0"
NFT_TABLE = "finetune-cluster"
CNI_NETWORK = "finetune-cluster"
CGROUP = "finetune-cluster"
POD_CIDR = "10.244.0.0/24"
NODE_IP = "10.244.0.1"  # the bridge's own address: loopback is refused as a node's address
SERVICE_CIDR = "10.96.0.0/16"
API_SERVICE_IP = "10.96.0.1"
CLUSTER_DOMAIN = "cluster.local"
IMAGE_NAMESPACE = "k8s.io"  # containerd's namespace that the kubelet reads
POD_UID = 65532
OPERATOR_USER = "finetune-operator-under-test"

API_PORT = 6443
ANY_ADDRESS = "0.0.0.0"
LOOPBACK = "127.0.0.1"
KUEUE_WEBHOOK = (LOOPBACK, 12443)
KUEUE_METRICS = (LOOPBACK, 12444)
KUEUE_HEALTH = (LOOPBACK, 12445)
KWOK_SERVER = (LOOPBACK, 10247)
# What listens where, by part and add-on.
PORTS: dict[str, tuple[tuple[str, int], ...]] = {
    "etcd": ((LOOPBACK, 12379), (LOOPBACK, 12380), (LOOPBACK, 12381)),
    "kube-apiserver": ((ANY_ADDRESS, API_PORT),),
    "kube-controller-manager": ((LOOPBACK, 10257),),
    "kube-scheduler": ((LOOPBACK, 10259),),
    "kubelet": ((LOOPBACK, 10248), (NODE_IP, 10250)),
    "kube-proxy": ((LOOPBACK, 10249), (LOOPBACK, 10256)),
    "coredns": ((LOOPBACK, 8181), (NODE_IP, 53)),
    "kueue": (KUEUE_WEBHOOK, KUEUE_METRICS, KUEUE_HEALTH),
    "kwok": (KWOK_SERVER,),
}


@dataclass(frozen=True)
class Settings:
    """Folders of one cluster on one machine. Every other path is derived from these four."""

    cache: Path
    state: Path
    run: Path
    source: Path  # hack/cluster in the tree
    assets: Path | None = None  # KUBEBUILDER_ASSETS: ready binaries, looked at first

    @property
    def cluster(self) -> Path:
        """What one life of the cluster owns: certificates, etcd's data, the kubelet's folder. `down` deletes it."""
        return self.state / "cluster"

    @property
    def pki(self) -> Path:
        return self.cluster / "pki"

    @property
    def config(self) -> Path:
        return self.cluster / "config"

    @property
    def kubeconfig(self) -> Path:
        return self.cluster / "admin.kubeconfig"

    @property
    def audit_log(self) -> Path:
        """Who of the operator asked the API server for what. In a folder of its own, with the files before it."""
        return self.cluster / "audit" / "audit.log"

    @property
    def operator_kubeconfig(self) -> Path:
        """For a process under test: a user without any role, whose requests are in the audit log."""
        return self.pki / f"{OPERATOR_USER}.kubeconfig"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def workspace(self) -> Path:
        return self.state / "workspace"

    @property
    def containerd_socket(self) -> Path:
        return self.run / "containerd.sock"

    @property
    def buildkit_socket(self) -> Path:
        return self.run / "buildkitd.sock"

    @property
    def kubelet_root(self) -> Path:
        return self.cluster / "kubelet"


def architecture() -> str:
    """Go's name of this machine's processor."""
    machine = platform.machine()
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def read_settings(environ: Mapping[str, str], source: Path) -> Settings:
    """FINETUNE_CACHE, FINETUNE_STATE, XDG_CACHE_HOME and KUBEBUILDER_ASSETS, with their defaults."""
    home_cache = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or Path.home()) / ".cache")
    cache = Path(environ.get("FINETUNE_CACHE") or home_cache / "finetune-operator")
    assets = environ.get("KUBEBUILDER_ASSETS")
    return Settings(
        cache=cache.resolve(),
        state=Path(environ.get("FINETUNE_STATE") or "/var/lib/finetune-cluster").resolve(),
        run=Path("/run/finetune-cluster"),
        source=source,
        assets=Path(assets).resolve() if assets else None,
    )


def current_settings() -> Settings:
    return read_settings(os.environ, Path(__file__).resolve().parent.parent)
