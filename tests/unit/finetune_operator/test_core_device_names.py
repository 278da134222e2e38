"""aws.amazon.com/neuron or aws.amazon.com/neurondevice: what nodes and ClusterQueue say."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.api.constants import Reason
from finetune_operator.core.accelerators.instances import BUILT_IN, NEURON, NEURON_DEVICE, NVIDIA_GPU, instance_types
from finetune_operator.core.device_names import DeviceName, Mismatch, find_device_resource
from finetune_operator.core.nodes import NodeState

TRN1 = BUILT_IN["ml.trn1.32xlarge"]


def node(instance_type: str = TRN1.name, **devices: int) -> NodeState:
    names = {"neuron": NEURON, "neurondevice": NEURON_DEVICE, "gpu": NVIDIA_GPU}
    return NodeState("n", instance_type=instance_type, devices={names[key]: count for key, count in devices.items()})


CASES = [
    pytest.param([], None, (NEURON, "default"), id="nobody says anything"),
    pytest.param(
        [], {NEURON_DEVICE, "cpu"}, (NEURON_DEVICE, "queue"), id="nodes are scaled to zero: the queue decides"
    ),
    pytest.param([], {NEURON, NEURON_DEVICE}, (NEURON, "queue"), id="a queue that covers both gets the newer name"),
    pytest.param([], {"cpu", "memory"}, (NEURON, "default"), id="a queue without devices decides nothing"),
    pytest.param([node(neurondevice=16)], None, (NEURON_DEVICE, "nodes"), id="without a queue the nodes decide"),
    pytest.param([node(neurondevice=16)], {NEURON_DEVICE}, (NEURON_DEVICE, "nodes"), id="both agree on the older name"),
    pytest.param([node(neuron=16)], {NEURON, "cpu"}, (NEURON, "nodes"), id="both agree on the newer name"),
    pytest.param(
        [node(neuron=16, neurondevice=16)],
        {NEURON_DEVICE},
        (NEURON_DEVICE, "nodes"),
        id="nodes that offer both are asked for the one that the queue covers",
    ),
    pytest.param(
        [node(neuron=16, neurondevice=16)], None, (NEURON, "nodes"), id="nodes that offer both, without queue"
    ),
    pytest.param([node(neuron=16)], {"cpu"}, (NEURON, "nodes"), id="a queue without devices does not contradict nodes"),
    pytest.param(
        [node("ml.inf2.48xlarge", neurondevice=12)],
        None,
        (NEURON, "default"),
        id="nodes of another type say nothing",
    ),
    pytest.param(
        [node(neurondevice=16), node(neurondevice=16), node(neuron=16)],
        None,
        (NEURON_DEVICE, "nodes"),
        id="in the middle of an upgrade the name on most nodes is taken",
    ),
    pytest.param(
        [node(neuron=16, neurondevice=0)],
        None,
        (NEURON, "nodes"),
        id="a name that an older plugin left behind with no device is passed over",
    ),
    pytest.param([node(neurondevice=0)], None, (NEURON_DEVICE, "nodes"), id="a plugin that restarts keeps its name"),
]


@pytest.mark.parametrize(("nodes", "covered", "expected"), CASES)
def test_the_name_to_request(nodes: list[NodeState], covered: set[str] | None, expected: tuple[str, str]) -> None:
    quota = None if covered is None else frozenset(covered)
    assert find_device_resource(nodes, TRN1, quota) == DeviceName(*expected)


@pytest.mark.parametrize(
    ("devices", "covered"),
    [
        pytest.param({"neuron": 16}, NEURON_DEVICE, id="a new plugin under an old quota"),
        pytest.param({"neurondevice": 16}, NEURON, id="an old plugin under a new quota"),
        pytest.param({"neuron": 16, "neurondevice": 0}, NEURON_DEVICE, id="an upgraded plugin under an old quota"),
    ],
)
def test_a_disagreement_names_both_and_says_what_to_change(devices: Mapping[str, int], covered: str) -> None:
    found = find_device_resource([node(**devices)], TRN1, frozenset({covered, "cpu"}), "hyperpod-ns-a-clusterqueue")
    assert isinstance(found, Mismatch)
    assert found.reason is Reason.NEURON_RESOURCE_NAME_MISMATCH
    assert found.in_queue == (covered,)
    other = NEURON if covered == NEURON_DEVICE else NEURON_DEVICE
    assert found.message == (
        f"Nodes of type ml.trn1.32xlarge offer {other}, but ClusterQueue hyperpod-ns-a-clusterqueue covers {covered}: "
        f"update the Neuron device plugin so that nodes offer {covered}, or give ClusterQueue "
        f"hyperpod-ns-a-clusterqueue a quota of {other}."
    )


def test_a_gpu_has_one_name_and_a_cpu_node_none() -> None:
    gpu, cpu = BUILT_IN["ml.p5.48xlarge"], {"accelerator": "cpu", "devices": 0, "vcpus": 16, "memoryGib": 64}
    assert find_device_resource([node(gpu.name, gpu=8)], gpu, frozenset({NEURON})) == DeviceName(NVIDIA_GPU, "nodes")
    assert find_device_resource([], instance_types({"ml.m5.4xlarge": cpu})["ml.m5.4xlarge"]) is None


exposures = st.fixed_dictionaries({}, optional={"neuron": st.integers(0, 2), "neurondevice": st.integers(0, 2)})


@given(st.lists(exposures, max_size=4), st.none() | st.frozensets(st.sampled_from([NEURON, NEURON_DEVICE, "cpu"])))
def test_a_name_is_never_one_that_nodes_and_queue_cannot_serve(
    cluster: list[dict[str, int]], covered: frozenset[str] | None
) -> None:
    nodes = [node(**devices) for devices in cluster]
    found = find_device_resource(nodes, TRN1, covered)
    assert find_device_resource(nodes[::-1], TRN1, covered) == found
    offered = {name for each in nodes for name in each.devices}
    quota = (covered or frozenset()) - {"cpu"}
    if isinstance(found, Mismatch):
        assert set(found.on_nodes) <= offered
        assert not set(found.on_nodes) & quota
        return
    assert found is not None
    assert not offered or found.name in offered
    assert not quota or found.name in quota
