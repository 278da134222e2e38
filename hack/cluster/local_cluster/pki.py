"""Certificates, keys and kubeconfigs of one life of the cluster, made with the `openssl` command.

Written once when the cluster is created and deleted by `down`. Everything is P-256, valid for a year, and readable
by root only. etcd and the API aggregation layer have certificate authorities of their own: whom the cluster's
authority vouches for must not reach the store directly, nor speak in another user's name.
"""

import hashlib
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .problem import ClusterProblem
from .settings import API_PORT, API_SERVICE_IP, CLUSTER_DOMAIN, NODE_IP, NODE_NAME, OPERATOR_USER, Settings

_DAYS = "365"
AUTHORITIES = ("ca", "etcd-ca", "front-proxy-ca")


@dataclass(frozen=True)
class Certificate:
    """One leaf: file name, subject, subject alternative names (openssl's spelling) and who signs."""

    name: str
    subject: str
    names: tuple[str, ...] = ()
    authority: str = "ca"


_API_NAMES = (
    "IP:127.0.0.1",
    f"IP:{NODE_IP}",
    f"IP:{API_SERVICE_IP}",
    "DNS:localhost",
    "DNS:kubernetes",
    "DNS:kubernetes.default",
    "DNS:kubernetes.default.svc",
    f"DNS:kubernetes.default.svc.{CLUSTER_DOMAIN}",
)
_NODE_SUBJECT = f"/O=system:nodes/CN=system:node:{NODE_NAME}"
CERTIFICATES = (
    Certificate("etcd", "/CN=etcd", ("IP:127.0.0.1",), "etcd-ca"),
    Certificate("etcd-client", "/CN=kube-apiserver", (), "etcd-ca"),
    Certificate("front-proxy-client", "/CN=front-proxy-client", (), "front-proxy-ca"),
    Certificate("control-plane", "/CN=kube-apiserver", _API_NAMES),
    Certificate("kubelet-serving", _NODE_SUBJECT, (f"IP:{NODE_IP}", f"DNS:{NODE_NAME}")),
    Certificate("apiserver-to-kubelet", "/O=system:masters/CN=kube-apiserver"),
    Certificate("admin", "/O=system:masters/CN=finetune-admin"),
    Certificate("kube-controller-manager", "/CN=system:kube-controller-manager"),
    Certificate("kube-scheduler", "/CN=system:kube-scheduler"),
    Certificate("kube-proxy", "/CN=system:kube-proxy"),
    Certificate("coredns", "/CN=system:coredns"),
    Certificate("kubelet", _NODE_SUBJECT),
    Certificate("kueue", "/CN=kueue", ("IP:127.0.0.1",)),  # a client, and the server of its webhooks
    Certificate("kwok", "/CN=kwok", ("IP:127.0.0.1",)),  # a client, and the kubelet's server of its nodes
    Certificate(OPERATOR_USER, f"/CN={OPERATOR_USER}"),
)
# Certificates that become a kubeconfig of the same name.
CLIENTS = (
    "admin",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "coredns",
    "kubelet",
    "kueue",
    "kwok",
    OPERATOR_USER,
)


def _openssl(*arguments: str, cwd: Path) -> None:
    run = subprocess.run(["openssl", *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise ClusterProblem(f"openssl {arguments[0]} failed: {run.stderr.strip()}; is the openssl package whole?")


def _key(folder: Path, name: str) -> None:
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.key", cwd=folder)


def _authority(folder: Path, name: str) -> None:
    _key(folder, name)
    subject = ["-subj", f"/CN=finetune-cluster {name}", "-days", _DAYS]
    uses = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,digitalSignature"]
    _openssl("req", "-x509", "-new", "-key", f"{name}.key", "-out", f"{name}.crt", *subject, *uses, cwd=folder)


def _leaf(folder: Path, leaf: Certificate) -> None:
    _key(folder, leaf.name)
    _openssl("req", "-new", "-key", f"{leaf.name}.key", "-subj", leaf.subject, "-out", f"{leaf.name}.csr", cwd=folder)
    extensions = ["keyUsage=critical,digitalSignature", "extendedKeyUsage=serverAuth,clientAuth"]
    if leaf.names:
        extensions.append("subjectAltName=" + ",".join(leaf.names))
    (folder / f"{leaf.name}.ext").write_text("\n".join(extensions) + "\n")
    signer = ["-CA", f"{leaf.authority}.crt", "-CAkey", f"{leaf.authority}.key", "-CAcreateserial", "-days", _DAYS]
    files = ["-in", f"{leaf.name}.csr", "-out", f"{leaf.name}.crt", "-extfile", f"{leaf.name}.ext"]
    _openssl("x509", "-req", *files, *signer, cwd=folder)


def kubeconfig(client: str, pki: Path) -> dict[str, object]:
    """A kubeconfig that names the certificate files, so it holds no secret itself."""
    cluster = {"server": f"https://127.0.0.1:{API_PORT}", "certificate-authority": str(pki / "ca.crt")}
    user = {"client-certificate": str(pki / f"{client}.crt"), "client-key": str(pki / f"{client}.key")}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "finetune-cluster",
        "clusters": [{"name": "finetune-cluster", "cluster": cluster}],
        "users": [{"name": client, "user": user}],
        "contexts": [{"name": "finetune-cluster", "context": {"cluster": "finetune-cluster", "user": client}}],
    }


def create(settings: Settings) -> None:
    """Make everything unless it is there. The folder appears whole or not at all.

    Raises ClusterProblem if it is there for another list of certificates: new ones would cut off whatever runs.
    """
    made_for = hashlib.sha256(repr((AUTHORITIES, CERTIFICATES)).encode()).hexdigest()
    if settings.pki.is_dir():
        if (settings.pki / "made-for").read_text() != made_for:
            raise ClusterProblem("this cluster was made by another version of this tree: run `cluster.py down` first")
        return
    folder = settings.pki.with_name("pki.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    for authority in AUTHORITIES:
        _authority(folder, authority)
    for leaf in CERTIFICATES:
        _leaf(folder, leaf)
    _openssl("genrsa", "-traditional", "-out", "service-accounts.key", "2048", cwd=folder)
    _openssl("rsa", "-in", "service-accounts.key", "-pubout", "-out", "service-accounts.pub", cwd=folder)
    for client in CLIENTS:
        content = json.dumps(kubeconfig(client, settings.pki), indent=1)
        (folder / f"{client}.kubeconfig").write_text(content)
    for scrap in (*folder.glob("*.csr"), *folder.glob("*.ext"), *folder.glob("*.srl")):
        scrap.unlink()
    (folder / "made-for").write_text(made_for)
    folder.rename(settings.pki)
    settings.kubeconfig.write_text((settings.pki / "admin.kubeconfig").read_text())
    settings.kubeconfig.chmod(0o600)
