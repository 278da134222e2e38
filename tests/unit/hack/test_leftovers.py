"""Finding what is ours on a machine, from what the kernel and the tools tell."""

from pathlib import Path

import pytest
from local_cluster import cgroups, leftovers, mounts, network
from local_cluster.settings import Settings

MOUNTINFO = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
31 22 0:40 / /s/cluster/kubelet/pods/1/volumes/token rw - tmpfs tmpfs rw
32 22 0:41 / /s/cluster/kubelet/pods/1/volumes/a\\040b rw - tmpfs tmpfs rw
33 22 0:42 / /run/other rw - tmpfs tmpfs rw
34 22 0:43 / /r/containerd/rootfs rw - overlay overlay rw
35 22 0:44 / /r-not-ours rw - tmpfs tmpfs rw
"""


def test_mounts_below_our_folders_are_found_newest_first() -> None:
    assert mounts.mounts_below(MOUNTINFO, [Path("/s"), Path("/r")]) == [
        Path("/r/containerd/rootfs"),
        Path("/s/cluster/kubelet/pods/1/volumes/a b"),
        Path("/s/cluster/kubelet/pods/1/volumes/token"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", ["/sys/fs/cgroup"], id="version 2"),
        pytest.param(
            "cgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n",
            ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/pids"],
            id="version 1 has one a controller",
        ),
        pytest.param(
            "cgroup /sys/fs/cgroup/pids cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n",
            ["/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified"],
            id="hybrid lists version 2 last",
        ),
        pytest.param("tmpfs /tmp tmpfs rw 0 0\n", [], id="a machine without any"),
    ],
)
def test_cgroup_hierarchies(text: str, expected: list[str]) -> None:
    assert [str(path) for path in cgroups.hierarchies(text)] == expected


def test_only_cables_of_our_bridge_are_ours() -> None:
    interfaces: list[dict[str, object]] = [
        {"ifname": "eth0"},
        {"ifname": "veth1", "master": "ftcluster0"},
        {"ifname": "veth2", "master": "docker0"},
    ]
    assert network.our_veths(interfaces) == ["veth1"]


def test_only_network_results_of_our_pods_are_ours(tmp_path: Path) -> None:
    (tmp_path / "ours").write_text('{"sandbox":"/r/containerd/netns/cni-1"}')
    (tmp_path / "others").write_text('{"sandbox":"/run/netns/cni-2"}')
    assert leftovers.cni_results(tmp_path, Path("/r")) == [tmp_path / "ours"]


def test_only_log_links_to_our_pods_are_ours(tmp_path: Path) -> None:
    (tmp_path / "ours.log").symlink_to("/s/cluster/pod-logs/a/0.log")
    (tmp_path / "others.log").symlink_to("/var/log/pods/a/0.log")
    assert leftovers.container_logs(tmp_path, Path("/s/cluster/pod-logs")) == [tmp_path / "ours.log"]


def test_only_kueues_links_to_our_certificates_are_ours(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "certs"
    folder.mkdir()
    (folder / "tls.crt").symlink_to(settings.pki / "kueue.crt")
    (folder / "tls.key").write_text("somebody else's")
    monkeypatch.setattr(leftovers, "KUEUE_METRICS_CERTIFICATES", folder)
    assert leftovers.kueue_links(settings) == [folder / "tls.crt"]
    leftovers.remove_kueue_links(settings)
    assert [file.name for file in folder.iterdir()] == ["tls.key"]
