"""The configuration files of the parts, rendered from Settings. Pure but for `write`, which parts.py's starter calls.

Why each unusual setting is there stands beside it; most come from machines that are themselves small VMs or
containers: no CAP_SYS_RESOURCE, cgroup version 1, read-only conntrack limits.
"""

import json
from pathlib import Path

from .settings import (
    API_PORT,
    BRIDGE,
    CGROUP,
    CLUSTER_DOMAIN,
    CNI_NETWORK,
    IMAGE_NAMESPACE,
    NFT_TABLE,
    NODE_IP,
    NODE_NAME,
    OPERATOR_USER,
    POD_CIDR,
    Settings,
)

GIB = 1024**3


def containerd(settings: Settings, pause_image: str, oom_score_restricted: bool) -> str:
    """Own root, state and socket, so that a containerd of the system is left alone. TOML."""
    # restrict_oom_score_adj: without CAP_SYS_RESOURCE every sandbox dies on setting its score.
    # netns_mounts_under_state_dir: network namespaces lie where `down` finds them.
    return f"""version = 2
root = "{settings.state}/containerd"
state = "{settings.run}/containerd"
temp = "{settings.cluster}/tmp"

[grpc]
  address = "{settings.containerd_socket}"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause_image}"
  restrict_oom_score_adj = {json.dumps(oom_score_restricted)}
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"

[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/lib/cni"
  conf_dir = "{settings.config}/cni"

[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "overlayfs"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  Root = "{settings.run}/runc"
"""


