"""The tokenizer's digest goes from prepare through every artifact; another tokenizer is refused with its file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from finetune_trainer.artifacts import new_artifact, read_manifest
from finetune_trainer.errors import UserError
from finetune_trainer.stages import evaluate, merge
from finetune_trainer.tokenizer_files import (
    PROMPT_KEY,
    TOKENIZER_KEY,
    carried_digests,
    check_base_tokenizer,
    frozen_digests,
    tokenizer_files,
)


def made_with(folder: Path, model: Path, kind: str = "train") -> Path:
    """An artifact that was prepared with the tokenizer of `model`."""
    data = {"tokenizer": tokenizer_files(read_manifest(model)), PROMPT_KEY: "sha256:" + "0" * 64}
    with new_artifact(folder, kind) as writer:
        writer.metadata.update(frozen_digests(data))
    return folder


def with_another_template(model: Path) -> Path:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ messages }}"}))
    return model


@pytest.fixture
def models(tiny_model: Path, tmp_path: Path, adapter_artifacts: ModuleType) -> tuple[Path, Path]:
    """The base model as an artifact, and the same with another chat template."""
    copy = adapter_artifacts.copy_artifact(tiny_model, tmp_path / "copy", "x")
    (copy / "manifest.json").unlink()
    base = adapter_artifacts.copy_artifact(tiny_model, tmp_path / "base", "model")
    return base, adapter_artifacts.copy_artifact(with_another_template(copy), tmp_path / "other", "model")


def test_only_files_of_the_tokenizer_count(models: tuple[Path, Path]) -> None:
    assert set(tokenizer_files(read_manifest(models[0]))) == {
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_an_artifact_takes_over_what_prepare_wrote(models: tuple[Path, Path], tmp_path: Path) -> None:
    artifact = made_with(tmp_path / "train", models[0])
    assert carried_digests(artifact).keys() == {TOKENIZER_KEY, PROMPT_KEY}
    check_base_tokenizer(artifact, models[0])
    with pytest.raises(UserError, match="train was prepared with sha256:.*run prepare again") as caught:
        check_base_tokenizer(artifact, models[1])
    assert caught.value.reason == "TokenizerChanged"


def test_an_artifact_made_by_hand_says_nothing_of_a_tokenizer(models: tuple[Path, Path], tmp_path: Path) -> None:
    with new_artifact(tmp_path / "train", "train"):
        pass
    check_base_tokenizer(tmp_path / "train", models[1])


def test_merge_refuses_another_tokenizer_before_it_reads_a_weight(
    workspace: Path, models: tuple[Path, Path], adapter_artifacts: ModuleType
) -> None:
    adapter = made_with(workspace / "adapter", models[0], "consolidate")
    other = Path(shutil.copytree(models[1], workspace / "model"))
    config = adapter_artifacts.stage_config(workspace, "merge", {}, [other, adapter], ["model", "consolidate"])
    with pytest.raises(UserError, match="TokenizerChanged"):
        merge.run(config)


def test_evaluate_names_the_file_that_differs(models: tuple[Path, Path]) -> None:
    data: dict[str, Any] = {"tokenizer": tokenizer_files(read_manifest(models[0]))}
    evaluate._check_tokenizers(data, models[0], models[0])
    with pytest.raises(UserError, match=r"the tuned model does not have.*tokenizer_config.json differ"):
        evaluate._check_tokenizers(data, models[0], models[1])


def test_evaluate_refuses_other_words_around_a_question() -> None:
    with pytest.raises(UserError, match="PromptChanged: prompts of format dolly"):
        evaluate._open_format({"format": "dolly", PROMPT_KEY: "sha256:" + "0" * 64}, None)
