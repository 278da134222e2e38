"""What of the cluster is still on the machine: `down` ends with this list, and fails if it is not empty."""

from pathlib import Path

from . import cgroups, mounts, network, processes
from .parts import ADD_ON_NAMES, PART_NAMES
from .settings import BRIDGE, Settings

# Where tools keep things in a place of their own choosing, whatever they are told.
SHIM_SOCKETS = Path("/run/containerd/s")
CNI_RESULTS = Path("/var/lib/cni/results")
CONTAINER_LOGS = Path("/var/log/containers")
KUBELET_SOCKET = Path("/var/lib/kubelet/device-plugins/kubelet.sock")
KUEUE_METRICS_CERTIFICATES = Path("/etc/kueue/metrics/certs")  # a constant in its source
# Folders that are deleted if nobody else has put anything into them; innermost first.
SHARED_FOLDERS = (
    CNI_RESULTS,
    CNI_RESULTS.parent,
    CONTAINER_LOGS,
    KUBELET_SOCKET.parent,
    KUBELET_SOCKET.parent.parent,
    SHIM_SOCKETS,
    Path("/run/containerd/fifo"),
    Path("/run/containerd"),
    KUEUE_METRICS_CERTIFICATES,
    KUEUE_METRICS_CERTIFICATES.parent,
    KUEUE_METRICS_CERTIFICATES.parent.parent,
)


def shim_sockets(settings: Settings) -> list[Path]:
    """Sockets of our containers' shims. containerd notes each in the container's folder."""
    tasks = settings.run / "containerd" / "io.containerd.runtime.v2.task"
    noted = [file.read_text().strip().removeprefix("unix://") for file in tasks.glob("*/*/address")]
    return [path for path in map(Path, noted) if path.is_relative_to(SHIM_SOCKETS)]


def cni_results(folder: Path, run: Path) -> list[Path]:
    """Cached results of the network plugins, of those whose network namespace lies in our folder."""
    return [file for file in folder.glob("*") if f'"{run}/' in file.read_text(errors="replace")]


def container_logs(folder: Path, pod_logs: Path) -> list[Path]:
    """Links that the kubelet makes for log collectors, of those that point to our pods."""
    return _links(folder, pod_logs)


def kueue_links(settings: Settings) -> list[Path]:
    """Links to our certificates where Kueue looks for them."""
    return _links(KUEUE_METRICS_CERTIFICATES, settings.pki)


def _links(folder: Path, target: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [link for link in folder.iterdir() if link.is_symlink() and link.readlink().is_relative_to(target)]


def files(settings: Settings) -> list[Path]:
    """Files of ours outside our own folders."""
    results = cni_results(CNI_RESULTS, settings.run)
    sockets = [path for path in shim_sockets(settings) if path.exists()]
    if KUBELET_SOCKET.exists():  # nobody else's: a second kubelet would have held our ports
        sockets.append(KUBELET_SOCKET)
    logs = container_logs(CONTAINER_LOGS, settings.cluster / "pod-logs")
    return [*results, *sockets, *logs, *kueue_links(settings)]


def remove_files(settings: Settings) -> None:
    """Delete the files of ours outside our own folders, and folders that are empty after that."""
    for file in files(settings):
        file.unlink(missing_ok=True)
    _remove_empty_folders()


def remove_kueue_links(settings: Settings) -> None:
    """The part of `remove_files` that is Kueue's."""
    for link in kueue_links(settings):
        link.unlink(missing_ok=True)
    _remove_empty_folders()


def _remove_empty_folders() -> None:
    for folder in SHARED_FOLDERS:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def find(settings: Settings) -> list[str]:
    """One line a thing that is left, empty when the machine is clean. Changes nothing."""
    names = (*PART_NAMES, *ADD_ON_NAMES)
    running = [f"process {name}" for name in names if processes.find_running(settings, name)]
    return [
        *running,
        *(f"process {pid} in cgroup" for pid in sorted(cgroups.processes())),
        *(f"mount {point}" for point in mounts.current([settings.state, settings.run])),
        *(f"cgroup {group}" for group in cgroups.existing()),
        *([f"network interface {BRIDGE}"] if network.has_bridge() else []),
        *(f"firewall table {family} {name}" for family, name in network.our_tables(settings)),
        *(f"file {path}" for path in files(settings)),
        *(f"folder {folder}" for folder in (settings.run, settings.cluster) if folder.exists()),
    ]
