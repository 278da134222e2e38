"""What the chart gives the operator, read by its own parser: the Deployment's environment and the stages file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.config import OperatorConfig, read_config
from finetune_operator.core.settings import StageDefaults
from finetune_trainer import contract


@pytest.fixture
def configure(render: Any, tmp_path: Path) -> Any:
    """OperatorConfig that a pod of the chart, rendered with the arguments given, would start with."""

    def run(*arguments: str) -> OperatorConfig:
        manifests = render(*arguments)
        deployment = next(m for m in manifests if m["kind"] == "Deployment")
        environ = {
            e["name"]: e.get("value", "x") for e in deployment["spec"]["template"]["spec"]["containers"][0]["env"]
        }
        stages = next(m for m in manifests if m["kind"] == "ConfigMap")["data"]
        file = tmp_path / Path(environ["FINETUNE_STAGES_FILE"]).name
        file.write_text(stages[file.name])
        return read_config({**environ, "FINETUNE_STAGES_FILE": str(file)})

    return run


def test_defaults(configure: Any) -> None:
    config = configure()
    assert dataclasses.replace(config, stages={}) == OperatorConfig(
        trainer_image="registry.test/tr:0.1.0",
        namespace="x",
        pod_name="x",
        progress_url="https://finetune-operator-progress.finetune-system.svc:443/v1/progress",
        tls_secret="finetune-operator-tls",
    )
    assert set(config.stages) == {
        contract.PREPARE,
        contract.TRAIN,
        contract.CONSOLIDATE,
        contract.MERGE,
        contract.EVALUATE,
    }
    assert config.stages[contract.TRAIN] == StageDefaults(
        requests={"cpu": "500m", "memory": "3Gi"}, termination_grace_seconds=300
    )


def test_everything_that_can_be_set_arrives(configure: Any) -> None:
    toleration = {"key": "gpu", "operator": "Exists"}
    config = configure(
        *("--set", "watchNamespaces={research,team-b}", "--set", "logLevel=debug", "--set", "progress.enabled=false"),
        *("--set", "images.trainer.pullSecrets={pull}", "--set", "images.trainer.pullPolicy=Always"),
        *("--set", "stagePriorityClassName=low", "--set", "retryFirstSeconds=1"),
        *("--set-json", f"stages.train.tolerations=[{json.dumps(toleration)}]"),
        *("--set", "stages.train.nodeSelector.pool=gpu", "--set", "stages.train.resources.limits.memory=8Gi"),
        *("--set-json", 'stages.train.env=[{"name":"OMP_NUM_THREADS","value":"1"}]'),
    )
    assert config.watch_namespaces == ("research", "team-b")
    assert config.log_level == "debug"
    assert (config.progress_url, config.tls_secret) == ("", "")
    assert config.image_pull_secrets == ("pull",)
    assert config.image_pull_policy == "Always"
    assert config.priority_class == "low"
    assert config.retry.counted_first == 1
    assert config.stages[contract.TRAIN] == StageDefaults(
        requests={"cpu": "500m", "memory": "3Gi"},
        limits={"memory": "8Gi"},
        node_selector={"pool": "gpu"},
        tolerations=(toleration,),
        env={"OMP_NUM_THREADS": "1"},
        termination_grace_seconds=300,
    )
