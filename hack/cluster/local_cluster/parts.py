"""The parts of the cluster: what each is started with, in which order, and how one knows that it is ready.

Pure tables over Settings; lifecycle.py starts them. A part's `files` are configuration whose change restarts it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .settings import (
    API_PORT,
    CLUSTER_DOMAIN,
    KUEUE_HEALTH,
    KWOK_SERVER,
    NODE_IP,
    NODE_NAME,
    SERVICE_CIDR,
    Settings,
)


@dataclass(frozen=True)
class Part:
    """One process. `probe` is a URL that answers once it works: http, https with the admin's certificate, or unix."""

    name: str
    argv: tuple[str, ...]
    probe: str
    files: tuple[Path, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    ready_within_s: float = 60.0


def _flags(**values: object) -> tuple[str, ...]:
    return tuple(f"--{name.replace('_', '-')}={value}" for name, value in values.items())


def _etcd(settings: Settings, program: Path) -> Part:
    client, peer = "https://127.0.0.1:12379", "https://127.0.0.1:12380"
    tls = {"cert_file": settings.pki / "etcd.crt", "key_file": settings.pki / "etcd.key"}
    argv = _flags(
        name="finetune",
        data_dir=settings.cluster / "etcd",
        listen_client_urls=client,
        advertise_client_urls=client,
        listen_peer_urls=peer,
        initial_advertise_peer_urls=peer,
        initial_cluster=f"finetune={peer}",
        listen_metrics_urls="http://127.0.0.1:12381",
        trusted_ca_file=settings.pki / "etcd-ca.crt",
        client_cert_auth="true",
        peer_trusted_ca_file=settings.pki / "etcd-ca.crt",
        peer_client_cert_auth="true",
        # A killed etcd loses nothing by this, a machine that loses power may; `down` and `up` make a new cluster then.
        unsafe_no_fsync="true",
        **tls,
        **{f"peer_{key}": value for key, value in tls.items()},
    )
    return Part("etcd", (str(program), *argv), "http://127.0.0.1:12381/health")


def _apiserver(settings: Settings, program: Path) -> Part:
    pki = settings.pki
    audit_policy = settings.config / "audit-policy.json"
    argv = _flags(
        etcd_servers="https://127.0.0.1:12379",
        etcd_cafile=pki / "etcd-ca.crt",
        etcd_certfile=pki / "etcd-client.crt",
        etcd_keyfile=pki / "etcd-client.key",
        bind_address="0.0.0.0",  # loopback and bridge; the firewall table drops every other way in
        secure_port=API_PORT,
        advertise_address=NODE_IP,
        tls_cert_file=pki / "control-plane.crt",
        tls_private_key_file=pki / "control-plane.key",
        client_ca_file=pki / "ca.crt",
        authorization_mode="Node,RBAC",
        enable_admission_plugins="NodeRestriction",
        allow_privileged="true",
        service_cluster_ip_range=SERVICE_CIDR,
        service_account_issuer=f"https://kubernetes.default.svc.{CLUSTER_DOMAIN}",
        service_account_key_file=pki / "service-accounts.pub",
        service_account_signing_key_file=pki / "service-accounts.key",
        requestheader_client_ca_file=pki / "front-proxy-ca.crt",
        requestheader_allowed_names="front-proxy-client",
        requestheader_username_headers="X-Remote-User",
        requestheader_group_headers="X-Remote-Group",
        requestheader_extra_headers_prefix="X-Remote-Extra-",
        proxy_client_cert_file=pki / "front-proxy-client.crt",
        proxy_client_key_file=pki / "front-proxy-client.key",
        kubelet_client_certificate=pki / "apiserver-to-kubelet.crt",
        kubelet_client_key=pki / "apiserver-to-kubelet.key",
        kubelet_certificate_authority=pki / "ca.crt",
        kubelet_preferred_address_types="InternalIP",  # the node's name is in no DNS
        audit_policy_file=audit_policy,
        audit_log_path=settings.audit_log,
        audit_log_maxsize=50,  # MiB; with the one file before it, 100 in all
        audit_log_maxbackup=1,
    )
    return Part("kube-apiserver", (str(program), *argv), f"https://127.0.0.1:{API_PORT}/readyz", (audit_policy,))


def _control_loop(settings: Settings, program: Path, port: int, **flags: object) -> Part:
    pki, name = settings.pki, program.name
    kubeconfig = pki / f"{name}.kubeconfig"
    argv = _flags(
        kubeconfig=kubeconfig,
        authentication_kubeconfig=kubeconfig,
        authorization_kubeconfig=kubeconfig,
        bind_address="127.0.0.1",
        secure_port=port,
        tls_cert_file=pki / "control-plane.crt",
        tls_private_key_file=pki / "control-plane.key",
        leader_elect="false",
        # By default 20 and 50 requests a second, which a few dozen Jobs would wait for; managed clusters set more.
        kube_api_qps="1000",
        kube_api_burst="2000",
        **flags,
    )
    return Part(name, (str(program), *argv), f"https://127.0.0.1:{port}/healthz")


def _controller_manager(settings: Settings, program: Path) -> Part:
    return _control_loop(
        settings,
        program,
        10257,
        use_service_account_credentials="true",
        concurrent_job_syncs="20",
        pvclaimbinder_sync_period="2s",  # 15 s by default, which a claim made just after its volume waits for
        service_account_private_key_file=settings.pki / "service-accounts.key",
        root_ca_file=settings.pki / "ca.crt",
        cluster_signing_cert_file=settings.pki / "ca.crt",
        cluster_signing_key_file=settings.pki / "ca.key",
    )


def _kubelet(settings: Settings, program: Path) -> Part:
    config = settings.config / "kubelet.json"
    argv = _flags(
        config=config,
        kubeconfig=settings.pki / "kubelet.kubeconfig",
        hostname_override=NODE_NAME,
        node_ip=NODE_IP,
        root_dir=settings.kubelet_root,
    )
    return Part("kubelet", (str(program), *argv), "http://127.0.0.1:10248/healthz", (config,))


def _containerd(settings: Settings) -> Part:
    config = settings.config / "containerd.toml"
    argv = ("/usr/bin/containerd", "--config", str(config))
    cni = settings.config / "cni" / "10-finetune.conflist"
    return Part("containerd", argv, f"unix:{settings.containerd_socket}", (config, cni), _temporary(settings))


def _buildkitd(settings: Settings, program: Path) -> Part:
    config = settings.config / "buildkitd.toml"
    argv = (str(program), "--config", str(config))
    return Part("buildkitd", argv, f"unix:{settings.buildkit_socket}", (config,), _temporary(settings))


def _temporary(settings: Settings) -> dict[str, str]:
    """Layers are mounted and unpacked in the temporary folder: it must be ours to clean, and on the big disk."""
    return {"TMPDIR": str(settings.cluster / "tmp")}


def cluster_parts(settings: Settings, programs: Mapping[str, Path]) -> tuple[Part, ...]:
    """All parts in the order in which they start; ended in the opposite order. `programs`: name to binary."""
    proxy = settings.config / "kube-proxy.json"
    corefile = settings.config / "Corefile"
    return (
        _etcd(settings, programs["etcd"]),
        _containerd(settings),
        _apiserver(settings, programs["kube-apiserver"]),
        _controller_manager(settings, programs["kube-controller-manager"]),
        _control_loop(settings, programs["kube-scheduler"], 10259),
        Part(
            "coredns",
            (str(programs["coredns"]), "-conf", str(corefile)),
            "http://127.0.0.1:8181/ready",
            (corefile,),
        ),
        _kubelet(settings, programs["kubelet"]),
        Part(
            "kube-proxy",
            (str(programs["kube-proxy"]), f"--config={proxy}"),
            "http://127.0.0.1:10256/healthz",
            (proxy,),
        ),
        _buildkitd(settings, programs["buildkitd"]),
    )


def kueue_part(settings: Settings, program: Path) -> Part:
    """Kueue, which the API server asks about every Job: see kueue.py."""
    config = settings.config / "kueue.json"
    argv = _flags(
        config=config,
        kubeconfig=settings.pki / "kueue.kubeconfig",
        zap_log_level=2,  # what its own installation sets; says why a workload was not admitted
    )
    return Part("kueue", (str(program), *argv), f"http://{KUEUE_HEALTH[0]}:{KUEUE_HEALTH[1]}/readyz", (config,))


def kwok_part(settings: Settings, program: Path, stages: Sequence[Path]) -> Part:
    """KWOK with the caller's Stage files: see kwok.py."""
    config = settings.config / "kwok.json"
    configs = tuple(f"--config={file}" for file in (config, *stages))
    argv = (str(program), *configs, f"--kubeconfig={settings.pki / 'kwok.kubeconfig'}")
    # It reads ~/.kwok/kwok.yaml before any other file, and that one would be somebody's own.
    env = {"HOME": str(settings.config)}
    return Part("kwok", argv, f"http://{KWOK_SERVER[0]}:{KWOK_SERVER[1]}/healthz", (config, *stages), env)


ADD_ON_NAMES = ("kueue", "kwok")
PART_NAMES = (
    "etcd",
    "containerd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "coredns",
    "kubelet",
    "kube-proxy",
    "buildkitd",
)
