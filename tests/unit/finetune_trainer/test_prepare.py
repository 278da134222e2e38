"""prepare from its stage.json to its artifact, through the program's own entry."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
from chat_templates import MISTRAL
from safetensors.numpy import load_file

from finetune_trainer import contract, stage
from finetune_trainer.artifacts import find_artifact, remove_artifact, verify_artifact
from finetune_trainer.contract import ExitCode, StageConfig
from finetune_trainer.formats import open_format
from finetune_trainer.rows import IGNORED
from finetune_trainer.tokenization import Encoder, load_tokenizer

OUTPUT = "finetune/jobs/default/job/prepare-0123456789abcdef"
LENGTH = 96


def dolly(number: int) -> dict[str, str]:
    context = f"Number {number} is big." if number % 3 == 0 else ""
    return {"instruction": f"What is number {number}?", "context": context, "response": f"It is {number * 7}."}


@pytest.fixture
def base(workspace: Path, tiny_model: Path) -> Path:
    (workspace / "data").mkdir()
    shutil.copytree(tiny_model, workspace / "base")
    write_records(workspace, [dolly(number) for number in range(60)])
    return workspace


def write_records(workspace: Path, records: list[Any], name: str = "train.jsonl") -> None:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (workspace / "data" / name).write_text("\n".join(lines) + "\n")


def make_config(
    workspace: Path, dataset: dict[str, Any] | None = None, training: dict[str, Any] | None = None
) -> StageConfig:
    data = {"source": "workspace:///data", "format": "dolly", "maxLength": LENGTH, "validationPercent": 10}
    return StageConfig(
        stage="prepare",
        image="image",
        spec={
            "model": {"source": "workspace:///base", "revision": "main", "trustRemoteCode": False},
            "dataset": {**data, **(dataset or {})},
            "training": training or {"maxSteps": 20, "seed": 7},
        },
        output=OUTPUT,
        parallelism={"globalBatchSize": 4},
        workspace=str(workspace),
    )


def run(config: StageConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The report of the program `finetune-trainer prepare`."""
    path = config.workspace_path / "stage.json"
    path.write_text(json.dumps(config.as_json()))
    monkeypatch.setenv(contract.TERMINATION_PATH_ENV, str(config.workspace_path / "termination"))
    code = stage.main(["prepare", "--config", str(path)])
    report: dict[str, Any] = json.loads((config.workspace_path / "termination").read_bytes())
    assert code == report["exitCode"]
    return report


