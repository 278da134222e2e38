"""The node's bridge, forwarding and firewall table. Called by lifecycle.py before containerd starts and after it ends.

What was there before is kept in `run/kernel-settings.json` and put back by `remove`.
"""

import json
import shutil
import subprocess
from pathlib import Path

from . import config
from .problem import ClusterProblem
from .settings import BRIDGE, NFT_TABLE, NODE_IP, POD_CIDR, Settings

_KERNEL_SETTINGS = {
    "/proc/sys/net/ipv4/ip_forward": "1",
    # Pods of one bridge reach each other through a service only if bridged packets pass the firewall.
    "/proc/sys/net/bridge/bridge-nf-call-iptables": "1",
}
# Tables that kube-proxy makes, and empty ones that it makes while looking for rules of its older modes.
PROXY_TABLES = (("ip", "kube-proxy"), ("ip6", "kube-proxy"))


def run(*argv: str, stdin: str | None = None) -> str:
    """Run a command of the system; its output. An error carries what the command said."""
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ClusterProblem(f"the command {argv[0]} is not installed; `cluster.py up` as root installs it") from error
    if done.returncode != 0:
        raise ClusterProblem(f"`{' '.join(argv)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def links() -> list[dict[str, object]]:
    """Network interfaces as `ip -json link` tells them."""
    parsed: list[dict[str, object]] = json.loads(run("ip", "-json", "link", "show") or "[]")
    return parsed


def load_modules() -> None:
    """Load what a stock kernel has as modules. A kernel without modules has them built in, or preflight says so."""
    if shutil.which("modprobe"):
        subprocess.run(["modprobe", "--all", "br_netfilter", "overlay"], capture_output=True, check=False)


def has_bridge() -> bool:
    return Path(f"/sys/class/net/{BRIDGE}").exists()


def create(settings: Settings) -> None:
    """Bridge, address, forwarding, firewall. Safe to repeat."""
    _remember_kernel_settings(settings)
    for path, value in _KERNEL_SETTINGS.items():
        if Path(path).exists() and Path(path).read_text().strip() != value:
            Path(path).write_text(value)
    if not has_bridge():
        run("ip", "link", "add", BRIDGE, "type", "bridge")
    prefix = POD_CIDR.rpartition("/")[2]
    run("ip", "address", "replace", f"{NODE_IP}/{prefix}", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    run("nft", "-f", "-", stdin=config.firewall())


def _remember_kernel_settings(settings: Settings) -> None:
    kept = settings.run / "kernel-settings.json"
    if not kept.exists():
        values = {path: Path(path).read_text().strip() for path in _KERNEL_SETTINGS if Path(path).exists()}
        tables = [list(table) for table in nft_tables()]
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"values": values, "tables": tables}))


def nft_tables() -> list[tuple[str, str]]:
    """(family, name) of each firewall table; none where nftables is not even installed."""
    if shutil.which("nft") is None:
        return []
    listed = json.loads(run("nft", "--json", "list", "tables"))["nftables"]
    return [(item["table"]["family"], item["table"]["name"]) for item in listed if "table" in item]


def _is_empty(family: str, name: str) -> bool:
    listed = json.loads(run("nft", "--json", "list", "table", family, name))["nftables"]
    return not any("rule" in item for item in listed)


def our_tables(settings: Settings) -> list[tuple[str, str]]:
    """Tables that are there because of the cluster: its own, kube-proxy's, and empty ones that appeared since."""
    kept = settings.run / "kernel-settings.json"
    before = {tuple(table) for table in json.loads(kept.read_text())["tables"]} if kept.exists() else None
    ours = {("inet", NFT_TABLE), *PROXY_TABLES}
    found = []
    for family, name in nft_tables():
        appeared = before is not None and (family, name) not in before
        if (family, name) in ours or (appeared and name in ("nat", "filter", "mangle") and _is_empty(family, name)):
            found.append((family, name))
    return found


def our_veths(interfaces: list[dict[str, object]]) -> list[str]:
    """The host's ends of the pods' cables: interfaces whose master is the bridge."""
    return [str(link["ifname"]) for link in interfaces if link.get("master") == BRIDGE]


def remove(settings: Settings) -> None:
    """Undo create, and what kube-proxy and the pods added to it. Safe to repeat."""
    if has_bridge():
        for name in our_veths(links()):
            # A veth goes by itself when its pod's namespace does, which may be just now.
            subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False)
        run("ip", "link", "delete", BRIDGE)
    for family, name in our_tables(settings):
        run("nft", "delete", "table", family, name)
    kept = settings.run / "kernel-settings.json"
    if kept.exists():
        for path, value in json.loads(kept.read_text())["values"].items():
            if Path(path).exists() and Path(path).read_text().strip() != value:
                Path(path).write_text(value)
