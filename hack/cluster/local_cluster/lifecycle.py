"""`up` and `down`: from whatever state the machine is in to a running cluster, or to nothing left.

`up` starts only what does not run or was started with other inputs, so it is also the repair after a crash. `down`
ends processes by record and by cgroup, then removes what they made, then looks for leftovers.
"""

import os
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from . import (
    binaries,
    cgroups,
    config,
    images,
    kubectl,
    kueue,
    kwok,
    leftovers,
    mounts,
    network,
    packages,
    pki,
    preflight,
    probes,
    processes,
    supervise,
)
from .parts import ADD_ON_NAMES, PART_NAMES, cluster_parts
from .problem import ClusterProblem
from .settings import NODE_NAME, POD_UID, Settings
from .terminal import Progress, say

_BUILD_CACHE_BYTES = 24 * config.GIB  # twice the installed dependencies of the trainer image, as layer and as blob
# How `up` starts an add-on that was running when the machine or the add-on went down.
_START_AGAIN: dict[str, Callable[[Settings], None]] = {kueue.NAME: kueue.resume, kwok.NAME: kwok.resume}


def check_machine(settings: Settings, image_gib: int, add_ons: Collection[str] = ()) -> None:
    """Refuse with every problem at once, before anything is changed."""
    if os.geteuid() == 0:
        network.load_modules()
    found = preflight.problems(preflight.observe(settings, image_gib, add_ons))
    if found:
        raise ClusterProblem("the cluster cannot start:\n" + "\n".join(f"  - {problem}" for problem in found))


def build(settings: Settings, add_ons: Collection[str] = ()) -> None:
    """Packages, binaries and base image: all that `up` needs and a fresh machine lacks."""
    packages.install(packages.missing())
    binaries.build_missing(settings, add_ons)
    images.make_base(settings)


def up(settings: Settings, image_gib: int = 0) -> None:
    """Bring the cluster to running. Raises ClusterProblem with the failing part's last log lines."""
    add_ons = wanted_add_ons(settings)
    check_machine(settings, image_gib, add_ons)
    build(settings, add_ons)
    with binaries.exclusive(settings.state / "lock", "it starts or stops the cluster"):
        if _made_before_reboot(settings):
            say("  the machine was restarted since: clearing what is left of the last run")
            _remove_runtime(settings)
        _prepare(settings)
        for part in cluster_parts(settings, binaries.programs(settings)):
            supervise.ensure(settings, part)
            if part.name == "containerd":
                images.import_node_images(settings)
            if part.name == "kube-apiserver":
                _apply_dns_rbac(settings)
        _wait_for_cluster(settings)
        for name in add_ons:
            _START_AGAIN[name](settings)


def wanted_add_ons(settings: Settings) -> tuple[str, ...]:
    """The add-ons that were started in this cluster's life and not stopped, whether they run or not."""
    return tuple(name for name in ADD_ON_NAMES if (settings.config / f"{name}.json").exists())


def start_add_on(settings: Settings, name: str, start: Callable[[Settings], None]) -> None:
    """Build the add-on if it was never built, then `start` it in the running cluster."""
    _require_api_server(settings, f"{name} up")
    check_machine(settings, 0, (*wanted_add_ons(settings), name))
    binaries.build_missing(settings, (name,))
    with binaries.exclusive(settings.state / "lock", "it starts or stops the cluster"):
        start(settings)


def stop_add_on(settings: Settings, name: str, stop: Callable[[Settings], None]) -> None:
    """`stop` the add-on, which may be dead or never have been started."""
    _require_api_server(settings, f"{name} down")
    with binaries.exclusive(settings.state / "lock", "it starts or stops the cluster"):
        stop(settings)


def _require_api_server(settings: Settings, command: str) -> None:
    if os.geteuid() != 0:
        raise ClusterProblem(f"`{command}` needs root, like `up`")
    if processes.find_running(settings, "kube-apiserver") is None:
        raise ClusterProblem(f"no cluster is running: `cluster.py up` first, then `cluster.py {command}`")


def _made_before_reboot(settings: Settings) -> bool:
    marker = settings.run / "boot-id"
    return marker.exists() and marker.read_text() != processes.boot_id()


def _prepare(settings: Settings) -> None:
    """Folders, certificates, configuration files, control groups, network."""
    for folder in (settings.run, settings.cluster / "tmp", settings.cluster / "volume-plugins", settings.logs):
        folder.mkdir(parents=True, exist_ok=True)
    settings.cluster.chmod(0o755)
    if not settings.workspace.exists():
        settings.workspace.mkdir(parents=True)
        os.chown(settings.workspace, POD_UID, POD_UID)
        settings.workspace.chmod(0o777)
    (settings.run / "boot-id").write_text(processes.boot_id())
    pki.create(settings)
    cgroups.create_root()
    network.create(settings)
    _write_config(settings)


