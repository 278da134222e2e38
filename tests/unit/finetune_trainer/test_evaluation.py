"""Evaluation against transformers used plainly: each document alone, each prompt by generate()."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from finetune_trainer import contract
from finetune_trainer.answer_scores import rouge_l
from finetune_trainer.artifacts import artifact_ref, new_artifact
from finetune_trainer.contract import ContractError, ExitCode, StageConfig
from finetune_trainer.errors import UserError
from finetune_trainer.formats import build_prompt
from finetune_trainer.stage import reusable_report
from finetune_trainer.stages import evaluate
from finetune_trainer.tokenization import Encoder, load_tokenizer

LENGTH = 24
PACKED = [[list(range(5, 15)), list(range(40, 48))], [list(range(100, 124))], [[7, 8, 9], [9, 8, 7, 6], [50, 51, 52]]]
"""Rows of documents; the first two tokens of each are its prompt."""


def write_prepared(folder: Path, rows: Sequence[Sequence[Sequence[int]]]) -> Path:
    """A prepare artifact whose held-out rows hold these documents."""
    shape = (len(rows), LENGTH)
    arrays = {name: torch.zeros(shape, dtype=torch.int32) for name in ("input_ids", "position_ids", "segment_ids")}
    arrays["labels"] = torch.full(shape, -100, dtype=torch.int32)
    for row, documents in enumerate(rows):
        start = 0
        for number, tokens in enumerate(documents):
            place = slice(start, start + len(tokens))
            arrays["input_ids"][row, place] = torch.tensor(tokens)
            arrays["position_ids"][row, place] = torch.arange(len(tokens))
            arrays["segment_ids"][row, place] = number + 1
            arrays["labels"][row, start + 2 : start + len(tokens)] = torch.tensor(tokens[2:])
            start += len(tokens)
    with new_artifact(folder, "prepare") as writer:
        save_file(arrays, writer.folder / "validation.safetensors")
        writer.write("data.json", json.dumps({"format": "dolly"}).encode())
    return folder


def plain_loss(model: Any) -> tuple[float, int]:
    """Mean loss over every document alone."""
    total, count = 0.0, 0
    for tokens in (document for row in PACKED for document in row):
        ids = torch.tensor([tokens])
        labels = ids.clone()
        labels[:, :2] = -100
        with torch.no_grad():
            loss = model(ids, labels=labels).loss
        total += float(loss) * (len(tokens) - 2)
        count += len(tokens) - 2
    return total / count, count


def plain_answer(model: Any, folder: Path, text: str, tokens: int) -> str:
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([Encoder(tokenizer).encode_prompts([build_prompt("dolly", text)])[0]])
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path, adapter_artifacts: ModuleType) -> Path:
    return adapter_artifacts.random_adapter(tiny_model, tmp_path / "adapter", lora_alpha=64)


@pytest.fixture
def make_config(workspace: Path, tiny_model: Path, adapter: Path, adapter_artifacts: ModuleType) -> Any:
    model = adapter_artifacts.copy_artifact(tiny_model, workspace / "model", "model")
    consolidated = adapter_artifacts.copy_artifact(adapter, workspace / "consolidated", "consolidate")

    def make(spec: dict[str, Any], rows: Any = PACKED, *, merged: Path | None = None) -> StageConfig:
        inputs = [model, write_prepared(workspace / "prepare", rows), consolidated]
        names = ["model", "prepare", "consolidate"]
        if merged is not None:
            inputs.append(adapter_artifacts.copy_artifact(merged, workspace / "merged", "merge"))
            names.append("merge")
        return adapter_artifacts.stage_config(workspace, "evaluate", {"evaluate": spec}, inputs, names)

    return make


@pytest.fixture
def merged(tiny_model: Path, adapter: Path, tmp_path: Path) -> Path:
    """The merge by peft, with the tokenizer beside it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


