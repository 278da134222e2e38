"""`up` and `down`: from whatever state the machine is in to a running cluster, or to nothing left.

`up` starts only what does not run or was started with other inputs, so it is also the repair after a crash. `down`
ends processes by record and by cgroup, then removes what they made, then looks for leftovers.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from . import binaries, cgroups, config, images, leftovers, mounts, network, packages, pki, preflight, probes, processes
from .parts import PART_NAMES, Part, cluster_parts
from .problem import ClusterProblem
from .settings import NODE_NAME, POD_UID, Settings
from .terminal import Progress, say

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BUILD_CACHE_BYTES = 24 * config.GIB  # twice the installed dependencies of the trainer image, as layer and as blob


def check_machine(settings: Settings, image_gib: int) -> None:
    """Refuse with every problem at once, before anything is changed."""
    if os.geteuid() == 0:
        network.load_modules()
    found = preflight.problems(preflight.observe(settings, image_gib))
    if found:
        raise ClusterProblem("the cluster cannot start:\n" + "\n".join(f"  - {problem}" for problem in found))


def build(settings: Settings) -> None:
    """Packages, binaries and base image: all that `up` needs and a fresh machine lacks."""
    packages.install(packages.missing())
    binaries.build_missing(settings)
    images.make_base(settings)


def up(settings: Settings, image_gib: int = 0) -> None:
    """Bring the cluster to running. Raises ClusterProblem with the failing part's last log lines."""
    check_machine(settings, image_gib)
    build(settings)
    with binaries.exclusive(settings.state / "lock", "it starts or stops the cluster"):
        if _made_before_reboot(settings):
            say("  the machine was restarted since: clearing what is left of the last run")
            _remove_runtime(settings)
        _prepare(settings)
        for part in cluster_parts(settings, binaries.programs(settings)):
            _ensure(settings, part)
            if part.name == "containerd":
                images.import_node_images(settings)
            if part.name == "kube-apiserver":
                _apply_dns_rbac(settings)
        _wait_for_cluster(settings)


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


def _oom_score_restricted() -> bool:
    """Whether this process lacks CAP_SYS_RESOURCE (bit 24), as root in a container or a small VM may."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return not int(line.split()[1], 16) >> 24 & 1
    return True


def _ensure(settings: Settings, part: Part) -> None:
    """Start the part unless it runs with these very inputs, and wait until it is ready."""
    env = {"PATH": _PATH, "HOME": "/root", **part.env}
    inputs = processes.inputs_digest(part.argv, env, part.files)
    running = processes.find_running(settings, part.name)
    if running is not None and running.inputs == inputs and probes.probe(settings, part.probe) is None:
        return
    with Progress(part.name) as line:
        if running is None or running.inputs != inputs:
            processes.stop(settings, part.name)
            running = processes.start(settings, part.name, part.argv, env, inputs)

        def check() -> str | None:
            if processes.find_running(settings, part.name) is None:
                raise ClusterProblem(f"{part.name} ended")
            return probes.probe(settings, part.probe)

        try:
            probes.wait(line, part.name, part.ready_within_s, check)
        except ClusterProblem as problem:
            tail = processes.log_tail(settings, part.name)
            log = settings.logs / f"{part.name}.log"
            raise ClusterProblem(f"{problem}; the end of {log}:\n{tail}") from problem


def kubectl(settings: Settings, *arguments: str, stdin: str | None = None) -> str:
    """kubectl as the admin; its output."""
    argv = [str(binaries.programs(settings)["kubectl"]), "--kubeconfig", str(settings.kubeconfig), *arguments]
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterProblem(f"`kubectl {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout


def _apply_dns_rbac(settings: Settings) -> None:
    items = {"apiVersion": "v1", "kind": "List", "items": config.dns_rbac()}
    kubectl(settings, "apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(items))


def _wait_for_cluster(settings: Settings) -> None:
    """The node is ready and pods can be admitted: the default namespace has its service account."""

    def node() -> str | None:
        listed = json.loads(kubectl(settings, "get", "node", "--ignore-not-found", NODE_NAME, "-o", "json") or "{}")
        conditions = listed.get("status", {}).get("conditions", [])
        ready = next((item for item in conditions if item["type"] == "Ready"), None)
        if ready is None:
            return "the node has not registered"
        return None if ready["status"] == "True" else str(ready["message"])

    def service_account() -> str | None:
        found = kubectl(settings, "get", "serviceaccount", "default", "--ignore-not-found", "-o", "name")
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
    for name in ("kubelet", "kube-proxy", "coredns", "kube-scheduler", "kube-controller-manager", "buildkitd"):
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
