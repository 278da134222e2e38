"""One file and a few variables to OperatorConfig: what arrives where, and what is refused with which words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from finetune_operator.config import OVERRIDES, ConfigError, LeaseSettings, OperatorConfig, read_config
from finetune_operator.core.settings import (
    BUILT_IN_DEFAULTS,
    NodeSettings,
    ProgressEndpoint,
    RetryTiming,
    Settings,
    StageDefaults,
)

IMAGE = {"FINETUNE_TRAINER_IMAGE": "registry.example/trainer:1"}
POD = {"FINETUNE_NAMESPACE": "finetune-system", "FINETUNE_POD_NAME": "operator-1", "FINETUNE_POD_IP": "10.0.0.7"}

Read = Callable[..., OperatorConfig]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """read_config of a file with this text and these variables over the trainer's image and the pod's."""

    def run(text: str, **variables: str) -> OperatorConfig:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return read_config({**IMAGE, **POD, "FINETUNE_CONFIG_FILE": str(path), **variables})

    return run


def test_an_image_is_enough() -> None:
    assert read_config(IMAGE) == OperatorConfig(Settings(trainer_image="registry.example/trainer:1"))


def test_the_defaults_of_the_file_are_those_of_the_settings(read: Read) -> None:
    assert read("") == OperatorConfig(
        Settings(trainer_image="registry.example/trainer:1"),
        namespace="finetune-system",
        pod_name="operator-1",
        pod_ip="10.0.0.7",
    )


EVERYTHING = """
trainer:
  {image: registry.example/trainer:2, neuronImage: registry.example/neuron:2, pullPolicy: Always, pullSecrets: [pull]}
watchNamespaces: [research, team-b]
logLevel: debug
stagePriorityClassName: low
stages:
  train:
    resources: {requests: {cpu: 2}, limits: {memory: 8Gi}}
    nodeSelector: {fast: true}
    tolerations: [{key: batch, operator: Exists}]
    env: [{name: OMP_NUM_THREADS, value: "4"}]
    terminationGracePeriodSeconds: 600
  merge:
    image: registry.example/other:1
