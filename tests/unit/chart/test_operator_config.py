"""What the chart gives the operator, read by its own parser: the Deployment's environment and the ConfigMap's file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.config import LeaseSettings, OperatorConfig, read_config
from finetune_operator.core.accelerators.instances import InstanceType
from finetune_operator.core.model_shapes import ModelShape
from finetune_operator.core.settings import (
    BUILT_IN_DEFAULTS,
    NodeSettings,
    RetryTiming,
    Settings,
    StageDefaults,
)
from finetune_trainer import contract

PEOPLE = ("finetune-operator-view", "finetune-operator-edit")
FILE = "/etc/finetune-operator/config.yaml"


@pytest.fixture
def configure(render: Any, tmp_path: Path) -> Any:
    """OperatorConfig that a pod of the chart, rendered with the arguments given, would start with."""

    def run(*arguments: str) -> OperatorConfig:
        manifests = render(*arguments)
        pod = next(m for m in manifests if m["kind"] == "Deployment")["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        environ = {e["name"]: e["value"] if "value" in e else f"pod's {e['name']}" for e in container["env"]}
        assert environ["FINETUNE_CONFIG_FILE"] == FILE
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volume = next(v for v in pod["volumes"] if v["name"] == mounted[str(Path(FILE).parent)])
        config_map = next(
            m for m in manifests if (m["kind"], m["metadata"]["name"]) == ("ConfigMap", volume["configMap"]["name"])
        )
        file = tmp_path / "config.yaml"
        file.write_text(config_map["data"][Path(FILE).name])
        return read_config({**environ, "FINETUNE_CONFIG_FILE": str(file)})

    return run


def test_the_defaults_of_the_chart_are_those_of_the_operator(configure: Any) -> None:
    config = configure()
    assert dataclasses.replace(config, core=dataclasses.replace(config.core, stages={})) == OperatorConfig(
        Settings(trainer_image="registry.test/tr:0.1.0"),
        namespace="pod's FINETUNE_NAMESPACE",
        pod_name="pod's FINETUNE_POD_NAME",
        pod_ip="pod's FINETUNE_POD_IP",
        progress_url="https://finetune-operator-progress.finetune-system.svc:443/v1/progress",
        tls_secret="finetune-operator-tls",
        lease=LeaseSettings("finetune-operator"),
    )
    assert set(config.core.stages) == set(BUILT_IN_DEFAULTS)
    assert config.core.stages[contract.TRAIN] == StageDefaults(
        requests={"cpu": "500m", "memory": "3Gi"}, termination_grace_seconds=300
    )


def test_everything_that_can_be_set_arrives(configure: Any, tmp_path: Path) -> None:
    toleration = {"key": "gpu", "operator": "Exists"}
    shape = ModelShape(2048, 16, 32, 8, 8192, 128256, 1_235_814_400, tied=True)
    values = tmp_path / "values.yaml"
    # A file, as people have it: Helm reads its numbers as floating point, and these are larger than it prints in full.
    values.write_text("""
models:
  Our-Org/model: {hiddenSize: 2048, layers: 16, heads: 32, kvHeads: 8, intermediateSize: 8192, vocabSize: 128256,
    parameters: 1235814400, tied: true}
instanceTypes:
  our.large: {accelerator: cuda, devices: 2, vcpus: 16, memoryGib: 64.5, deviceMemoryGib: 22, pricePerHour: 1.25}
