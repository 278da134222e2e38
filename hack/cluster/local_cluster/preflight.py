"""What would keep the cluster from starting, found before anything is started.

`observe` looks at the machine, `problems` is pure: facts in, sentences with a remedy out, all at once.
"""

import os
import shutil
import socket
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from . import binaries, cgroups, images, packages, processes
from .parts import ADD_ON_NAMES, PART_NAMES
from .settings import ANY_ADDRESS, PORTS, Settings

GIB = 1024**3
# Disk that each missing thing takes while it is made, in GiB; measured, with a margin.
_GIB_FOR_MODULE = {"kubernetes": 7, "buildkit": 2, "kueue": 3, "kwok": 2}
_GIB_FOR_BASE = 2
_GIB_FOR_RUNNING = 2
_NEEDED_FILE_SYSTEMS = ("overlay",)


@dataclass(frozen=True)
class Machine:
    """Facts about the machine, as preflight judges them. `free_bytes`: by folder; `taken`: port to who holds it."""

    is_root: bool
    is_linux: bool
    missing_modules: tuple[str, ...]
    has_go: bool
    missing_packages: tuple[str, ...]
    has_apt: bool
    has_base: bool
    image_gib: int  # room asked for images that are still to be built
    free_bytes: int
    disk: str
    file_systems: tuple[str, ...]
    has_cgroups: bool
    taken: dict[int, str]


def needed_gib(machine: Machine) -> int:
    """Disk in GiB that is used up by what is missing."""
    modules = sum(_GIB_FOR_MODULE[name] for name in machine.missing_modules)
    base = 0 if machine.has_base else _GIB_FOR_BASE
    return modules + base + machine.image_gib + _GIB_FOR_RUNNING


def problems(machine: Machine) -> list[str]:
    """One sentence a problem, each with its remedy. Empty if the cluster can start."""
    found = []
    if not machine.is_linux:
        found.append("a local cluster needs Linux; on another system use CLUSTER=existing with a cluster of yours")
    if not machine.is_root:
        found.append(
            "a node needs root for namespaces, mounts and firewall: run it as root, "
            "or use CLUSTER=existing with a cluster of yours"
        )
    if machine.missing_packages and not machine.has_apt:
        names = ", ".join(machine.missing_packages)
        found.append(f"there is no apt-get to install these packages with, so install them yourself: {names}")
    if machine.missing_modules and not machine.has_go:
        found.append(
            f"there is no `go` command to build {' and '.join(machine.missing_modules)} with: "
            "install Go 1.25 or newer so that `go` is on the PATH"
        )
    if machine.free_bytes < needed_gib(machine) * GIB:
        found.append(
            f"{machine.disk} has {machine.free_bytes / GIB:.0f} GiB free and {needed_gib(machine)} GiB are needed: "
            "free some, or point FINETUNE_STATE and FINETUNE_CACHE at a larger disk"
        )
    for name in _NEEDED_FILE_SYSTEMS:
        if name not in machine.file_systems:
            found.append(f"the kernel has no {name} file system: load it with `modprobe {name}`, or use another kernel")
    if not machine.has_cgroups:
        found.append("no cgroup hierarchy is mounted below /sys/fs/cgroup: mount one, or use another machine")
    for port, holder in sorted(machine.taken.items()):
        found.append(f"port {port}, which {_user_of(port)} needs, is taken by {holder}: stop that first")
    return found


def _user_of(port: int) -> str:
    return next(name for name, places in PORTS.items() if any(taken == port for _, taken in places))


@dataclass(frozen=True)
class Listener:
    """A listening TCP socket: IPv4 address (a wildcard of IPv6 counts as one of IPv4), port, inode."""

    address: str
    port: int
    inode: str


def listeners(table: str) -> list[Listener]:
    """The listening sockets in the text of /proc/net/tcp or tcp6. IPv6 addresses but the wildcard are left out."""
    found = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        address, _, port = fields[1].rpartition(":")
        if fields[3] != "0A":
            continue
        if len(address) == 8:
            # The kernel prints the four bytes in the machine's order.
            numbers = int(address, 16).to_bytes(4, sys.byteorder)
            found.append(Listener(socket.inet_ntoa(numbers), int(port, 16), fields[9]))
        elif not address.strip("0"):
            found.append(Listener(ANY_ADDRESS, int(port, 16), fields[9]))
    return found


def conflicts(listening: Iterable[Listener], add_ons: Collection[str] = ()) -> dict[int, Listener]:
    """Which ports of the cluster and of these add-ons are taken, and by which socket. Pure.

    A socket is in the way on the same port, with the same or a wildcard address.
    """
    unwanted = set(ADD_ON_NAMES) - set(add_ons)
    places = [place for name, places in PORTS.items() if name not in unwanted for place in places]
    return {
        port: listener
        for listener in listening
        for address, port in places
        if listener.port == port and (listener.address == address or ANY_ADDRESS in (address, listener.address))
    }


def _holder(inode: str) -> tuple[int, str] | None:
    """Pid and name of a process that has the socket open."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(fd.readlink()) == f"socket:[{inode}]" for fd in (folder / "fd").iterdir()):
                return int(folder.name), (folder / "comm").read_text().strip()
        except OSError:  # it ended meanwhile
            continue
    return None


def taken_ports(ours: set[int], add_ons: Collection[str] = ()) -> dict[int, str]:
    """Ports of the cluster that somebody else holds, with a description of who. Only root can tell."""
    tables = [Path("/proc/net") / name for name in ("tcp6", "tcp")]
    listening = [listener for table in tables if table.exists() for listener in listeners(table.read_text())]
    taken = {}
    for port, listener in conflicts(listening, add_ons).items():
        holder = _holder(listener.inode)
        if holder is None:
            taken[port] = "a process in another container"
        elif holder[0] not in ours:
            taken[port] = f"process {holder[0]} ({holder[1]})"
    return taken


def _free_bytes(folder: Path) -> int:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def observe(settings: Settings, image_gib: int = 0, add_ons: Collection[str] = ()) -> Machine:
    """Look at the machine, for the cluster and these add-ons. Starts and changes nothing."""
    names = (*PART_NAMES, *ADD_ON_NAMES)
    ours = {record.pid for name in names if (record := processes.find_running(settings, name))}
    tightest = min((settings.state, settings.cache), key=_free_bytes)
    return Machine(
        is_root=os.geteuid() == 0,
        is_linux=sys.platform == "linux",
        missing_modules=tuple(module.name for module in binaries.missing_modules(settings, add_ons)),
        has_go=binaries.find_go() is not None,
        missing_packages=tuple(packages.missing()),
        has_apt=shutil.which("apt-get") is not None,
        has_base=images.base_archive(settings).exists(),
        image_gib=image_gib,
        free_bytes=_free_bytes(tightest),
        disk=str(tightest),
        file_systems=tuple(Path("/proc/filesystems").read_text().split()),
        has_cgroups=bool(cgroups.hierarchies(Path("/proc/mounts").read_text())),
        taken=taken_ports(ours | cgroups.processes(), add_ons) if os.geteuid() == 0 else {},
    )
