"""Instance types, and what the accelerators put into a stage's pods."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest
from builders import make_job
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.core import accelerators
from finetune_operator.core.accelerators import instances
from finetune_operator.core.accelerators.instances import (
    BUILT_IN,
    NEURON_DEVICE,
    InstanceType,
    InstanceTypeError,
    find_instance_type,
    instance_types,
    requestable_cpu,
    requestable_memory_gib,
)
from finetune_trainer import contract

DEVICE_STAGES = (contract.COMPILE, contract.TRAIN)
CPU_STAGES = tuple(stage for stage in contract.STAGES if stage not in DEVICE_STAGES)


def job(kind: str, instance_type: str | None, nodes: int = 1) -> Any:
    return make_job(accelerator={"type": kind, "instanceType": instance_type, "nodes": nodes})


# the table


@pytest.mark.parametrize(
    ("name", "accelerator", "devices", "cores", "efa", "vcpus", "memory"),
    [
        ("ml.trn1.2xlarge", "neuron", 1, 2, 0, 8, 32),
        ("ml.trn1.32xlarge", "neuron", 16, 32, 8, 128, 512),
        ("ml.trn1n.32xlarge", "neuron", 16, 32, 16, 128, 512),
        ("ml.trn2.3xlarge", "neuron", 1, 4, 1, 12, 128),
        ("ml.trn2.48xlarge", "neuron", 16, 64, 16, 192, 2048),
        ("ml.inf2.24xlarge", "neuron", 6, 12, 0, 96, 384),
        ("ml.inf2.48xlarge", "neuron", 12, 24, 0, 192, 768),
        ("ml.p4d.24xlarge", "cuda", 8, 8, 4, 96, 1152),
        ("ml.p5.48xlarge", "cuda", 8, 8, 32, 192, 2048),
        ("ml.p5en.48xlarge", "cuda", 8, 8, 16, 192, 2048),
        ("ml.g5.8xlarge", "cuda", 1, 1, 1, 32, 128),
        ("ml.g5.12xlarge", "cuda", 4, 4, 1, 48, 192),
        ("ml.g5.48xlarge", "cuda", 8, 8, 1, 192, 768),
    ],
)
def test_the_table_says_what_aws_says(
    name: str, accelerator: str, devices: int, cores: int, efa: int, vcpus: int, memory: int
) -> None:
    found = BUILT_IN[name]
    assert (found.name, found.accelerator, found.devices, found.cores) == (name, accelerator, devices, cores)
    assert (found.efa, found.vcpus, found.memory_gib) == (efa, vcpus, memory)


def test_every_row_is_whole() -> None:
    for name, row in BUILT_IN.items():
        assert re.fullmatch(r"ml\.[a-z0-9]+\.[0-9]*xlarge", name)
        assert row.devices >= 1
        assert row.core_memory_gib * row.cores_per_device == row.device_memory_gib > 0
        assert row.bf16_tflops_per_device
        assert row.price_per_hour is None, "prices change by region and contract: they are the installation's"


def test_every_field_can_be_given_by_the_chart() -> None:
    assert {rule.attribute for rule in instances._RULES.values()} == {each.name for each in fields(InstanceType)} - {
        "name"
    }


def test_a_core_of_trainium_has_half_of_its_device() -> None:
    assert BUILT_IN["ml.trn1.32xlarge"].core_memory_gib == 16
    assert BUILT_IN["ml.trn2.48xlarge"].core_memory_gib == 24


@pytest.mark.parametrize("name", ["ml.trn1.32xlarge", "trn1.32xlarge"])
def test_a_name_is_known_with_and_without_its_prefix_and_keeps_its_spelling(name: str) -> None:
    found = find_instance_type(BUILT_IN, name)
    assert (found.name, found.cores) == (name, 32)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("ml.p5.24xlarge", ["ml.p5.24xlarge", "there are ml.p5.48xlarge"], id="a size that does not exist"),
        pytest.param("ml.h900.xlarge", ["ml.trn1.32xlarge", "ml.g5.xlarge"], id="a family that does not exist"),
    ],
)
def test_an_unknown_name_is_refused_with_what_there_is(name: str, words: list[str]) -> None:
    with pytest.raises(InstanceTypeError, match="instanceTypes in the values of the chart") as refused:
        find_instance_type(BUILT_IN, name)
    assert [word for word in words if word not in str(refused.value)] == []


# the chart's entries

DGX = {"accelerator": "cuda", "devices": 8, "vcpus": 224, "memoryGib": 2000, "deviceMemoryGib": 79.1}


def test_the_chart_adds_types_and_prices() -> None:
    types = instance_types({"dgx-h100": DGX, "trn1.32xlarge": {"pricePerHour": 21.5}, "ml.g5.xlarge": {"efa": 1}})
    assert types["dgx-h100"] == InstanceType(
        "dgx-h100", "cuda", devices=8, cores_per_device=1, efa=0, vcpus=224, memory_gib=2000, device_memory_gib=79.1
    )
    assert types["ml.trn1.32xlarge"].price_per_hour == 21.5
    assert types["ml.trn1.32xlarge"].devices == 16
    assert types["ml.g5.xlarge"].efa == 1
    assert set(types) == {*BUILT_IN, "dgx-h100"}
    assert BUILT_IN["ml.trn1.32xlarge"].price_per_hour is None


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        pytest.param("8 GPUs", ["instanceTypes.x is '8 GPUs'", "write a map"], id="text instead of a map"),
        pytest.param(
            {}, ["x.accelerator is missing", "x.devices is missing", "x.vcpus is missing"], id="an empty new type"
        ),
        pytest.param({**DGX, "gpus": 8}, ["x.gpus is no field", "deviceMemoryGib"], id="a field that does not exist"),
        pytest.param(
            {**DGX, "devices": -1}, ["x.devices is -1: write a whole number of at least 0"], id="a negative count"
        ),
        pytest.param({**DGX, "devices": 8.0}, ["x.devices is 8.0: write a whole number"], id="a fraction of devices"),
        pytest.param({**DGX, "vcpus": True}, ["x.vcpus is True"], id="a boolean instead of a number"),
        pytest.param(
            {**DGX, "pricePerHour": "21.5"}, ["x.pricePerHour is '21.5': write a number"], id="a price as text"
        ),
        pytest.param({**DGX, "memoryGib": float("nan")}, ["x.memoryGib is nan"], id="a memory that is no number"),
        pytest.param(
            {**DGX, "accelerator": "tpu"}, ["x.accelerator is 'tpu': write one of cpu, cuda, neuron"], id="a TPU"
        ),
        pytest.param({**DGX, "accelerator": "cpu"}, ["x.devices is 8: write 0"], id="a CPU node with devices"),
        pytest.param({**DGX, "devices": 0}, ["x.devices is 0: write how many"], id="a GPU node without devices"),
        pytest.param({**DGX, "deviceMemoryGib": 0}, ["x.deviceMemoryGib is 0"], id="a device without memory"),
    ],
)
def test_a_wrong_entry_is_refused_with_field_value_and_remedy(entry: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"instanceTypes\.x") as refused:
        instance_types({"x": entry})
    assert [word for word in words if word not in str(refused.value)] == []


def test_every_wrong_entry_is_listed_at_once() -> None:
    with pytest.raises(ValueError) as refused:
        instance_types({"a": {**DGX, "efa": -1}, "b": {**DGX, "vcpus": 0}, "ml.g5.xlarge": {"devices": "1"}})
    assert [name for name in ("a.efa", "b.vcpus", "ml.g5.xlarge.devices") if name not in str(refused.value)] == []


# requests


def test_a_pod_with_the_node_to_itself_requests_what_the_hyperpod_cli_would() -> None:
    trn1 = BUILT_IN["ml.trn1.32xlarge"]
    assert (requestable_cpu(trn1), requestable_memory_gib(trn1)) == (119, 461)


@given(st.integers(1, 512), st.integers(1, 4096))
def test_a_request_never_exceeds_the_node_and_grows_with_it(vcpus: int, memory: int) -> None:
    def of(cpus: int, gib: int) -> tuple[int, int]:
        made = InstanceType("x", "cpu", 0, 1, 0, cpus, gib)
        return requestable_cpu(made), requestable_memory_gib(made)

    small, large = of(vcpus, memory), of(vcpus + 1, memory + 1)
    assert 1 <= small[0] <= max(1, vcpus)
    assert 1 <= small[1] <= max(1, memory)
    assert small <= large


# what pods get

NEURON_ENV = {
    "NEURON_RT_NUM_CORES": "32",
    "NEURON_CC_FLAGS": "--model-type=transformer --distribution-strategy=llm-training --enable-saturate-infinity "
    "--cache_dir=/workspace/finetune/neuron-cache",
    "NEURON_COMPILE_CACHE_URL": "/workspace/finetune/neuron-cache",
    "HF_HUB_OFFLINE": "1",
    "NEURON_FUSE_SOFTMAX": "1",
    "NEURON_RT_STOCHASTIC_ROUNDING_EN": "1",
    "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS": "5",
    "MALLOC_ARENA_MAX": "70",
    "OMP_NUM_THREADS": "1",
}
EFA_ENV = {"FI_PROVIDER": "efa", "FI_EFA_USE_HUGE_PAGE": "0"}


def test_one_trainium_node_is_taken_whole_and_needs_no_network() -> None:
    neuron = accelerators.of(job("neuron", "ml.trn1.32xlarge"))
    assert neuron.procs_per_node == 32
    flags = NEURON_ENV["NEURON_CC_FLAGS"].replace("--cache_dir", "--target=trn1 --cache_dir")
    assert neuron.env("train") == {**NEURON_ENV, "NEURON_CC_FLAGS": flags}
    assert neuron.resources("train") == {"aws.amazon.com/neuron": "16"}
    assert neuron.requests("train") == {"cpu": "119", "memory": "461Gi"}
    assert neuron.node_selector("train") == {"node.kubernetes.io/instance-type": "ml.trn1.32xlarge"}
    assert neuron.tolerations("train") == (
        {"key": "aws.amazon.com/neuron", "operator": "Exists", "effect": "NoSchedule"},
    )
    assert neuron.shared_memory("train") == "57Gi"


def test_several_trainium_nodes_talk_over_all_their_interfaces() -> None:
    neuron = accelerators.of(job("neuron", "ml.trn1n.32xlarge", nodes=4), device_resource=NEURON_DEVICE)
    assert neuron.resources("train") == {"aws.amazon.com/neurondevice": "16", "vpc.amazonaws.com/efa": "16"}
    rdma = {"FI_EFA_USE_DEVICE_RDMA": "1", "FI_EFA_FORK_SAFE": "1"}
    assert neuron.env("train") == {**NEURON_ENV, **EFA_ENV, **rdma}


def test_several_gpu_nodes() -> None:
    cuda = accelerators.of(job("cuda", "p5.48xlarge", nodes=2))
    assert cuda.procs_per_node == 8
    assert cuda.resources("train") == {"nvidia.com/gpu": "8", "vpc.amazonaws.com/efa": "32"}
    assert cuda.env("train") == {"OMP_NUM_THREADS": "1", **EFA_ENV, "NCCL_SOCKET_IFNAME": "^lo,docker,veth"}
    assert cuda.node_selector("train") == {"node.kubernetes.io/instance-type": "p5.48xlarge"}
    assert cuda.tolerations("train") == ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},)


def test_nodes_without_efa_talk_over_tcp() -> None:
    cuda = accelerators.of(job("cuda", "ml.g5.2xlarge", nodes=2))
    assert cuda.resources("train") == {"nvidia.com/gpu": "1"}
    assert cuda.env("train") == {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", sorted(BUILT_IN))
@pytest.mark.parametrize("nodes", [1, 2])
def test_cpu_stages_never_ask_for_a_device(name: str, nodes: int) -> None:
    made = accelerators.of(job(BUILT_IN[name].accelerator, name, nodes))
    for stage in CPU_STAGES:
        assert made.env(stage) == made.resources(stage) == made.requests(stage) == made.node_selector(stage) == {}
        assert (made.tolerations(stage), made.shared_memory(stage)) == ((), None)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_compile_runs_as_train_does_or_its_graphs_would_not_be_found(name: str) -> None:
    made = accelerators.of(job(BUILT_IN[name].accelerator, name, nodes=2))
    for part in (made.env, made.resources, made.requests, made.node_selector, made.tolerations, made.shared_memory):
        assert part(contract.COMPILE) == part(contract.TRAIN)
        assert part(contract.TRAIN)


def test_cpu_takes_processes_from_the_spec_and_asks_for_nothing() -> None:
    cpu = accelerators.of(make_job(accelerator={"processesPerNode": 4}))
    assert cpu.procs_per_node == 4
    for stage in contract.STAGES:
        assert cpu.env(stage) == cpu.resources(stage) == cpu.requests(stage) == cpu.node_selector(stage) == {}


def test_cpu_training_stays_on_the_instance_type_that_was_asked_for() -> None:
    cpu = accelerators.of(job("cpu", "ml.m5.4xlarge"))
    assert cpu.node_selector("train") == {"node.kubernetes.io/instance-type": "ml.m5.4xlarge"}
    assert cpu.node_selector("prepare") == {}


def test_the_installations_own_types_are_used() -> None:
    cuda = accelerators.of(job("cuda", "dgx-h100", nodes=2), instance_types({"dgx-h100": {**DGX, "efa": 2}}))
    assert cuda.resources("train") == {"nvidia.com/gpu": "8", "vpc.amazonaws.com/efa": "2"}


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        pytest.param("neuron", "ml.p5.48xlarge", "has accelerator cuda, but .* is neuron", id="Trainium on a GPU node"),
        pytest.param("cuda", "ml.p9.48xlarge", "ml.p9.48xlarge is not known", id="a type that does not exist"),
    ],
)
def test_a_job_with_the_wrong_instance_type_is_refused(kind: str, name: str, words: str) -> None:
    with pytest.raises(InstanceTypeError, match=words):
        accelerators.of(job(kind, name))
