"""Rendered configuration and command lines of the parts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomllib
from local_cluster import config
from local_cluster.parts import ADD_ON_NAMES, PART_NAMES, cluster_parts, kueue_part, kwok_part
from local_cluster.pki import AUTHORITIES, CERTIFICATES, CLIENTS, kubeconfig
from local_cluster.settings import OPERATOR_USER, PORTS, Settings, read_settings
from local_cluster.workspace import claim

SETTINGS = Settings(cache=Path("/c"), state=Path("/s"), run=Path("/r"), source=Path("/tree/hack/cluster"))
PROGRAMS = {name: Path("/bin") / name for name in (*PART_NAMES, *ADD_ON_NAMES, "kubectl")}


def test_containerd_keeps_to_folders_of_its_own() -> None:
    parsed = tomllib.loads(config.containerd(SETTINGS, "localhost/finetune-pause:1", oom_score_restricted=True))
    cri = parsed["plugins"]["io.containerd.grpc.v1.cri"]
    assert parsed["root"].startswith("/s/")
    assert parsed["state"].startswith("/r/")
    assert parsed["grpc"]["address"] == str(SETTINGS.containerd_socket)
    assert cri["sandbox_image"] == "localhost/finetune-pause:1"
    assert cri["restrict_oom_score_adj"] is True
    assert cri["containerd"]["runtimes"]["runc"]["options"]["Root"] == "/r/runc"


def test_buildkitd_builds_into_the_kubelets_store() -> None:
    parsed = tomllib.loads(config.buildkitd(SETTINGS, 10 * config.GIB))
    worker = parsed["worker"]["containerd"]
    assert parsed["worker"]["oci"]["enabled"] is False
    assert (worker["address"], worker["namespace"]) == (str(SETTINGS.containerd_socket), "k8s.io")
    assert worker["maxUsedSpace"] == 10 * 1024**3


@pytest.mark.parametrize("render", [config.kube_proxy, config.cni], ids=["kube-proxy", "cni"])
def test_json_configuration_parses(render: Callable[[Settings], str]) -> None:
    assert json.loads(render(SETTINGS))


def test_the_kubelet_never_deletes_images_and_never_evicts_for_disk() -> None:
    parsed = json.loads(config.kubelet(SETTINGS, "/etc/resolv.conf"))
    assert parsed["imageGCHighThresholdPercent"] == 100
    assert list(parsed["evictionHard"]) == ["memory.available"]


@pytest.mark.parametrize(
    ("resolv_conf", "has"),
    [
        pytest.param("nameserver 192.0.2.53\n", True, id="a name server is found"),
        pytest.param("# nameserver 192.0.2.53\nsearch example.org\n", False, id="a comment is none"),
    ],
)
def test_names_outside_are_forwarded_only_where_the_host_has_a_resolver(resolv_conf: str, has: bool) -> None:
    assert config.has_nameserver(resolv_conf) is has
    assert ("forward" in config.corefile(SETTINGS, "/etc/resolv.conf", has)) is has


def test_an_unchanged_file_is_not_touched(tmp_path: Path) -> None:
    config.write(tmp_path / "a", "text")
    before = (tmp_path / "a").stat().st_mtime_ns
    config.write(tmp_path / "a", "text")
    assert (tmp_path / "a").stat().st_mtime_ns == before


def test_every_part_has_a_name_a_probe_and_absolute_paths() -> None:
    parts = cluster_parts(SETTINGS, PROGRAMS)
    assert tuple(part.name for part in parts) == PART_NAMES
    assert all(part.argv[0].startswith("/") for part in parts)
    assert {part.probe.partition(":")[0] for part in parts} == {"http", "https", "unix"}
    assert set(PORTS) <= {*PART_NAMES, *ADD_ON_NAMES}


def test_no_two_parts_listen_on_one_port() -> None:
    ports = [port for places in PORTS.values() for _, port in places]
    assert len(ports) == len(set(ports))


def _level(user: str, groups: list[str]) -> str:
    """What the audit policy keeps of a user's requests: the first rule that fits, as the API server applies them."""
    rules: list[dict[str, Any]] = json.loads(config.audit_policy())["rules"]
    for rule in rules:
        fits_user = "users" not in rule or user in rule["users"]
        fits_group = "userGroups" not in rule or set(groups) & set(rule["userGroups"])
        if fits_user and fits_group:
            return str(rule["level"])
    return "None"