@pytest.mark.parametrize("use_merged", [False, True], ids=["base with its adapter", "the merged model"])
def test_losses_and_answers_are_those_of_each_document_and_prompt_alone(
    make_config: Any, tiny_model: Path, adapter: Path, merged: Path, use_merged: bool
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    base_loss, tokens = plain_loss(base)
    base_answer = plain_answer(base, tiny_model, "Who?", 5)
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    tuned_loss, _ = plain_loss(tuned)
    tuned_answer = plain_answer(tuned, tiny_model, "Who?", 5)
    assert abs(base_loss - tuned_loss) > 1e-3
    assert base_answer != tuned_answer

    spec = {"prompts": [{"text": "Who?", "expected": f" {tuned_answer}\n"}], "maxNewTokens": 5}
    config = make_config(spec, merged=merged if use_merged else None)
    report = evaluate.run(config)

    assert report.exit_code == ExitCode.SUCCESS
    assert report.metrics["baseLoss"] == pytest.approx(base_loss, abs=2e-6)
    assert report.metrics["tunedLoss"] == pytest.approx(tuned_loss, abs=2e-6)
    assert report.metrics["tunedPerplexity"] == pytest.approx(math.exp(tuned_loss), rel=1e-5)
    assert report.metrics["tokens"] == tokens
    evaluation = json.loads((config.output_path / "evaluation.json").read_text())
    assert evaluation["prompts"] == [
        {
            "prompt": build_prompt("dolly", "Who?"),
            "expected": f" {tuned_answer}\n",
            "base": base_answer,
            "tuned": tuned_answer,
            "baseExact": False,
            "tunedExact": True,
            "baseRougeL": pytest.approx(rouge_l(base_answer, tuned_answer), abs=1e-6),
            "tunedRougeL": pytest.approx(rouge_l(tuned_answer, tuned_answer), abs=1e-6),
        }
    ]
    assert (report.metrics["baseExact"], report.metrics["tunedExact"]) == (0, 1)
    assert (report.metrics["baseExactMatch"], report.metrics["tunedExactMatch"]) == (0.0, 1.0)
    assert report.metrics["generation"] == {
        "doSample": False,
        "temperature": 0.6,
        "topP": 0.9,
        "maxNewTokens": 5,
        "seed": 42,
    }
    assert "gatePassed" not in report.metrics
    assert ("mergedLogitDifference" in report.metrics) == use_merged
    if use_merged:
        assert report.metrics["mergedLogitDifference"] < 1e-5
        assert report.metrics["mergedGreedyAgreement"] == 1.0


def test_a_model_of_which_every_weight_was_trained_is_measured_as_it_is(
    make_config: Any, merged: Path, tiny_model: Path, workspace: Path, adapter_artifacts: ModuleType
) -> None:
    tuned_loss, _ = plain_loss(AutoModelForCausalLM.from_pretrained(merged).eval())
    config = make_config({})
    whole = adapter_artifacts.copy_artifact(merged, workspace / "whole", "consolidate")
    inputs = {**config.inputs, "consolidate": artifact_ref(workspace, whole)}
    report = evaluate.run(replace(config, inputs=inputs))
    assert report.metrics["tunedLoss"] == pytest.approx(tuned_loss, abs=2e-6)
    assert abs(report.metrics["baseLoss"] - tuned_loss) > 1e-3
    assert "mergedLogitDifference" not in report.metrics


@pytest.mark.parametrize("use_merged", [False, True], ids=["base with its adapter", "the merged model"])
def test_dora_and_modules_saved_whole_count_with_and_without_a_merge(
    make_config: Any, tiny_model: Path, tmp_path: Path, workspace: Path, adapter_artifacts: ModuleType, use_merged: bool
) -> None:
    settings = {"lora_alpha": 64, "use_dora": True, "modules_to_save": ["lm_head"]}
    adapter = adapter_artifacts.random_adapter(tiny_model, tmp_path / "dora", **settings)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter).eval()
    tuned_loss, _ = plain_loss(tuned)
    merged = tmp_path / "merged-dora"
    tuned.merge_and_unload().save_pretrained(merged)
    config = make_config({}, merged=merged if use_merged else None)
    consolidated = adapter_artifacts.copy_artifact(adapter, workspace / "dora", "consolidate")
    inputs = {**config.inputs, "consolidate": artifact_ref(workspace, consolidated)}
    report = evaluate.run(replace(config, inputs=inputs))
    assert report.metrics["tunedLoss"] == pytest.approx(tuned_loss, abs=2e-6)
    assert report.metrics.get("mergedLogitDifference", 0.0) < 1e-5