retry: {firstSeconds: 5, longestSeconds: 50, infrastructureFirstSeconds: 0.5, infrastructureLongestSeconds: 20}
nodes: {watch: false, avoidSeconds: 60, faultsToAvoid: 3, drainSeconds: 5}
hang: {seconds: 0}
queue: {enabled: false}
leaderElection: {enabled: true, leaseName: my-lease, leaseSeconds: 20, renewSeconds: 14, retrySeconds: 4}
progress: {url: "https://operator.finetune-system.svc/v1/progress", port: 9443, tlsSecret: tls}
health: {port: 9090}
metrics: {enabled: false}
logs: {enabled: true, tailLines: 7}
featureGates: {Neuron: true}
currency: EUR
"""


def test_everything_arrives(read: Read) -> None:
    core = Settings(
        trainer_image="registry.example/trainer:2",
        neuron_image="registry.example/neuron:2",
        image_pull_policy="Always",
        image_pull_secrets=("pull",),
        priority_class="low",
        stages={
            "train": StageDefaults(
                requests={"cpu": "2"},
                limits={"memory": "8Gi"},
                node_selector={"fast": "true"},
                tolerations=({"key": "batch", "operator": "Exists"},),
                env={"OMP_NUM_THREADS": "4"},
                termination_grace_seconds=600,
            ),
            "merge": replace(BUILT_IN_DEFAULTS["merge"], image="registry.example/other:1"),
        },
        retry=RetryTiming(counted_first=5, counted_longest=50, uncounted_first=0.5, uncounted_longest=20),
        features={"Neuron": True, "Cuda": False, "Publish": False},
        nodes=NodeSettings(watch=False, avoid_seconds=60, faults_to_avoid=3, drain_seconds=5),
        hang_seconds=0,
        log_tail_lines=7,
        queue_enabled=False,
        currency="EUR",
    )
    assert read(EVERYTHING, FINETUNE_TRAINER_IMAGE="") == OperatorConfig(
        core=core,
        namespace="finetune-system",
        pod_name="operator-1",
        pod_ip="10.0.0.7",
        watch_namespaces=("research", "team-b"),
        log_level="debug",
        health_port=9090,
        metrics=False,
        progress_url="https://operator.finetune-system.svc/v1/progress",
        progress_port=9443,
        tls_secret="tls",
        lease=LeaseSettings("my-lease", lease_seconds=20, renew_seconds=14, retry_seconds=4),
    )


def test_logs_that_are_off_are_not_read(read: Read) -> None:
    assert read("logs: {enabled: false, tailLines: 7}").core.log_tail_lines == 0


def test_the_endpoint_is_part_of_the_settings_once_its_certificate_is_known(read: Read) -> None:
    config = read(EVERYTHING)
    assert config.settings() == config.core
    assert config.settings("a certificate") == replace(
        config.core, progress=ProgressEndpoint(config.progress_url, "a certificate")
    )


def test_a_variable_comes_before_the_file(read: Read) -> None:
    variables = {
        "FINETUNE_TRAINER_IMAGE": "registry.example/trainer:3",
        "FINETUNE_NEURON_IMAGE": "registry.example/neuron:3",
        "FINETUNE_WATCH_NAMESPACES": "one, two",
        "FINETUNE_LOG_LEVEL": "error",
        "FINETUNE_HEALTH_PORT": "0",
        "FINETUNE_PROGRESS_URL": "https://10.0.0.1:1/",
        "FINETUNE_PROGRESS_PORT": "1",
        "FINETUNE_TLS_SECRET": "other-tls",
        "FINETUNE_LEASE_NAME": "other-lease",
        "FINETUNE_RETRY_FIRST_SECONDS": "0.5",
        "FINETUNE_FEATURE_GATES": "Cuda=true, Neuron=false",
    }
    assert set(variables) == set(OVERRIDES)
    before = read(EVERYTHING)
    assert before.lease is not None
    assert read(EVERYTHING, **variables) == replace(
        before,
        core=replace(
            before.core,
            trainer_image="registry.example/trainer:3",
            neuron_image="registry.example/neuron:3",
            retry=replace(before.core.retry, counted_first=0.5),
            features={"Neuron": False, "Cuda": True, "Publish": False},
        ),
        watch_namespaces=("one", "two"),
        log_level="error",
        health_port=0,
        progress_url="https://10.0.0.1:1/",
        progress_port=1,
        tls_secret="other-tls",
        lease=replace(before.lease, name="other-lease"),
    )


def test_a_lease_named_in_the_environment_switches_leader_election_on(read: Read) -> None:
    assert read("").lease is None
    assert read("", FINETUNE_LEASE_NAME="mine").lease == LeaseSettings("mine")


def test_every_problem_is_told_at_once_with_place_value_and_remedy(read: Read, tmp_path: Path) -> None:
    text = """
