"""Which files of a source are the dataset's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.artifacts import verify_artifact
from finetune_trainer.errors import UserError
from finetune_trainer.sources import open_source
from finetune_trainer.sources.base import SourceFile
from finetune_trainer.sources.datasets import choose_dataset_files, fetch_dataset


def listing(*paths: str) -> list[SourceFile]:
    return [SourceFile(path, 1, "x") for path in paths]


def choose(*paths: str, split: str = "train", configuration: str | None = None, configs: Any = ()) -> list[str]:
    chosen = choose_dataset_files("d", listing(*paths), configs, split=split, configuration=configuration)
    return [file.path for file in chosen]


@pytest.mark.parametrize(
    ("paths", "options", "expected"),
    [
        pytest.param(
            ["databricks-dolly-15k.jsonl", "README.md"], {}, ["databricks-dolly-15k.jsonl"], id="one file is train"
        ),
        pytest.param(["train.csv", "test.csv"], {"split": "test"}, ["test.csv"], id="split by file name"),
        pytest.param(["val.json", "train.json"], {"split": "validation"}, ["val.json"], id="val is validation"),
        pytest.param(
            [
                "data/train-00001-of-00002.parquet",
                "data/train-00000-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
            ],
            {},
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            id="shards in the order of their names",
        ),
        pytest.param(["train/a.jsonl", "test/a.jsonl"], {}, ["train/a.jsonl"], id="split by folder"),
        pytest.param(
            ["data/train_sft-00000-of-00002.parquet", "data/train_gen-00000-of-00001.parquet"],
            {"split": "train_sft"},
            ["data/train_sft-00000-of-00002.parquet"],
            id="a split of its own name",
        ),
        pytest.param(
            ["train.jsonl", "train_extra.jsonl"], {}, ["train.jsonl"], id="the very name before one that has its word"
        ),
        pytest.param(
            ["en/train.jsonl", "de/train.jsonl"], {"configuration": "de"}, ["de/train.jsonl"], id="configuration"
        ),
        pytest.param(["a.jsonl", "dataset_infos.json"], {}, ["a.jsonl"], id="descriptions are no records"),
    ],
)
def test_files_are_told_by_their_names(paths: list[str], options: dict[str, Any], expected: list[str]) -> None:
    assert choose(*paths, **options) == expected


CARD = [
    {
        "config_name": "a",
        "data_files": [{"split": "train", "path": ["a/*.jsonl"]}, {"split": "test", "path": "t.jsonl"}],
    },
    {"config_name": "b", "data_files": "b.jsonl", "default": True},
]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, ["b.jsonl"], id="the default configuration"),
        pytest.param({"configuration": "a"}, ["a/1.jsonl", "a/2.jsonl"], id="a named configuration"),
        pytest.param({"configuration": "a", "split": "test"}, ["t.jsonl"], id="a split of it"),
    ],
)
def test_a_card_decides(options: dict[str, Any], expected: list[str]) -> None:
    assert choose("a/2.jsonl", "a/1.jsonl", "a/old/3.jsonl", "b.jsonl", "t.jsonl", configs=CARD, **options) == expected


@pytest.mark.parametrize(
    ("paths", "options", "words"),
    [
        pytest.param(["a.txt", "b.py"], {}, "no file of type", id="no type that can be read"),
        pytest.param(["train.csv"], {"split": "test"}, "no split 'test' (found: train)", id="no such split"),
        pytest.param(["a.csv"], {"split": "test"}, "no split 'test'", id="names tell no split"),
        pytest.param(["a.csv", "a.parquet"], {}, "files of types .csv, .parquet", id="one dataset in two types"),
        pytest.param(["a.csv"], {"configuration": "x"}, "no configuration 'x'", id="no such configuration"),
        pytest.param(["b.jsonl"], {"configs": CARD, "configuration": "z"}, "it has a, b", id="none of the card's"),
        pytest.param(
            ["b.jsonl"], {"configs": CARD, "split": "test"}, "has no split 'test'", id="no such split in the card"
        ),
        pytest.param(["x.jsonl"], {"configs": CARD}, "'b.jsonl', which fits no file", id="a card that names no file"),
        pytest.param(
            ["x.jsonl"], {"configs": [*CARD[:1], *CARD[:1]]}, "set spec.dataset.configuration", id="no default"
        ),
    ],
)
def test_what_cannot_be_chosen_is_told(paths: list[str], options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        choose(*paths, **options)
    assert caught.value.reason == "DatasetNotUsable"
    assert words in caught.value.message


@pytest.mark.parametrize("name", ["test.jsonl", "a.csv", "b.parquet", "c.json"])
def test_a_source_that_names_a_file_is_that_file(workspace: Path, name: str) -> None:
    (workspace / "data").mkdir()
    for file in (name, "other.jsonl"):
        (workspace / "data" / file).write_text("x\n")
    source = open_source(
        f"workspace:///data/{name}", repo_type="dataset", revision=None, token_file=None, workspace=workspace
    )
    path = fetch_dataset(source, root=workspace / "datasets", split="train", configuration=None, files=None)
    assert [entry.path for entry in verify_artifact(path).files] == [name]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        pytest.param("*.jsonl", ["a.jsonl"], id="a star stays inside its folder"),
        pytest.param("**.jsonl", ["a.jsonl", "deep/b.jsonl"], id="two stars cross folders"),
        pytest.param("**/[!b-z].jsonl", ["a.jsonl"], id="not these letters"),
        pytest.param("d??p/[abc].jsonl", ["deep/b.jsonl"], id="one letter, one of these"),
        pytest.param(["**/b.jsonl", "c.csv"], ["c.csv", "deep/b.jsonl"], id="several patterns"),
        pytest.param("**/a.jsonl", ["a.jsonl"], id="two stars are also no folder"),
    ],
)
def test_patterns_replace_splits(workspace: Path, patterns: str | list[str], expected: list[str]) -> None:
    (workspace / "data" / "deep").mkdir(parents=True)
    for name in ("a.jsonl", "deep/b.jsonl", "c.csv"):
        (workspace / "data" / name).write_text("{}\n")
    source = open_source("workspace:///data", repo_type="dataset", revision=None, token_file=None, workspace=workspace)
    path = fetch_dataset(source, root=workspace / "datasets", split="train", configuration=None, files=patterns)
    assert [entry.path for entry in verify_artifact(path).files] == expected