@pytest.mark.parametrize(
    ("user", "groups", "level"),
    [
        pytest.param(
            "system:serviceaccount:team-a:finetune-operator",
            ["system:serviceaccounts", "system:serviceaccounts:team-a"],
            "Metadata",
            id="the operator, in whatever namespace it is installed",
        ),
        pytest.param(OPERATOR_USER, ["system:authenticated"], "Metadata", id="an operator under test"),
        pytest.param(
            "system:serviceaccount:kube-system:job-controller",
            ["system:serviceaccounts", "system:serviceaccounts:kube-system"],
            "None",
            id="not Kubernetes' own controllers",
        ),
        pytest.param("finetune-admin", ["system:masters"], "None", id="not the admin"),
        pytest.param("system:node:finetune-node", ["system:nodes"], "None", id="not the kubelet"),
        pytest.param("kueue", ["system:authenticated"], "None", id="not an add-on"),
    ],
)
def test_the_audit_log_keeps_the_operators_requests(user: str, groups: list[str], level: str) -> None:
    assert _level(user, groups) == level


def test_the_audit_log_is_bounded_and_goes_with_the_cluster() -> None:
    parts = {part.name: part for part in cluster_parts(SETTINGS, PROGRAMS)}
    flags = dict(word.split("=", 1) for word in parts["kube-apiserver"].argv[1:])
    assert flags["--audit-log-path"] == str(SETTINGS.audit_log)
    assert SETTINGS.audit_log.is_relative_to(SETTINGS.cluster)
    assert int(flags["--audit-log-maxsize"]) * (1 + int(flags["--audit-log-maxbackup"])) == 100
    assert Path(flags["--audit-policy-file"]) in parts["kube-apiserver"].files


def test_every_certificate_that_a_part_names_is_made() -> None:
    made = {
        f"{name}.{kind}" for name in (*AUTHORITIES, *(leaf.name for leaf in CERTIFICATES)) for kind in ("crt", "key")
    }
    made |= {f"{name}.kubeconfig" for name in CLIENTS} | {"service-accounts.key", "service-accounts.pub"}
    add_ons = (kueue_part(SETTINGS, Path("/bin/kueue")), kwok_part(SETTINGS, Path("/bin/kwok"), ()))
    text = " ".join(" ".join(part.argv) for part in (*cluster_parts(SETTINGS, PROGRAMS), *add_ons))
    named = {word.rpartition("/")[2] for word in text.split() if f"{SETTINGS.pki}/" in word}
    assert named
    assert named <= made


def test_a_kubeconfig_names_files_and_holds_no_secret() -> None:
    made: Any = kubeconfig("admin", SETTINGS.pki)
    assert made["users"][0]["user"] == {
        "client-certificate": f"{SETTINGS.pki}/admin.crt",
        "client-key": f"{SETTINGS.pki}/admin.key",
    }


def test_folders_come_from_the_environment() -> None:
    settings = read_settings({"FINETUNE_CACHE": "/x", "HOME": "/home/a", "KUBEBUILDER_ASSETS": "/assets"}, Path("/t"))
    assert (settings.cache, settings.assets) == (Path("/x"), Path("/assets"))
    assert read_settings({"HOME": "/home/a"}, Path("/t")).cache == Path("/home/a/.cache/finetune-operator")
    assert read_settings({"HOME": "/a", "XDG_CACHE_HOME": "/d"}, Path("/t")).cache == Path("/d/finetune-operator")


def test_volume_and_claim_name_each_other() -> None:
    made: Any = claim(SETTINGS, "team", "fsx-claim")
    volume, wanted = made["items"]
    assert wanted["spec"]["volumeName"] == volume["metadata"]["name"] == "team-fsx-claim"
    assert volume["spec"]["claimRef"]["namespace"] == wanted["metadata"]["namespace"] == "team"
    assert volume["spec"]["storageClassName"] == wanted["spec"]["storageClassName"] == ""
