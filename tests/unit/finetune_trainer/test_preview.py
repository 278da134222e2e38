"""`finetune-trainer preview`: what is shown of a job's data, and what is not fetched for it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from chat_templates import MISTRAL

from finetune_trainer import preview
from finetune_trainer.contract import ExitCode
from finetune_trainer.errors import UserError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def job(workspace: Path, tiny_model: Path) -> Any:
    """Writes the manifest of a job on these records; returns its path."""
    shutil.copytree(tiny_model, workspace / "base")
    path = workspace / "base" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": MISTRAL}))
    (workspace / "data").mkdir()

    def write(records: list[Any], **dataset: Any) -> Path:
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (workspace / "data" / "train.jsonl").write_text("\n".join(lines) + "\n")
        spec = {
            "model": {"source": "workspace:///base"},
            "dataset": {"source": "workspace:///data", "format": "messages", "maxLength": 128, **dataset},
            "method": {"lora": {"rank": 4, "targetModules": ["q_proj"]}},
            "training": {"maxSteps": 3, "learningRate": 0.001},
            "accelerator": {"type": "cpu"},
            "workspace": {"claimName": "claim"},
        }
        manifest = workspace / "job.yaml"
        head = {"apiVersion": "finetune-operator.io/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "x"}}
        other = {"kind": "Namespace", "metadata": {"name": "y"}}
        manifest.write_text(yaml.safe_dump_all([other, {**head, "spec": spec}]))
        return manifest

    return write


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def show(manifest: Path, out: io.StringIO, **options: Any) -> str:
    settings: dict[str, Any] = {"token_file": None, "records": 1000, "samples": 5, **options}
    preview.run(manifest, workspace=manifest.parent, out=out, **settings)
    return out.getvalue()


def test_what_is_learnt_is_marked_and_records_that_cannot_be_used_are_listed(job: Any) -> None:
    manifest = job([chat("Who?", "I."), "{", chat("Where?", " "), chat("Why?", "So.")], maxRejectedPercent=50)
    text = show(manifest, io.StringIO())
    assert "--- train.jsonl, line 1: " in text
    assert "<s>[INST] Who? [/INST]⟦ I.</s>⟧\n" in text
    assert "<s>[INST] Why? [/INST]⟦ So.</s>⟧\n" in text
    assert "100 % of the documents teach the model to stop" in text
    assert "2 of 4 records cannot be used: broken 1, empty 1" in text
    assert "train.jsonl, line 2: no JSON" in text
    assert "train.jsonl, line 3, field 'messages[1].content': is empty" in text
    assert "\x1b" not in text


def test_more_wrong_records_than_allowed_are_told_as_prepare_would(job: Any) -> None:
    manifest = job([chat("Who?", "I."), "{", chat("Where?", " "), chat("Why?", "So.")], maxRejectedPercent=49)
    out = io.StringIO()
    with pytest.raises(UserError, match="2 of 4 records cannot be used, maxRejectedPercent is 49"):
        show(manifest, out)
    assert "⟦ I.</s>⟧" in out.getvalue()


def test_a_terminal_gets_colours_and_nothing_of_the_data_drives_it(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    manifest = job([chat("Who?", "I\x1b[2Jam\nhere.")])
    text = show(manifest, Terminal())
    assert "\x1b[30;42m I\\x1b[2Jam\x1b[0m\n\x1b[30;42mhere.</s>\x1b[0m" in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in show(manifest, Terminal())


def test_neither_weights_nor_more_records_than_asked_for_are_read(job: Any) -> None:
    manifest = job([*(chat(f"{number}?", f"{number}.") for number in range(9)), "{"])
    (manifest.parent / "base" / "model.safetensors").write_bytes(b"no weights")
    text = show(manifest, io.StringIO(), records=7, samples=2)
    assert text.count("--- train.jsonl") == 2
    assert "cannot be used" not in text
    assert not (manifest.parent / "finetune").exists()


def test_of_a_hub_only_the_tokenizer_and_the_dataset_are_fetched(
    job: Any, hub_server_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = job([chat("Who?", "I.")], source="hf://org/data")
    folder = manifest.parent
    manifest.write_text(manifest.read_text().replace("workspace:///base", "hf://org/base"))
    with hub_server_module.Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        for name in ("base", "data"):
            files = {path.name: path.read_bytes() for path in (folder / name).iterdir()}
            hub.repos[f"org/{name}"] = hub_server_module.Repo(files)
        text = show(manifest, io.StringIO())
        asked = {path.rsplit("/", 1)[-1] for _, path, _ in hub.requests}
    assert "⟦ I.</s>⟧" in text
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", "train.jsonl"} <= asked
    assert not any(name.endswith(".safetensors") for name in asked)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"format": "mesages", "maxLength": 1}, ["did you mean 'messages'", "at least 16"], id="the spec"),
        pytest.param({"maxLength": 512}, ["the model has 256 positions"], id="longer than the model"),
        pytest.param({"files": "*.csv"}, ["fits no file"], id="no such files"),
        pytest.param({"format": "dolly"}, ["has no usable record"], id="another format"),
    ],
)
def test_what_is_wrong_is_told_with_the_exit_code_of_a_stage(
    job: Any, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: list[str]
) -> None:
    manifest = job([chat("Who?", "I.")], **change)
    code = preview.main([str(manifest), "--workspace", str(manifest.parent)])
    assert code == ExitCode.USER_ERROR
    told = capsys.readouterr().err
    assert [word for word in words if word not in told] == []


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        pytest.param("kind: Pod", "has 0 objects of kind FineTuneJob", id="another kind"),
        pytest.param("{", "is no YAML", id="no YAML"),
        pytest.param(None, "cannot read", id="no file"),
        pytest.param("kind: FineTuneJob", "spec is required", id="no spec"),
    ],
)
def test_a_file_that_is_no_job_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], contents: str | None, words: str
) -> None:
    if contents is not None:
        (tmp_path / "job.yaml").write_text(contents)
    assert preview.main([str(tmp_path / "job.yaml")]) == ExitCode.USER_ERROR
    assert words in capsys.readouterr().err