def test_a_merged_model_that_lacks_its_adapter_is_seen_in_the_logits(make_config: Any, tiny_model: Path) -> None:
    report = evaluate.run(make_config({}, merged=tiny_model))
    assert report.metrics["mergedLogitDifference"] > 0.1
    assert report.metrics["baseLoss"] == report.metrics["tunedLoss"]


def test_a_gate_that_is_passed_says_so(make_config: Any) -> None:
    report = evaluate.run(make_config({"gate": {"maxLossRatioToBase": 100}}))
    assert report.exit_code == ExitCode.SUCCESS
    assert report.metrics["gatePassed"] is True


def test_a_missed_gate_fails_with_metric_value_and_threshold_and_keeps_the_numbers(make_config: Any) -> None:
    config = make_config({"gate": {"maxLossRatioToBase": 0.01}})
    report = evaluate.run(config)
    assert (report.exit_code, report.reason) == (ExitCode.USER_ERROR, "EvalBelowThreshold")
    assert report.metrics["gatePassed"] is False
    for words in ("held-out loss", str(report.metrics["tunedLoss"]), str(report.metrics["baseLoss"]), "allows 0.01"):
        assert words in report.message
    assert report.artifacts.keys() == {"evaluate"}
    again = reusable_report(config)
    assert again is not None
    assert (again.exit_code, again.reason, again.reused) == (ExitCode.USER_ERROR, "EvalBelowThreshold", True)
    assert again.message == report.message


def test_every_missed_threshold_is_told(make_config: Any) -> None:
    prompts = [{"text": "Who?", "expected": "The Smiths."}, {"text": "What?"}]
    gate = {"maxLoss": 0.01, "maxPerplexity": 1, "minExactMatch": 1, "minRougeL": 0.999, "maxLossRatioToBase": 100}
    report = evaluate.run(make_config({"prompts": prompts, "maxNewTokens": 2, "gate": gate}))
    assert report.reason == "EvalBelowThreshold"
    assert re.findall(r"gate\.(\w+)", report.message) == ["maxLoss", "maxPerplexity", "minExactMatch", "minRougeL"]
    assert "exact match is 0.0, the mean over 1 prompts" in report.message


def test_sampled_answers_are_the_same_again_and_others_with_another_seed(make_config: Any) -> None:
    spec = {"prompts": [{"text": "Who?"}, {"text": "What?"}], "maxNewTokens": 8, "doSample": True, "temperature": 1.5}
    config = make_config(spec)

    def answers(**changes: Any) -> list[tuple[str, str]]:
        number = next(outputs)
        changed = replace(config, spec={"evaluate": {**spec, **changes}}, output=f"{config.output}-{number}")
        evaluate.run(changed)
        evaluation = json.loads((changed.output_path / "evaluation.json").read_text())
        return [(entry["base"], entry["tuned"]) for entry in evaluation["prompts"]]

    outputs = itertools.count()
    first = answers()
    assert answers() == first
    assert answers(prompts=[{"text": "What?"}]) == first[1:]
    assert answers(seed=43) != first
    assert answers(doSample=False) != first


def test_of_few_likely_tokens_top_p_leaves_the_likeliest(make_config: Any) -> None:
    spec = {"prompts": [{"text": "Who?"}], "maxNewTokens": 4}
    config = make_config(spec)
    found = []
    for number, sampling in enumerate(({"doSample": False}, {"doSample": True, "topP": 1e-6})):
        changed = replace(config, spec={"evaluate": spec | sampling}, output=f"{config.output}-{number}")
        evaluate.run(changed)
        found.append(json.loads((changed.output_path / "evaluation.json").read_text())["prompts"])
    assert found[0] == found[1]