""")
    config = configure(
        *("--set", "watchNamespaces={research,team-b}", "--set", "logLevel=debug", "--set", "progress.enabled=false"),
        *("--set", "images.trainer.pullSecrets={pull}", "--set", "images.trainer.pullPolicy=Always"),
        *("--set", "images.neuron.repository=registry.test/neuron,images.neuron.tag=sha256:0123"),
        *("--set", "stagePriorityClassName=low", "--set", "currency=EUR", "--set", "metrics.enabled=false"),
        *("--set", "retry.firstSeconds=1,retry.longestSeconds=2"),
        *("--set", "retry.infrastructureFirstSeconds=3,retry.infrastructureLongestSeconds=4"),
        *("--set", "nodes.avoidSeconds=5,nodes.faultsToAvoid=6,nodes.drainSeconds=7"),
        *("--set", "hang.seconds=0", "--set", "logs.tailLines=8", "--set", "queue.enabled=false"),
        *("--set", "leaderElection.leaseSeconds=30,leaderElection.renewSeconds=20,leaderElection.retrySeconds=4"),
        *("--set", "featureGates.Neuron=true,featureGates.Cuda=true,featureGates.Publish=true"),
        *("--set", "fullnameOverride=our-operator"),
        *("--set-json", f"stages.train.tolerations=[{json.dumps(toleration)}]"),
        *("--set", "stages.train.nodeSelector.pool=gpu", "--set", "stages.train.resources.limits.memory=8Gi"),
        *("--set-json", 'stages.train.env=[{"name":"OMP_NUM_THREADS","value":"1"}]'),
        *("-f", str(values)),
    )
    core = config.core
    assert config == OperatorConfig(
        Settings(
            trainer_image="registry.test/tr:0.1.0",
            neuron_image="registry.test/neuron@sha256:0123",
            image_pull_policy="Always",
            image_pull_secrets=("pull",),
            priority_class="low",
            stages=core.stages,
            retry=RetryTiming(counted_first=1, counted_longest=2, uncounted_first=3, uncounted_longest=4),
            features={"Neuron": True, "Cuda": True, "Publish": True},
            instance_types=core.instance_types,
            model_shapes=core.model_shapes,
            nodes=NodeSettings(watch=False, avoid_seconds=5, faults_to_avoid=6, drain_seconds=7),
            hang_seconds=0,
            log_tail_lines=8,
            queue_enabled=False,
            currency="EUR",
        ),
        namespace="pod's FINETUNE_NAMESPACE",
        pod_name="pod's FINETUNE_POD_NAME",
        pod_ip="pod's FINETUNE_POD_IP",
        watch_namespaces=("research", "team-b"),
        log_level="debug",
        metrics=False,
        lease=LeaseSettings("our-operator", lease_seconds=30, renew_seconds=20, retry_seconds=4),
    )
    assert core.stages[contract.TRAIN] == StageDefaults(
        requests={"cpu": "500m", "memory": "3Gi"},
        limits={"memory": "8Gi"},
        node_selector={"pool": "gpu"},
        tolerations=(toleration,),
        env={"OMP_NUM_THREADS": "1"},
        termination_grace_seconds=300,
    )
    assert core.model_shapes["our-org/model"] == shape
    assert core.instance_types["our.large"] == InstanceType(
        "our.large", "cuda", 2, 1, 0, 16, 64.5, device_memory_gib=22, price_per_hour=1.25
    )


@pytest.mark.parametrize(
    ("values", "watched"),
    [
        pytest.param((), True, id="the whole cluster is served"),
        pytest.param(("watchNamespaces={a}",), False, id="namespaces are named"),
        pytest.param(("watchNamespaces={a}", "nodes.watch=true"), True, id="namespaces are named and nodes asked for"),
        pytest.param(("nodes.watch=false",), False, id="nodes are switched off"),
    ],
)
def test_nodes_are_watched_where_the_cluster_is_served_or_it_is_asked_for(
    configure: Any, values: tuple[str, ...], watched: bool
) -> None:
    config = configure(*(part for value in values for part in ("--set", value)))
    assert config.core.nodes.watch is watched


def test_the_rights_and_the_settings_agree(render: Any, configure: Any) -> None:
    """Whatever a switch says, the operator asks for nothing that its roles do not allow, and for all that they do."""
    for values in ((), ("watchNamespaces={a}",), ("logs.enabled=false", "nodes.watch=false"), ("queue.enabled=false",)):
        arguments = [part for value in values for part in ("--set", value)]
        core = configure(*arguments).core
        roles = [
            m
            for m in render(*arguments)
            if m["kind"] in ("ClusterRole", "Role") and m["metadata"]["name"] not in PEOPLE
        ]
        resources = {resource for role in roles for rule in role["rules"] for resource in rule["resources"]}
        assert ("nodes" in resources) == core.nodes.watch
        assert ("workloads" in resources) == core.queue_enabled
        assert ("pods/log" in resources) == (core.log_tail_lines > 0)
