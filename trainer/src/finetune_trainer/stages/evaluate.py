"""The evaluate stage: is the tuned model better than its base, on held-out rows and on the job's prompts?

Reads inputs `model`, `prepare` and `consolidate`, and `merge` where it ran. The tuned model is the merged one; without
it the base with its adapter, by peft; or, where every weight was trained, consolidate's whole model. A merged model's
logits are held against base plus adapter. The base is the job's own, as its files are, also where training held it
quantized: that is what an adapter is merged into and served with, and what both ways to deliver one are compared by.
Writes evaluation.json: both losses and perplexities, both answers to each prompt and how near they come to the right
one. A gate that is missed still leaves the whole artifact: the numbers are the answer.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_trainer.adapters import ADAPTER_CONFIG_NAME
from finetune_trainer.answer_scores import is_exact_match, rouge_l
from finetune_trainer.artifacts import new_artifact, open_input, read_manifest
from finetune_trainer.batches import open_validation_rows, read_data
from finetune_trainer.contract import (
    CONSOLIDATE,
    EVALUATE,
    MERGE,
    MODEL_INPUT,
    PREPARE,
    ContractError,
    Report,
    StageConfig,
    canonical_json,
)
from finetune_trainer.cpus import available_cpus
from finetune_trainer.errors import UserError
from finetune_trainer.evaluation import (
    EncodedPrompt,
    Generation,
    HeldOutLoss,
    add_adapter,
    answer_prompts,
    check_lengths,
    compare_logits,
    load_model,
    measure_loss,
    pick_device,
    sample_logits,
)
from finetune_trainer.evaluation_gate import GATE_REMEDY, THRESHOLDS, missed_thresholds
from finetune_trainer.formats import RecordFormat, open_format
from finetune_trainer.model_files import read_model_config
from finetune_trainer.stage import finished_report, keep_report
from finetune_trainer.tokenization import Encoder, load_tokenizer
from finetune_trainer.tokenizer_files import PROMPT_KEY, carried_digests, check_tokenizer, tokenizer_files

EVALUATION_NAME = "evaluation.json"
DEFAULT_GENERATION = Generation(do_sample=False, temperature=0.6, top_p=0.9, max_new_tokens=256, seed=42)
"""How a stage.json that says nothing generates; the spec has the same defaults."""

_REPORTED_PROMPTS = 3
_REPORTED_CHARACTERS = 200
_REPORTED_BYTES = 2800
"""What metrics may take of the report's 4 KiB, which also holds the gate's message and the artifact."""


@dataclass(frozen=True)
class Prompt:
    """One of evaluate.prompts; `expected` is None where there is nothing to compare with."""

    text: str
    context: str | None
    expected: str | None


@dataclass(frozen=True)
class Args:
    """spec.evaluate. `gate` has the thresholds that are set by their fields' names, and is empty without a gate."""

    prompts: tuple[Prompt, ...]
    generation: Generation
    gate: Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """One model: held-out loss, None without held-out rows, and answers in the order of the prompts.

    `logits` at the sampled positions are what the tuned model must have (on the base's side: with the adapter on it);
    None where nothing was merged.
    """

    loss: HeldOutLoss | None
    answers: list[str]
    logits: torch.Tensor | None = None


def parse_args(config: StageConfig) -> Args:
    """Args of stage.json; ContractError names the field that is wrong."""
    spec = config.spec.get("evaluate") or {}
    prompts = []
    for number, entry in enumerate(spec.get("prompts") or ()):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("text"), str):
            raise ContractError(f"spec.evaluate.prompts[{number}] must have a text, got {entry!r}")
        prompts.append(Prompt(entry["text"], entry.get("context"), entry.get("expected")))
    gate = spec.get("gate") or {}
    if unknown := gate.keys() - THRESHOLDS.keys():
        names = ", ".join(THRESHOLDS)
        raise ContractError(f"spec.evaluate.gate.{min(unknown)} is no threshold, expected one of {names}")
    thresholds = {
        name: _number_above_zero(f"spec.evaluate.gate.{name}", gate[name])
        for name in THRESHOLDS
        if gate.get(name) is not None
    }
    return Args(tuple(prompts), _parse_generation(spec), thresholds)


def _parse_generation(spec: Mapping[str, Any]) -> Generation:
    do_sample = spec.get("doSample", DEFAULT_GENERATION.do_sample)
    if not isinstance(do_sample, bool):
        raise ContractError(f"spec.evaluate.doSample is {do_sample!r}, expected true or false")
    top_p = _number_above_zero("spec.evaluate.topP", spec.get("topP", DEFAULT_GENERATION.top_p))
    if top_p > 1:
        raise ContractError(f"spec.evaluate.topP is {top_p}, expected at most 1")
    return Generation(
        do_sample,
        _number_above_zero("spec.evaluate.temperature", spec.get("temperature", DEFAULT_GENERATION.temperature)),
        top_p,
        _integer("spec.evaluate.maxNewTokens", spec.get("maxNewTokens", DEFAULT_GENERATION.max_new_tokens), 1),
        _integer("spec.evaluate.seed", spec.get("seed", DEFAULT_GENERATION.seed), 0),
    )