def test_without_held_out_rows_there_is_no_loss_but_a_note(make_config: Any) -> None:
    config = make_config({"prompts": [{"text": "Who?", "context": "The Smiths."}], "maxNewTokens": 2}, rows=[])
    report = evaluate.run(config)
    evaluation = json.loads((config.output_path / "evaluation.json").read_text())
    assert evaluation["baseLoss"] is evaluation["tunedLoss"] is evaluation["basePerplexity"] is None
    assert "validationPercent" in evaluation["note"]
    assert evaluation["prompts"][0]["prompt"] == build_prompt("dolly", "Who?", "The Smiths.")
    assert evaluation["prompts"][0]["baseExact"] is None
    assert report.metrics["promptsAnswered"] == 1


def test_a_gate_without_held_out_rows_is_refused_before_a_model_is_loaded(make_config: Any) -> None:
    with pytest.raises(UserError, match="held out 0 rows.*validationPercent"):
        evaluate.run(make_config({"gate": {"maxLossRatioToBase": 1}}, rows=[]))


def test_a_prompt_that_leaves_no_room_is_named(make_config: Any) -> None:
    spec = {"prompts": [{"text": "short"}, {"text": "word " * 300}], "maxNewTokens": 64}
    with pytest.raises(UserError, match=r"prompts\[1\] has \d+ tokens.*256 positions"):
        evaluate.run(make_config(spec))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        pytest.param({"prompts": ["Who?"]}, r"prompts\[0\] must have a text", id="a prompt that is a string"),
        pytest.param({"maxNewTokens": -1}, "maxNewTokens is -1", id="a negative length"),
        pytest.param({"gate": {"maxLossRatioToBase": "low"}}, "maxLossRatioToBase is 'low'", id="a gate of words"),
        pytest.param({"gate": {"maxLossRatioToBase": 0}}, "maxLossRatioToBase is 0", id="a gate of zero"),
        pytest.param({"gate": {"maxLos": 1}}, "gate.maxLos is no threshold", id="a threshold that is not known"),
        pytest.param({"doSample": "yes"}, "doSample is 'yes'", id="sampling in a word"),
        pytest.param({"temperature": 0}, "temperature is 0", id="no temperature"),
        pytest.param({"topP": 1.1}, "topP is 1.1", id="more than all tokens"),
        pytest.param({"seed": -1}, "seed is -1", id="a negative seed"),
    ],
)
def test_a_wrong_field_is_named(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ContractError, match=words):
        evaluate.parse_args(StageConfig("evaluate", "image", {"evaluate": spec}, "out"))


def test_the_report_shows_three_answers_cut_to_200_characters_and_fits() -> None:
    prompts = [
        {"prompt": "p" * 300, "expected": None, "base": "b", "tuned": "ä" * 900, "baseExact": None, "tunedExact": True}
    ] * 9
    metrics = evaluate.summarize({"baseLoss": 1.0, "tunedLoss": None, "prompts": prompts})
    assert [len(entry["tuned"]) for entry in metrics["prompts"]] == [200] * 3
    assert metrics["prompts"][0]["prompt"] == "p" * 199 + "…"
    assert (metrics["promptsAnswered"], metrics["tunedExact"]) == (9, 9)
    assert "tunedLoss" not in metrics
    assert len(contract.canonical_json(metrics)) < 2900


def test_answers_that_would_not_fit_the_report_stay_in_the_artifact() -> None:
    wide = dict.fromkeys(("prompt", "expected", "base", "tuned"), "😀" * 200)
    metrics = evaluate.summarize({"prompts": [{**wide, "baseExact": False, "tunedExact": False}] * 3})
    assert "prompts" not in metrics
    assert metrics["promptsAnswered"] == 3