trainer: {pullPolicy: Sometimes}
retry: {longestSeconds: 1, firstSecond: 3}
stages: {traim: {}, train: {limits: {}, tolerations: x}}
nodes: often
"""
    variables = {"FINETUNE_TRAINER_IMAGE": "", "FINETUNE_LOG_LEVEL": "loud", "FINETUNE_HEALTH_PORT": "web"}
    with pytest.raises(ConfigError) as caught:
        read(text, **variables)
    file = tmp_path / "config.yaml"
    stage_keys = "env, image, nodeSelector, resources, terminationGracePeriodSeconds, tolerations"
    retry_keys = "firstSeconds, infrastructureFirstSeconds, infrastructureLongestSeconds, longestSeconds"
    assert set(str(caught.value).splitlines()) == {
        f"{file}: trainer.image is not set: set the image that stages run (or FINETUNE_TRAINER_IMAGE)",
        f"{file}: trainer.pullPolicy is 'Sometimes': set one of IfNotPresent, Always, Never",
        f"{file}: retry.longestSeconds is 1.0: set firstSeconds (10) or more",
        f"{file}: retry.firstSecond is not known: use {retry_keys}, or remove it",
        f"{file}: stages.traim is not known: use {', '.join(sorted(BUILT_IN_DEFAULTS))}, or remove it",
        f"{file}: stages.train.limits is not known: use {stage_keys}, or remove it",
        f"{file}: stages.train.tolerations is 'x': set a list of objects",
        f"{file}: nodes is 'often': set an object of keys and values",
        "FINETUNE_LOG_LEVEL (logLevel) is 'loud': set one of debug, info, warning, error",
        "FINETUNE_HEALTH_PORT (health.port) is 'web': set a port from 0 to 65535",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("trainers: {}", "trainers is not known: use ", id="a section that does not exist"),
        pytest.param("[]", "holds no object", id="a list in place of sections"),
        pytest.param("trainer: {", "cannot be read", id="no YAML"),
        pytest.param(
            "trainer: {pullSecrets: pull}", "trainer.pullSecrets is 'pull': set a list of names", id="no list"
        ),
        pytest.param("watchNamespaces: [Team_A]", "watchNamespaces is .*: set a list of names", id="no namespace"),
        pytest.param("stagePriorityClassName: 1", "stagePriorityClassName is 1: set a text", id="a number for a name"),
        pytest.param("retry: {firstSeconds: 0}", "retry.firstSeconds is 0: set seconds, more than 0", id="zero"),
        pytest.param("retry: {firstSeconds: true}", "retry.firstSeconds is True: set seconds", id="a boolean"),
        pytest.param("retry: {firstSeconds: .nan}", "retry.firstSeconds is nan: set seconds", id="not a number"),
        pytest.param("hang: {seconds: -1}", "hang.seconds is -1: .*or 0 for never", id="a negative time"),
        pytest.param("nodes: {faultsToAvoid: 0}", "nodes.faultsToAvoid is 0: .* from 1 to 100", id="too few faults"),
        pytest.param("nodes: {faultsToAvoid: 1.5}", "nodes.faultsToAvoid is 1.5: .*whole", id="half a fault"),
        pytest.param("health: {port: .inf}", "health.port is inf: set a port", id="infinity"),
        pytest.param("nodes: {watch: 'yes'}", "nodes.watch is 'yes': set true or false", id="a word for a boolean"),
        pytest.param("logs: {tailLines: 1000}", "logs.tailLines is 1000: .* from 1 to 100", id="too long a log"),
        pytest.param("health: {port: 65536}", "health.port is 65536: set a port", id="a port that is none"),
        pytest.param("featureGates: {TPU: true}", "featureGates.TPU is not known: use Cuda", id="an unknown gate"),
        pytest.param("featureGates: {Cuda: maybe}", "featureGates.Cuda is 'maybe'", id="a gate that is neither"),
        pytest.param("currency: dollars", "currency is 'dollars': set the three letters", id="no currency"),
        pytest.param("stages: {train: {env: [{name: A}]}}", "stages.train.env is .*: set a name and", id="no value"),
        pytest.param(
            "stages: {train: {nodeSelector: {a: []}}}", "nodeSelector is .*: set an object", id="a nested label"
        ),
        pytest.param(
            "stages: {train: {resources: {request: {cpu: 1}}}}",
            "stages.train.resources.request is not known: use limits, requests",
            id="a misspelt key three levels down",
        ),
        pytest.param("progress: {url: 'http://x', tlsSecret: t}", "set an https:// URL", id="a URL without TLS"),
        pytest.param("progress: {url: 'https://x'}", "progress.tlsSecret", id="an endpoint without a Secret"),
        pytest.param(
            "leaderElection: {enabled: true, renewSeconds: 10}",
            r"renewSeconds is 10.0: set more than retrySeconds \(2\) and less than leaseSeconds \(10\)",
            id="a holder that would still renew when a standby takes over",
        ),
    ],
)
def test_a_file_is_refused_in_words(read: Read, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(text)


def test_times_of_an_election_that_is_off_are_not_compared(read: Read) -> None:
    assert read("leaderElection: {renewSeconds: 10}").lease is None


def test_an_election_needs_to_know_its_pod(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("leaderElection: {enabled: true}", encoding="utf-8")
    with pytest.raises(ConfigError, match="FINETUNE_NAMESPACE and FINETUNE_POD_NAME"):
        read_config({**IMAGE, "FINETUNE_CONFIG_FILE": str(path)})


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="FINETUNE_CONFIG_FILE /no/such/file cannot be read"):
        read_config({**IMAGE, "FINETUNE_CONFIG_FILE": "/no/such/file"})
