from __future__ import annotations

from pathlib import Path

import pytest

from finetune_operator.config import ConfigError, read_config
from finetune_operator.core.settings import BUILT_IN_DEFAULTS

IMAGE = {"FINETUNE_TRAINER_IMAGE": "registry.example/trainer:1"}


def test_an_image_is_enough() -> None:
    config = read_config(IMAGE)
    assert config.watch_namespaces == ()
    assert config.settings().of("train") == BUILT_IN_DEFAULTS["train"]
    assert config.settings().progress is None


def test_every_problem_is_told_at_once() -> None:
    environ = {
        "FINETUNE_LOG_LEVEL": "loud",
        "FINETUNE_TRAINER_IMAGE_PULL_POLICY": "Sometimes",
        "FINETUNE_HEALTH_PORT": "web",
        "FINETUNE_PROGRESS_URL": "http://x",
        "FINETUNE_RETRY_FIRST_SECONDS": "0",
        "FINETUNE_STAGES_FILE": "/no/such/file",
    }
    with pytest.raises(ConfigError) as caught:
        read_config(environ)
    told = str(caught.value)
    for name in (*environ, "FINETUNE_TRAINER_IMAGE is not set", "FINETUNE_TLS_SECRET"):
        assert name in told


def test_the_stages_file_replaces_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "stages.yaml"
    path.write_text(
        """
train:
  resources: {requests: {cpu: 2}, limits: {memory: 8Gi}}
  nodeSelector: {fast: true}
  tolerations: [{key: batch, operator: Exists}]
  env: [{name: OMP_NUM_THREADS, value: 4}]
  terminationGracePeriodSeconds: 600
merge:
  image: registry.example/other:1
""",
        encoding="utf-8",
    )
    settings = read_config({**IMAGE, "FINETUNE_STAGES_FILE": str(path)}).settings()
    train = settings.of("train")
    assert dict(train.requests) == {"cpu": "2"}
    assert dict(train.limits) == {"memory": "8Gi"}
    assert train.node_selector == {"fast": "true"}
    assert train.env == {"OMP_NUM_THREADS": "4"}
    assert train.termination_grace_seconds == 600
    assert settings.of("merge").image == "registry.example/other:1"
    assert settings.of("merge").requests == BUILT_IN_DEFAULTS["merge"].requests


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("traim: {}", "no such stage", id="an unknown stage"),
        pytest.param("train: {resource: {}}", "must be an object of", id="an unknown key"),
        pytest.param("train: {tolerations: x}", "tolerations: must be a list", id="a wrong type"),
        pytest.param("[]", "object by stage", id="no object"),
    ],
)
def test_a_wrong_stages_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "stages.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        read_config({**IMAGE, "FINETUNE_STAGES_FILE": str(path)})
