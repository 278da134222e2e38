"""Preflight judges injected facts: each problem is one sentence with its remedy."""

from dataclasses import replace

import pytest
from local_cluster.preflight import GIB, Listener, Machine, conflicts, listeners, needed_gib, problems

FINE = Machine(
    is_root=True,
    is_linux=True,
    missing_modules=(),
    has_go=True,
    missing_packages=(),
    has_apt=True,
    has_base=True,
    image_gib=0,
    free_bytes=100 * GIB,
    disk="/var/lib/finetune-cluster",
    file_systems=("ext4", "overlay"),
    has_cgroups=True,
    taken={},
)


def test_a_machine_that_has_everything_has_no_problems() -> None:
    assert problems(FINE) == []


@pytest.mark.parametrize(
    ("machine", "sentences"),
    [
        pytest.param(replace(FINE, is_root=False), ["run it as root"], id="without root it says how to get by"),
        pytest.param(replace(FINE, is_linux=False), ["CLUSTER=existing"], id="another system is sent away"),
        pytest.param(
            replace(FINE, missing_modules=("kubernetes",), has_go=False),
            ["build kubernetes with: install Go 1.25"],
            id="go is asked for if needed",
        ),
        pytest.param(replace(FINE, has_go=False), [], id="go is not asked for if everything is built"),
        pytest.param(
            replace(FINE, missing_packages=("runc",), has_apt=False),
            ["runc"],
            id="packages are named without apt",
        ),
        pytest.param(replace(FINE, missing_packages=("runc",)), [], id="packages are no problem where apt is"),
        pytest.param(
            replace(FINE, file_systems=("ext4",)),
            ["modprobe overlay"],
            id="overlay can be loaded",
        ),
        pytest.param(replace(FINE, has_cgroups=False), ["/sys/fs/cgroup"], id="a machine without cgroups is refused"),
        pytest.param(
            replace(FINE, taken={6443: "process 77 (k3s)"}),
            ["port 6443, which kube-apiserver needs, is taken by process 77 (k3s)"],
            id="a taken port names who needs it and who has it",
        ),
        pytest.param(
            replace(FINE, free_bytes=GIB), ["has 1 GiB free and 2 GiB are needed"], id="a full disk names both figures"
        ),
        pytest.param(
            replace(FINE, is_root=False, has_cgroups=False), ["as root", "cgroup"], id="all problems are told at once"
        ),
    ],
)
def test_each_problem_is_a_sentence_with_its_remedy(machine: Machine, sentences: list[str]) -> None:
    found = problems(machine)
    assert len(found) == len(sentences)
    assert all(sentence in problem for sentence, problem in zip(sentences, found, strict=True))


def test_needed_disk_is_that_of_what_is_missing() -> None:
    cold = replace(FINE, missing_modules=("kubernetes", "buildkit"), has_base=False, image_gib=22)
    assert needed_gib(FINE) < needed_gib(replace(FINE, has_base=False)) < needed_gib(cold)
    assert needed_gib(cold) >= 22


PROC_NET_TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:192B 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1111 1
   1: 00000000:2811 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2222 1
   2: 0100007F:9999 0100007F:192B 01 00000000:00000000 00:00000000 00000000     0        0 3333 1
"""
PROC_NET_TCP6 = """\
  sl  local_address                         remote_address                        st ...
   0: 00000000000000000000000000000000:192B 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 4444 1
   1: 00000000000000000000000001000000:2811 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 5555 1
"""


def test_listening_sockets_are_read_from_the_kernels_table() -> None:
    assert listeners(PROC_NET_TCP) == [Listener("127.0.0.1", 6443, "1111"), Listener("0.0.0.0", 10257, "2222")]


def test_of_ipv6_only_the_wildcard_counts() -> None:
    assert [(listener.address, listener.port) for listener in listeners(PROC_NET_TCP6)] == [("0.0.0.0", 6443)]


@pytest.mark.parametrize(
    ("address", "port", "taken"),
    [
        pytest.param("0.0.0.0", 53, True, id="a name server on every address is in the way"),
        pytest.param("127.0.0.53", 53, False, id="the resolver of systemd is not in the way"),
        pytest.param("192.0.2.1", 6443, True, id="the API server wants its port on every address"),
        pytest.param("127.0.0.1", 80, False, id="a port that the cluster does not use is free to use"),
    ],
)
def test_a_socket_conflicts_only_on_an_address_of_ours(address: str, port: int, taken: bool) -> None:
    assert (port in conflicts([Listener(address, port, "1")])) is taken


@pytest.mark.parametrize(
    ("add_ons", "taken"),
    [
        pytest.param((), False, id="a port of an add-on that nobody asked for is free to use"),
        pytest.param(("kwok",), False, id="another add-on does not need it"),
        pytest.param(("kueue",), True, id="its own add-on does"),
    ],
)
def test_ports_of_add_ons_count_when_they_are_wanted(add_ons: tuple[str, ...], taken: bool) -> None:
    assert (12443 in conflicts([Listener("0.0.0.0", 12443, "1")], add_ons)) is taken