def _number_above_zero(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ContractError(f"{field} is {value!r}, expected a number above zero")
    return float(value)


def _integer(field: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ContractError(f"{field} is {value!r}, expected an integer of at least {least}")
    return value


def run(config: StageConfig) -> Report:
    """Evaluate; a missed gate is reported as EvalBelowThreshold (user error) beside the complete artifact."""
    args = parse_args(config)
    prepared = open_input(config, PREPARE)
    data = read_data(prepared)
    rows = open_validation_rows(prepared)
    supervised = rows.supervised_in_all()
    about_loss = [name for name in args.gate if THRESHOLDS[name].needs_loss]
    if about_loss and not supervised:
        raise UserError(
            "NoHeldOutRows",
            f"evaluate.gate.{about_loss[0]} is about the held-out loss, and prepare held out {len(rows.input_ids)} "
            f"rows with {supervised} supervised tokens: raise dataset.validationPercent or drop the threshold",
        )
    base = open_input(config, MODEL_INPUT)
    merged = open_input(config, MERGE) if MERGE in config.inputs else None
    trained = open_input(config, CONSOLIDATE) if merged is None or CONSOLIDATE in config.inputs else None
    is_adapter = trained is not None and (trained / ADAPTER_CONFIG_NAME).is_file()
    adapter, whole = (trained, merged) if is_adapter else (None, merged or trained)
    remote_code = bool(data.get("trustRemoteCode"))
    tokenizer = load_tokenizer(base, trust_remote_code=remote_code)
    _check_tokenizers(data, base, whole)
    record_format = _open_format(data, tokenizer)
    encoder = Encoder(tokenizer, record_format.end_of_turn)
    prompts = _encode(args, record_format, encoder)
    check_lengths(prompts, args.generation.max_new_tokens, read_model_config(base).get("max_position_embeddings"))
    device = pick_device()
    torch.set_num_threads(available_cpus())
    print(
        f"{supervised} held-out tokens in {len(rows.input_ids)} rows and {len(prompts)} prompts on {device.type}; "
        f"the tuned model is {'the merged one' if merged else 'the base with its adapter' if adapter else 'whole'}",
        flush=True,
    )

    def measure(folder: Path, on_it: Path | None, added_after: Path | None) -> Measured:
        model = load_model(folder, device, adapter=on_it, trust_remote_code=remote_code)
        loss = measure_loss(model, rows)
        answers = answer_prompts(model, prompts, encoder, tokenizer, args.generation)
        print(
            f"{folder.name}: held-out loss {loss.loss if loss else 'not measured'}, {len(answers)} answers", flush=True
        )
        if merged is None or adapter is None:
            return Measured(loss, answers)
        model = add_adapter(model, added_after) if added_after else model
        return Measured(loss, answers, sample_logits(model, rows, prompts))

    of_base = measure(base, None, adapter)
    gc.collect()  # one model in memory at a time; its modules refer to each other, so only the collector frees them
    of_tuned = measure(whole, None, None) if whole else measure(base, adapter, None)
    evaluation = compare(args, prompts, of_base, of_tuned)
    for entry in evaluation["prompts"]:
        print(json.dumps(entry, ensure_ascii=False), flush=True)
    verdict = gate_verdict(args, evaluation)
    with new_artifact(config.output_path, EVALUATE) as writer:
        writer.write(EVALUATION_NAME, (json.dumps(evaluation, indent=2, ensure_ascii=False) + "\n").encode())
        writer.metadata.update(carried_digests(prepared))
        keep_report(writer, summarize(evaluation), verdict=verdict)
    if verdict is not None:
        print(f"{verdict.reason}: {verdict.message}", flush=True)
    return finished_report(config)


def compare(args: Args, prompts: list[EncodedPrompt], base: Measured, tuned: Measured) -> dict[str, Any]:
    """evaluation.json: both losses and perplexities, every prompt with both answers and their scores, the means of
    these over the prompts with an expected answer, the gate, the merge's proof.
    """
    generation = args.generation
    value: dict[str, Any] = {
        "baseLoss": _rounded(base.loss.loss if base.loss else None),
        "tunedLoss": _rounded(tuned.loss.loss if tuned.loss else None),
        "basePerplexity": _rounded(base.loss.perplexity if base.loss else None),
        "tunedPerplexity": _rounded(tuned.loss.perplexity if tuned.loss else None),
        "tokens": base.loss.tokens if base.loss else 0,
        "generation": {
            "doSample": generation.do_sample,
            "temperature": generation.temperature,
            "topP": generation.top_p,
            "maxNewTokens": generation.max_new_tokens,
            "seed": generation.seed,
        },
        "prompts": [
            {
                "prompt": encoded.text,
                "expected": prompt.expected,
                "base": of_base,
                "tuned": of_tuned,
                "baseExact": None if prompt.expected is None else is_exact_match(of_base, prompt.expected),
                "tunedExact": None if prompt.expected is None else is_exact_match(of_tuned, prompt.expected),
                "baseRougeL": None if prompt.expected is None else _rounded(rouge_l(of_base, prompt.expected)),
                "tunedRougeL": None if prompt.expected is None else _rounded(rouge_l(of_tuned, prompt.expected)),
            }
            for prompt, encoded, of_base, of_tuned in zip(
                args.prompts, prompts, base.answers, tuned.answers, strict=True
            )
        ],
    }
    value.update(_mean_scores(value["prompts"]))
    if base.loss is None or tuned.loss is None:
        value["note"] = "no held-out tokens: dataset.validationPercent is 0 or too small, so no loss was measured"
    if args.gate:
        value["gate"] = dict(args.gate)
        value["gatePassed"] = not missed_thresholds(args.gate, value)
    if base.logits is not None and tuned.logits is not None:
        difference, agreement = compare_logits(base.logits, tuned.logits)
        value["mergedLogitDifference"] = float(f"{difference:.3g}")
        value["mergedGreedyAgreement"] = round(agreement, 6)
    return value


def gate_verdict(args: Args, evaluation: Mapping[str, Any]) -> UserError | None:
    """The reason to end the job here, naming metric, value and threshold; None when the gate is met or absent."""
    missed = missed_thresholds(args.gate, evaluation)
    return UserError("EvalBelowThreshold", " ".join((*missed, GATE_REMEDY))) if missed else None


def _mean_scores(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the prompts with an expected answer, and how many these are; nothing where there is none."""
    compared = [entry for entry in entries if entry["expected"] is not None]
    if not compared:
        return {}
    means = {
        mean: _rounded(sum(float(entry[score]) for entry in compared) / len(compared))
        for mean, score in (
            ("baseExactMatch", "baseExact"),
            ("tunedExactMatch", "tunedExact"),
            ("baseRougeL", "baseRougeL"),
            ("tunedRougeL", "tunedRougeL"),
        )
    }
    return {"promptsCompared": len(compared), **means}


def summarize(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The report's metrics: all numbers, counts of exact answers, and as many of the first answers as fit."""
    prompts = evaluation["prompts"]
    metrics = {name: value for name, value in evaluation.items() if name != "prompts" and value is not None}
    metrics["promptsAnswered"] = len(prompts)
    for name in ("baseExact", "tunedExact"):
        metrics[name] = sum(bool(entry[name]) for entry in prompts)
    shown: list[dict[str, Any]] = []
    for entry in prompts[:_REPORTED_PROMPTS]:
        cut = {name: _cut(entry[name]) for name in ("prompt", "expected", "base", "tuned")}
        if len(canonical_json({**metrics, "prompts": [*shown, cut]})) > _REPORTED_BYTES:
            break
        shown.append(cut)
    return {**metrics, "prompts": shown} if shown else metrics


def _check_tokenizers(data: Mapping[str, Any], base: Path, tuned: Path | None) -> None:
    """UserError when the base model, or a tuned one with files of its own, has another tokenizer than prepare had."""
    expected = data.get("tokenizer")
    if expected is None:
        return
    check_tokenizer(expected, tokenizer_files(read_manifest(base)), "the base model")
    if tuned is not None:
        check_tokenizer(expected, tokenizer_files(read_manifest(tuned)), "the tuned model")


def _open_format(data: Mapping[str, Any], tokenizer: Any) -> RecordFormat:
    """prepare's own format; UserError when this release puts other words around a question than prepare's did."""
    record_format = open_format(data["format"], template=data.get("template"), tokenizer=tokenizer)
    expected, found = data.get(PROMPT_KEY), record_format.prompt_digest()
    if expected not in (None, found):
        raise UserError(
            "PromptChanged",
            f"prompts of format {record_format.name} have {PROMPT_KEY} {found}, the data was prepared with {expected}: "
            "use one release for a job, or run prepare again",
        )
    return record_format


def _encode(args: Args, record_format: RecordFormat, encoder: Encoder) -> list[EncodedPrompt]:
    texts = [record_format.prompt(prompt.text, prompt.context) for prompt in args.prompts]
    tokens = encoder.encode_prompts(texts, rendered=record_format.rendered) if texts else []
    return [EncodedPrompt(text, ids) for text, ids in zip(texts, tokens, strict=True)]


def _rounded(value: float | None) -> float | None:
    """Six decimals: the last digits of a sum depend on the processor, and an artifact's digest must not."""
    return None if value is None else round(value, 6)


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= _REPORTED_CHARACTERS else text[: _REPORTED_CHARACTERS - 1] + "…"