def documents(rows: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of every document of a rows file, in the order of rows."""
    found = []
    for ids, labels, positions, segments in zip(*(rows[key] for key in KEYS), strict=True):
        for segment in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == segment)
            assert positions[places].tolist() == list(range(len(places)))
            assert places.tolist() == list(range(places[0], places[-1] + 1))
            found.append((ids[places].tolist(), labels[places].tolist()))
        assert (labels[segments == 0] == IGNORED).all()
        assert (positions[segments == 0] == 0).all()
    return found


KEYS = ("input_ids", "labels", "position_ids", "segment_ids")


def test_the_artifact_holds_all_that_training_reads(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(base)
    report = run(config, monkeypatch)
    assert (report["exitCode"], report["reused"]) == (ExitCode.SUCCESS, False)
    assert report["artifacts"].keys() == {"prepare", "model", "dataset"}
    for ref in report["artifacts"].values():
        verify_artifact(base / ref["path"], ref["digest"])

    out = config.output_path
    assert sorted(path.name for path in out.iterdir()) == [
        "data.json", "label-audit.jsonl", "manifest.json", "order.safetensors",
        "rejected.jsonl", "rows.safetensors", "validation.safetensors",
    ]  # fmt: skip
    data = json.loads((out / "data.json").read_text())
    rows, held_out = load_file(out / "rows.safetensors"), load_file(out / "validation.safetensors")
    assert {key: (value.dtype, value.shape) for key, value in rows.items()} == {
        key: (np.dtype("int32"), (data["rows"], LENGTH)) for key in KEYS
    }
    tokenizer = load_tokenizer(base / "base")
    texts = [tokenizer.decode(tokens) for tokens, _ in documents(rows) + documents(held_out)]
    expected = []
    for record in map(dolly, range(60)):
        context = f"### Context\n{record['context']}\n\n" if record["context"] else ""
        expected.append(f"<s>### Instruction\n{record['instruction']}\n\n{context}### Answer\n{record['response']}</s>")
    assert sorted(texts) == sorted(expected)
    for tokens, labels in documents(rows):
        learnt = [token for token in labels if token != IGNORED]
        assert tokenizer.decode(learnt).startswith("It is ")
        assert learnt == tokens[-len(learnt) :]
        assert learnt[-1] == tokenizer.eos_token_id
    assert len(documents(held_out)) == 6
    assert data["supervisedTokens"] == (rows["labels"] != IGNORED).sum() == report["metrics"]["supervisedTokens"]
    assert data["tokens"] == (rows["segment_ids"] > 0).sum()

    order = load_file(out / "order.safetensors")["order"]
    assert order.dtype == np.int32
    assert order.shape == (20 * 4,)
    assert sorted(order[: data["rows"]]) == list(range(data["rows"]))


def test_the_report_has_the_sizes_of_the_model(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(make_config(base), monkeypatch)
    weights = load_file(base / "base" / "model.safetensors")
    assert report["metrics"]["model"] == {
        "hiddenSize": tiny_model.HIDDEN_SIZE,
        "layers": tiny_model.LAYERS,
        "heads": tiny_model.HEADS,
        "kvHeads": tiny_model.KV_HEADS,
        "intermediateSize": tiny_model.INTERMEDIATE_SIZE,
        "vocabSize": len(weights["model.embed_tokens.weight"]),
        "parameters": sum(tensor.size for tensor in weights.values()),
        "tied": False,
        "modelType": "llama",
    }


def test_a_model_whose_config_has_other_words_is_reported_without_sizes(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = base / "base" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "num_hidden_layers"}))
    report = run(make_config(base), monkeypatch)
    assert (report["exitCode"], "model" in report["metrics"]) == (ExitCode.SUCCESS, False)


def test_the_same_stage_config_gives_the_same_bytes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(base)
    first = run(config, monkeypatch)
    remove_artifact(config.output_path)
    again = run(config, monkeypatch)
    assert again["artifacts"] == first["artifacts"]
    assert run(config, monkeypatch)["reused"] is True


def test_a_prepare_that_is_killed_goes_on_where_it_was_and_ends_in_the_same_bytes(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune_trainer import documents as documents_module

    monkeypatch.setattr(documents_module, "_BATCH", 10)
    write_records(base, [*map(dolly, range(25)), "{", *map(dolly, range(25, 60))])
    config = make_config(base, {"maxRejectedPercent": 2})
    uninterrupted = run(config, monkeypatch)
    assert uninterrupted["exitCode"] == ExitCode.SUCCESS
    remove_artifact(config.output_path)
    program = (
        "import os, signal, sys; from finetune_trainer import documents, spool, stage\n"
        "documents._BATCH, commit = 10, spool.DocumentSpool.commit\n"
        "def commit_then_die(self, note=None):\n"
        "    commit(self, note)\n"
        "    if len(self) == 39: os.kill(os.getpid(), signal.SIGKILL)\n"
        "spool.DocumentSpool.commit = commit_then_die\n"
        f"stage.main(['prepare', '--config', {str(base / 'stage.json')!r}])"
    )
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=90, check=False)
    assert killed.returncode == -9, killed.stderr.decode()
    assert find_artifact(config.output_path) is None
    capsys.readouterr()
    resumed = run(config, monkeypatch)
    assert "an earlier attempt has read 40 records: going on after its 39 documents" in capsys.readouterr().out
    assert resumed["artifacts"] == uninterrupted["artifacts"]
    assert [path.name for path in config.output_path.parent.iterdir()] == [config.output_path.name]


def test_a_lost_model_is_fetched_again_though_the_data_is_there(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(base)
    first = run(config, monkeypatch)
    remove_artifact(base / first["artifacts"]["model"]["path"])
    again = run(config, monkeypatch)
    assert again["reused"] is False
    assert again["artifacts"] == first["artifacts"]


@pytest.mark.parametrize(
    ("dataset", "training", "expected"),
    [
        pytest.param({"packing": "none"}, None, {"rows": 54, "documents": 54, "maxSteps": 20}, id="a document a row"),
        pytest.param(
            {"packing": "none"}, {"epochs": 3}, {"maxSteps": 41, "epochs": 3.037037}, id="epochs become steps"
        ),
        pytest.param(
            {"validationPercent": 0}, None, {"documents": 60, "validationDocuments": 0}, id="nothing held out"
        ),
    ],
)
def test_what_is_counted(
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    dataset: dict[str, Any],
    training: dict[str, Any] | None,
    expected: dict[str, Any],
) -> None:
    metrics = run(make_config(base, dataset, training), monkeypatch)["metrics"]
    assert {name: metrics[name] for name in expected} == expected


def test_fewer_rows_than_a_batch_are_read_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(base, [dolly(1)])
    config = make_config(base, {"validationPercent": 0}, {"maxSteps": 2})
    assert run(config, monkeypatch)["metrics"]["rows"] == 1
    assert load_file(config.output_path / "order.safetensors")["order"].tolist() == [0] * 8
    assert load_file(config.output_path / "validation.safetensors")["input_ids"].shape == (0, LENGTH)


def test_loss_on_all_learns_all_but_the_first_token(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(base, {"lossOn": "all"})
    run(config, monkeypatch)
    for tokens, labels in documents(load_file(config.output_path / "rows.safetensors")):
        assert labels == [IGNORED, *tokens[1:]]


LONG = {"instruction": "x", "response": "q" * 200}


def test_wrapped_takes_documents_longer_than_a_row_and_says_what_cuts_cost(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_records(base, [*map(dolly, range(60)), {"instruction": "x", "response": "ab " * 200}])
    config = make_config(base, {"packing": "wrapped", "lossOn": "all"})
    assert run(config, monkeypatch)["exitCode"] == ExitCode.SUCCESS
    data = json.loads((config.output_path / "data.json").read_text())
    for name, count in (("rows", data["documents"]), ("validation", data["validationDocuments"])):
        rows = load_file(config.output_path / f"{name}.safetensors")
        full = (rows["segment_ids"] > 0).sum(axis=1)
        assert (full[:-1] == LENGTH).all()
        found = documents(rows)
        assert sum(tokens[0] == 0 for tokens, _ in found) == count
        assert all(labels == [IGNORED, *tokens[1:]] for tokens, labels in found)
        if name == "rows":
            assert (data["tokens"], data["cuts"]) == (full.sum(), len(found) - count)
            # with lossOn all each cut costs exactly the one token after it
            assert data["unlearntAtCuts"] == data["cuts"] > 5
            assert data["supervisedTokens"] == (rows["labels"] != IGNORED).sum()
    assert f"{data['unlearntAtCuts']} tokens that begin a row there are not learnt" in capsys.readouterr().out


def test_a_step_that_would_learn_nothing_is_told_before_training(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(base, [{"instruction": "ab " * 2000, "response": "y"}])
    config = make_config(base, {"packing": "wrapped", "validationPercent": 0}, {"maxSteps": 30})
    report = run(config, monkeypatch)
    assert (report["exitCode"], report["reason"]) == (ExitCode.USER_ERROR, "NothingSupervised")
    assert "no token of the 4 rows of step" in report["message"]
    assert [path.name for path in config.output_path.parent.iterdir()] == []


@pytest.mark.parametrize(
    ("record", "words"),
    [
        pytest.param('{"instruction": ', "train.jsonl, line 61: no JSON", id="a broken line"),
        pytest.param(
            {"instruction": "x"}, "line 61, field 'response': missing; the record has instruction", id="no field"
        ),
        pytest.param(LONG, "line 61: 211 tokens, maxLength is 96", id="too long"),
        pytest.param({"instruction": "x", "response": ["y"]}, "line 61, field 'response': expected text", id="a list"),
    ],
)
def test_one_wrong_record_fails_the_stage_and_is_named(
    base: Path, monkeypatch: pytest.MonkeyPatch, record: Any, words: str
) -> None:
    write_records(base, [*map(dolly, range(60)), record])
    config = make_config(base)
    report = run(config, monkeypatch)
    assert (report["exitCode"], report["reason"]) == (ExitCode.USER_ERROR, "RecordsRejected")
    assert words in report["message"]
    assert find_artifact(config.output_path) is None
    assert [path.name for path in config.output_path.parent.iterdir()] == []


def question(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"What is number {number}?"},
        {"role": "assistant", "content": f"It is {number * 7}."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]


def use_chat_template(base: Path, template: str) -> None:
    path = base / "base" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


def test_conversations_are_learnt_where_the_assistant_speaks(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_chat_template(base, MISTRAL)
    write_records(base, [{"messages": question(number)} for number in range(60)])
    config = make_config(base, {"format": "messages"})
    report = run(config, monkeypatch)
    assert report["exitCode"] == 0
    tokenizer = load_tokenizer(base / "base")
    for tokens, labels in documents(load_file(config.output_path / "rows.safetensors")):
        text = tokenizer.decode([token for token in labels if token != IGNORED])
        number = int(tokenizer.decode(tokens).split("number ")[1].split("?")[0])
        assert text == f" It is {number * 7}.</s> Yes.</s>"
        assert all(label in (IGNORED, token) for token, label in zip(tokens, labels, strict=True))
    data = json.loads((config.output_path / "data.json").read_text())
    record_format = open_format("messages", tokenizer=tokenizer)
    assert data["promptSha256"] == record_format.prompt_digest()
    assert data["stopTokenIds"] == [tokenizer.eos_token_id]


def test_a_beginning_of_sequence_that_the_tokenizer_adds_again_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pain of other trainers: the template has the token, and the tokenizer puts another in front of it."""
    template = {"prompt": "<s>[INST] {instruction} [/INST]", "completion": " {response}"}
    report = run(make_config(base, {"format": "template", "template": template}), monkeypatch)
    assert report["reason"] == "RecordsRejected"
    assert "(doubleBos 10)" in report["message"]
    template["prompt"] = template["prompt"].removeprefix("<s>")
    report = run(make_config(base, {"format": "template", "template": template}), monkeypatch)
    assert (report["exitCode"], report["metrics"]["doubleBos"]) == (0, 0)


def test_a_model_without_a_chat_template_is_told_what_to_do(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(base, [{"messages": question(number)} for number in range(9)])
    report = run(make_config(base, {"format": "messages"}), monkeypatch)
    assert (report["exitCode"], report["reason"]) == (ExitCode.USER_ERROR, "NoChatTemplate")


def test_the_label_audit_counts_all_documents_and_shows_some(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(base)
    report = run(config, monkeypatch)
    counts, *samples = [
        json.loads(line) for line in (config.output_path / "label-audit.jsonl").read_text().splitlines()
    ]
    assert counts["documents"] == sum(counts["supervisedHistogram"]) == 60
    assert (counts["stopSupervisedPercent"], counts["doubleBos"], counts["violations"]) == (100, 0, [])
    assert counts["supervisedPercent"] == round(100 * counts["supervisedTokens"] / counts["tokens"], 3)
    assert {name: report["metrics"][name] for name in ("supervisedPercent", "supervisedHistogram")} == {
        name: counts[name] for name in ("supervisedPercent", "supervisedHistogram")
    }
    assert len(samples) == 20
    for sample in samples:
        record = dolly(sample["line"] - 1)
        assert sample["file"] == "train.jsonl"
        assert [span["text"] for span in sample["spans"] if span["learnt"]] == [record["response"] + "</s>"]
        assert (sample["offsets"], sample["learnsToStop"]) == ("same", True)


def test_labels_that_never_teach_to_stop_end_the_stage(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Encoder.encode_examples

    def without_the_end(self: Encoder, examples: Any) -> Any:
        return [
            replace(document, learnt=[(document.learnt[0][0], len(document.tokens) - 1)])
            for document in encode(self, examples)
        ]

    monkeypatch.setattr(Encoder, "encode_examples", without_the_end)
    report = run(make_config(base), monkeypatch)
    assert (report["exitCode"], report["reason"]) == (ExitCode.USER_ERROR, "LabelAuditFailed")
    assert "0 of 60 documents teach the model to stop" in report["message"]


def test_what_is_wrong_with_records_is_counted_by_kind(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ["{", LONG, {"instruction": 1}, {"instruction": "x", "response": " "}, {"instruction": "", "response": "x"}]
    write_records(base, [*map(dolly, range(95)), *wrong])
    metrics = run(make_config(base, {"maxRejectedPercent": 5}), monkeypatch)["metrics"]
    assert metrics["rejectedByKind"] == {"broken": 1, "empty": 2, "tooLong": 1, "wrongField": 1}


def test_ten_problems_are_listed_and_no_more(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(base, ["{"] * 30)
    message = run(make_config(base), monkeypatch)["message"]
    assert message.count("train.jsonl, line ") == 10


def test_wrong_records_within_the_allowed_share_are_left_out_and_listed(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(base, [*map(dolly, range(97)), "{", LONG, {"instruction": 1}])
    config = make_config(base, {"maxRejectedPercent": 3})
    report = run(config, monkeypatch)
    assert report["metrics"]["rejected"] == 3
    assert report["metrics"]["documents"] + report["metrics"]["validationDocuments"] == 97
    listed = [json.loads(line) for line in (config.output_path / "rejected.jsonl").read_text().splitlines()]
    assert sorted(problem["line"] for problem in listed) == [98, 99, 100]
    remove_artifact(config.output_path)
    refused = run(make_config(base, {"maxRejectedPercent": 2}), monkeypatch)
    assert "3 of 100 records cannot be used, maxRejectedPercent is 2" in refused["message"]


@pytest.mark.parametrize(
    ("dataset", "training", "reason", "words"),
    [
        pytest.param({"format": "chat"}, None, "InvalidSpec", "spec.dataset.format: must be", id="an unknown format"),
        pytest.param({"packing": "greedy"}, None, "InvalidSpec", "spec.dataset.packing", id="an unknown packing"),
        pytest.param({"lossOn": "some"}, None, "InvalidSpec", "spec.dataset.lossOn", id="an unknown lossOn"),
        pytest.param({"maxLength": True}, None, "InvalidSpec", "maxLength: must be a whole number", id="a wrong type"),
        pytest.param(
            {"maxLength": 0}, None, "InvalidSpec", "spec.dataset.maxLength: must be at least 16", id="no length"
        ),
        pytest.param({"format": None}, None, "InvalidSpec", "spec.dataset.format: format is required", id="no format"),
        pytest.param({}, {"maxSteps": 1, "epochs": 1}, "InvalidSpec", "exactly one of", id="steps and epochs"),
        pytest.param({}, {"seed": 1}, "InvalidSpec", "exactly one of", id="neither steps nor epochs"),
        pytest.param(
            {"format": "chat", "maxLength": 0, "source": "data"},
            {"maxSteps": 0},
            "InvalidSpec",
            "spec.training.maxSteps: must be at least 1, is 0",
            id="the last of four mistakes that are told at once",
        ),
        pytest.param(
            {"maxLength": 512}, None, "MaxLengthTooLong", "the model has 256 positions", id="longer than the model"
        ),
        pytest.param({"source": "workspace:///none"}, None, "SourceNotFound", "/none", id="no dataset"),
        pytest.param({"files": "*.txt"}, None, "DatasetNotUsable", "fits no file", id="no such files"),
    ],
)
def test_a_wrong_spec_is_a_user_error(
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    dataset: dict[str, Any],
    training: dict[str, Any] | None,
    reason: str,
    words: str,
) -> None:
    report = run(make_config(base, dataset, training), monkeypatch)
    assert (report["exitCode"], report["reason"]) == (ExitCode.USER_ERROR, reason)
    assert words in report["message"]


def test_an_empty_dataset_is_a_user_error(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(base, [""])
    assert run(make_config(base), monkeypatch)["reason"] == "NoDocuments"


def test_a_base_whose_weights_are_quantized_is_refused_before_its_data_is_fetched(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = base / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    report = run(make_config(base), monkeypatch)
    assert (report["exitCode"], report["reason"]) == (ExitCode.USER_ERROR, "QuantizedBaseModel")
    assert "quantization_config of config.json says gptq" in report["message"]
    assert not (base / "finetune" / "datasets").exists()


def test_a_tokenizer_of_another_model_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((base / "base" / "config.json").read_text()) | {"vocab_size": 50}
    (base / "base" / "config.json").write_text(json.dumps(config))
    report = run(make_config(base), monkeypatch)
    assert report["reason"] == "TokenizerNotUsable"
    assert "vocab_size is 50" in report["message"]


def test_a_padding_token_that_the_model_has_no_embedding_for_is_not_used(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = base / "base" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "[PAD]"}))
    assert run(make_config(base), monkeypatch)["exitCode"] == 0
    vocabulary = json.loads((base / "base" / "config.json").read_text())["vocab_size"]
    assert load_file(base / OUTPUT / "rows.safetensors")["input_ids"].max() < vocabulary


def test_the_program_needs_no_home_no_torch_and_no_writable_root(base: Path, tmp_path: Path) -> None:
    config = make_config(base)
    (base / "stage.json").write_text(json.dumps(config.as_json()))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "TMPDIR": str(scratch),
        contract.TERMINATION_PATH_ENV: str(tmp_path / "report"),
    }
    program = (
        "import sys; from finetune_trainer import stage; stage.set_environment('prepare')\n"
        f"code = stage.main(['prepare', '--config', {str(base / 'stage.json')!r}])\n"
        "print('torch' in sys.modules, 'boto3' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False False"
    assert done.stderr == ""


def test_evaluation_sees_the_very_tokens_of_training(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.formats import build_prompt

    config = make_config(base, {"validationPercent": 0})
    run(config, monkeypatch)
    data = json.loads((config.output_path / "data.json").read_text())
    encoder = Encoder(load_tokenizer(base / "base", trust_remote_code=data["trustRemoteCode"]))
    (asked,) = encoder.encode_prompts([build_prompt(data["format"], "What is number 1?")])
    trained = [tokens for tokens, _ in documents(load_file(config.output_path / "rows.safetensors"))]
    assert sum(tokens[: len(asked)] == asked for tokens in trained) == 1
