"""Debian packages that the cluster needs: which are missing, and their installation."""

import os
import shutil
import subprocess
from pathlib import Path

from .problem import ClusterProblem
from .terminal import Progress

# Package, and a file by which one knows that it is there, however it came.
NEEDED = {
    "containerd": "/usr/bin/containerd",
    "runc": "/usr/sbin/runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "iptables": "/usr/sbin/iptables",
    "nftables": "/usr/sbin/nft",
    "conntrack": "/usr/sbin/conntrack",
    "mmdebstrap": "/usr/bin/mmdebstrap",
    "iproute2": "/usr/sbin/ip",
    "openssl": "/usr/bin/openssl",
}
_POLICY = Path("/usr/sbin/policy-rc.d")


def missing() -> list[str]:
    return [package for package, file in NEEDED.items() if not Path(file).exists()]


def _apt(*arguments: str) -> None:
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(["apt-get", *arguments], env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise ClusterProblem(f"`apt-get {' '.join(arguments)}` failed:\n  {lines}")


def install(names: list[str]) -> None:
    """Install the packages. The services in them are not started: the cluster runs its own containerd."""
    if not names:
        return
    if shutil.which("apt-get") is None:
        raise ClusterProblem(f"this is no Debian system (no apt-get); install what gives you: {', '.join(names)}")
    with Progress("Debian packages", done=f"installed: {' '.join(names)}"):
        guarded = not _POLICY.exists()
        if guarded:
            _POLICY.write_text("#!/bin/sh\nexit 101\n")  # 101 forbids package scripts to start services
            _POLICY.chmod(0o755)
        try:
            _apt("update")
            _apt("install", "--yes", "--no-install-recommends", *names)
        finally:
            if guarded:
                _POLICY.unlink(missing_ok=True)