def _write_config(settings: Settings) -> None:
    folder = settings.config
    resolv_conf = config.host_resolv_conf()
    upstream = Path(resolv_conf).exists() and config.has_nameserver(Path(resolv_conf).read_text())
    pause = images.pause_reference(binaries.programs(settings)["pause"])
    config.write(folder / "containerd.toml", config.containerd(settings, pause, _oom_score_restricted()))
    config.write(folder / "cni" / "10-finetune.conflist", config.cni(settings))
    config.write(folder / "kubelet.json", config.kubelet(settings, resolv_conf))
    config.write(folder / "kube-proxy.json", config.kube_proxy(settings))
    config.write(folder / "Corefile", config.corefile(settings, resolv_conf, upstream))
    config.write(folder / "buildkitd.toml", config.buildkitd(settings, _BUILD_CACHE_BYTES))
    config.write(folder / "audit-policy.json", config.audit_policy())
    settings.audit_log.parent.mkdir(mode=0o700, exist_ok=True)


def _oom_score_restricted() -> bool:
    """Whether this process lacks CAP_SYS_RESOURCE (bit 24), as root in a container or a small VM may."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return not int(line.split()[1], 16) >> 24 & 1
    return True


def _apply_dns_rbac(settings: Settings) -> None:
    kubectl.apply(settings, config.dns_rbac())


def _wait_for_cluster(settings: Settings) -> None:
    """The node is ready and pods can be admitted: the default namespace has its service account."""

    def node() -> str | None:
        listed = kubectl.find(settings, "node", NODE_NAME)
        conditions = listed[0]["status"].get("conditions", []) if listed else []
        ready = next((item for item in conditions if item["type"] == "Ready"), None)
        if ready is None:
            return "the node has not registered"
        return None if ready["status"] == "True" else str(ready["message"])

    def service_account() -> str | None:
        found = kubectl.find(settings, "serviceaccount", "default")
        return None if found else "the default namespace has no service account yet"

    if node() is None and service_account() is None:
        return
    with Progress("node") as line:
        try:
            probes.wait(line, "the node", 90.0, node)
        except ClusterProblem as problem:
            tail = processes.log_tail(settings, "kubelet")
            raise ClusterProblem(f"{problem}; the end of the kubelet's log:\n{tail}") from problem
        probes.wait(line, "the default service account", 30.0, service_account)


def down(settings: Settings, purge: bool = False) -> None:
    """End and remove everything but the caches and the workspace, or those too. Raises naming what is left."""
    if os.geteuid() != 0:
        raise ClusterProblem("`down` needs root, like `up`")
    settings.state.mkdir(parents=True, exist_ok=True)
    with binaries.exclusive(settings.state / "lock", "it starts or stops the cluster"):
        with Progress("cluster", done="stopped"):
            _end_processes(settings)
            _remove_runtime(settings)
            _delete(settings.cluster)
        left = leftovers.find(settings)
    if left:
        listed = "\n".join(f"  - {thing}" for thing in left)
        raise ClusterProblem(f"the cluster is stopped, but this is left:\n{listed}")
    if purge:
        _delete(settings.state)


def _end_processes(settings: Settings) -> None:
    # The kubelet first, or it would start again what is ended next; containerd while it can still forget containers.
    workers = ("kubelet", "kube-proxy", "coredns", "kube-scheduler", "kube-controller-manager", "buildkitd")
    for name in (*ADD_ON_NAMES, *workers):
        processes.stop(settings, name)
    for group in ("kubepods", "buildkit"):
        cgroups.end_processes(group)
    if processes.find_running(settings, "containerd"):
        _forget_containers(settings)
    for name in reversed(PART_NAMES):
        processes.stop(settings, name)
    cgroups.end_processes()  # shims, and whatever a crash left


def _forget_containers(settings: Settings) -> None:
    """Delete the dead containers' records and layers from the image store, which outlives the cluster."""
    for kind, force in (("tasks", ["--force"]), ("containers", [])):
        try:
            listed = images.ctr(settings, kind, "list", "--quiet").split()
            if listed:
                images.ctr(settings, kind, "delete", *force, *listed)
        except ClusterProblem as problem:
            if kind == "containers":
                # Harmless: the next cluster's kubelet collects containers that it does not know. A task that could not
                # be deleted has ended by itself in between, and only its container's record says whether that is so.
                say(f"  some containers are still recorded: {problem}")


def _remove_runtime(settings: Settings) -> None:
    """Mounts, files in other folders, network, control groups, `run`. Processes must be gone."""
    mounts.unmount_all([settings.cluster, settings.run, settings.state])
    leftovers.remove_files(settings)
    network.remove(settings)
    cgroups.remove()
    _delete(settings.run)


def _delete(folder: Path) -> None:
    """Delete a folder that nothing is mounted in; a mount that could not be undone must not lose its contents."""
    if not folder.exists():
        return
    mounted: Iterable[Path] = mounts.current([folder])
    names = ", ".join(str(point) for point in mounted)
    if names:
        raise ClusterProblem(f"{folder} is not deleted, since this is still mounted in it: {names}")
    shutil.rmtree(folder)