def cni(settings: Settings) -> str:
    """The pods' network: one bridge. Masquerading is the firewall table's, so the plugin writes no iptables rule."""
    bridge = {
        "type": "bridge",
        "bridge": BRIDGE,
        "isGateway": True,
        "hairpinMode": True,
        "ipMasq": False,
        "ipam": {
            "type": "host-local",
            "dataDir": f"{settings.run}/cni-addresses",
            "ranges": [[{"subnet": POD_CIDR, "gateway": NODE_IP}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    return json.dumps({"cniVersion": "0.4.0", "name": CNI_NETWORK, "plugins": [bridge]}, indent=1)


def kubelet(settings: Settings, resolv_conf: str) -> str:
    """KubeletConfiguration, as JSON, which is YAML too."""
    return json.dumps(
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": NODE_IP,
            "healthzBindAddress": "127.0.0.1",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": f"{settings.pki}/ca.crt"},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": f"{settings.pki}/kubelet-serving.crt",
            "tlsPrivateKeyFile": f"{settings.pki}/kubelet-serving.key",
            "containerRuntimeEndpoint": f"unix://{settings.containerd_socket}",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{CGROUP}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "clusterDomain": CLUSTER_DOMAIN,
            "clusterDNS": [NODE_IP],
            "resolvConf": resolv_conf,
            # Disk thresholds are left out, which turns them off: a full disk shall fail the build or the test that
            # filled it, by name, and not evict somebody else's pod or delete an image that nothing can pull again.
            "evictionHard": {"memory.available": "100Mi"},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "makeIPTablesUtilChains": False,
            "podLogsDir": f"{settings.cluster}/pod-logs",
            "volumePluginDir": f"{settings.cluster}/volume-plugins",
            "oomScoreAdj": 0,
        },
        indent=1,
    )


def kube_proxy(settings: Settings) -> str:
    """KubeProxyConfiguration, as JSON. Conntrack limits are left alone (0): many VMs cannot write them."""
    return json.dumps(
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "bindAddress": NODE_IP,
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
            "hostnameOverride": NODE_NAME,
            "clusterCIDR": POD_CIDR,
            "clientConnection": {"kubeconfig": f"{settings.pki}/kube-proxy.kubeconfig"},
            "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
            "oomScoreAdj": 0,
        },
        indent=1,
    )


def audit_policy() -> str:
    """What the API server's audit log keeps: who of the operator asked for what and was it allowed. JSON.

    A policy names users in full, so the operator's service account, whose name and namespace a release chooses, is
    found by its group: readers look for `system:serviceaccount:<namespace>:finetune-operator...` in `user.username`.
    The policy sees who authenticated, before impersonation: `kubectl --as` is logged as the admin, which is not at all.
    """
    kept = {"level": "Metadata", "omitStages": ["RequestReceived"]}  # the later stages say all that it does
    rules: list[dict[str, object]] = [
        {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"]},  # Kubernetes' own controllers
        {**kept, "userGroups": ["system:serviceaccounts"]},
        {**kept, "users": [OPERATOR_USER]},
        {"level": "None"},
    ]
    return json.dumps({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": rules}, indent=1)


def corefile(settings: Settings, resolv_conf: str, has_upstream: bool) -> str:
    """Cluster names from the API server, every other name from the host's resolver, if it has one."""
    forward = f"    forward . {resolv_conf}\n" if has_upstream else ""
    return (
        ".:53 {\n"
        f"    bind {NODE_IP}\n"
        "    errors\n"
        "    ready 127.0.0.1:8181\n"
        f"    kubernetes {CLUSTER_DOMAIN} in-addr.arpa ip6.arpa {{\n"
        f"        kubeconfig {settings.pki}/coredns.kubeconfig\n"
        "    }\n"
        f"{forward}"
        "}\n"
    )


def buildkitd(settings: Settings, cache_bytes: int) -> str:
    """Builds into the kubelet's own image store: no registry, no tar file. TOML."""
    return f"""root = "{settings.state}/buildkit"

[grpc]
  address = ["unix://{settings.buildkit_socket}"]

[worker.oci]
  enabled = false

[worker.containerd]
  enabled = true
  address = "{settings.containerd_socket}"
  namespace = "{IMAGE_NAMESPACE}"
  snapshotter = "overlayfs"
  networkMode = "host"
  defaultCgroupParent = "/{CGROUP}/buildkit"
  gc = true
  maxUsedSpace = {cache_bytes}
  [worker.containerd.runtime]
    name = "io.containerd.runc.v2"
    [worker.containerd.runtime.options]
      Root = "{settings.run}/runc"
"""


def firewall() -> str:
    """The cluster's own nftables table: pods reach other machines, other machines do not reach the API server."""
    # Declared, deleted and made again in one transaction, so that applying it twice changes nothing.
    return f"""table inet {NFT_TABLE}
delete table inet {NFT_TABLE}
table inet {NFT_TABLE} {{
  chain postrouting {{
    type nat hook postrouting priority srcnat
    ip saddr {POD_CIDR} ip daddr != {POD_CIDR} masquerade
  }}
  chain input {{
    type filter hook input priority filter
    iifname != {{ "lo", "{BRIDGE}" }} tcp dport {API_PORT} drop
  }}
}}
"""


def dns_rbac() -> list[dict[str, object]]:
    """What CoreDNS may read: the role that its own documentation asks for."""
    name = {"name": "system:coredns"}
    rules = [
        {"apiGroups": [""], "resources": ["namespaces", "services", "pods"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    group = "rbac.authorization.k8s.io"
    subject = {"apiGroup": group, "kind": "User", "name": "system:coredns"}
    reference = {"apiGroup": group, "kind": "ClusterRole", "name": "system:coredns"}
    return [
        {"apiVersion": f"{group}/v1", "kind": "ClusterRole", "metadata": name, "rules": rules},
        {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": name,
            "roleRef": reference,
            "subjects": [subject],
        },
    ]


def host_resolv_conf() -> str:
    """The resolver file to hand on: systemd-resolved's list of real servers where it runs, else /etc/resolv.conf."""
    resolved = Path("/run/systemd/resolve/resolv.conf")
    return str(resolved) if resolved.exists() else "/etc/resolv.conf"


def has_nameserver(text: str) -> bool:
    return any(line.split()[:1] == ["nameserver"] for line in text.splitlines())


def write(path: Path, content: str) -> None:
    """Write the file only if it differs: kube-proxy ends itself when its configuration file is touched."""
    if path.exists() and path.read_text() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
