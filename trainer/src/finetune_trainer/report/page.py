"""report.html: one page that holds everything it shows, for a browser, a phone, paper and light or dark screens.

render_page turns an Evidence into HTML with report.html.jinja, which escapes whatever it is given: answers of a model
and records of a dataset are anybody's text. There is no script in the page and nothing that it would load.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from finetune_trainer import contract
from finetune_trainer.evaluation_gate import THRESHOLDS, missed_thresholds
from finetune_trainer.report.charts import Line, Mark, draw_chart, format_number
from finetune_trainer.report.evidence import Evidence

_TEMPLATE = "report.html.jinja"
_ANSWERS = (("Expected", "expected"), ("Base", "base"), ("Tuned", "tuned"))
_LONGEST_ANSWER = 6000
"""Characters of one answer that the page shows; evaluation.json has all of it."""


@dataclass(frozen=True)
class Figure:
    """One of the numbers at the top: its name, the value, and a smaller line below it."""

    name: str
    value: str
    note: str = ""
    unit: str = ""
    verdict: str = ""
    """"good", "bad" or nothing: colours the value."""


@dataclass(frozen=True)
class Row:
    """A name and a value of a list; `mono` for digests and identifiers."""

    name: str
    value: str
    mono: bool = False


def render_page(evidence: Evidence) -> str:
    """The whole page; the same text for the same evidence."""
    return _template().render(
        name=evidence.job.get("name", "a job"),
        namespace=evidence.job.get("namespace", ""),
        subtitle=_subtitle(evidence),
        figures=headline(evidence),
        charts=_charts(evidence),
        comparison=comparison(evidence),
        gate=judge_gate(evidence),
        prompts=_prompts(evidence),
        stages=_stages(evidence),
        attempts=_attempts(evidence),
        resources=resources(evidence),
        data=data_rows(evidence),
        samples=[_sample(sample) for sample in evidence.samples],
        settings=settings(evidence),
        lineage=lineage(evidence),
        missing=list(evidence.missing),
    )


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("finetune_trainer.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(_TEMPLATE)


def headline(evidence: Evidence) -> list[Figure]:
    """The figures at the top: what was gained, how training went, and what it took."""
    found = []
    base, tuned = evidence.evaluation.get("baseLoss"), evidence.evaluation.get("tunedLoss")
    if base is not None and tuned is not None and _is_number(base) and _is_number(tuned):
        change = f"{(tuned - base) / base:+.1%} against the base".replace("-", "−") if base else "the base has 0"
        found.append(Figure("Held-out loss", _number(tuned), change, verdict="good" if tuned < base else "bad"))
    matches = _exact(evidence)
    if matches is not None:
        of_base, of_tuned, asked = matches
        verdict = "good" if of_tuned > of_base else "bad" if of_tuned < of_base else ""
        found.append(Figure("Exact answers", f"{of_tuned} of {asked}", f"the base: {of_base}", verdict=verdict))
    loss = evidence.steps[-1]["loss"] if evidence.steps else None
    if loss is not None:
        found.append(Figure("Training loss", _number(loss), f"after {evidence.steps[-1]['step']:,} steps"))
    parameters = _trainable(evidence)
    if parameters is not None:
        found.append(Figure("Trained parameters", _short(parameters), f"{parameters:,}" if parameters >= 1000 else ""))
    goodput = evidence.history.get("goodput")
    if _is_number(goodput):
        found.append(Figure("Goodput", f"{goodput:.1%}", "of training's time in steps that were kept"))
    cost = evidence.history.get("cost")
    if isinstance(cost, Mapping) and _is_number(cost.get("amount")) and cost.get("currency"):
        found.append(Figure("Cost", f"{cost['amount']:,.2f}", "accelerator nodes", str(cost["currency"])))
    return found


def comparison(evidence: Evidence) -> list[tuple[str, str, str]]:
    """(measure, base, tuned) of the held-out set; empty without one."""
    value, rows = evidence.evaluation, []
    for name, key in (("Loss", "Loss"), ("Perplexity", "Perplexity")):
        base, tuned = value.get(f"base{key}"), value.get(f"tuned{key}")
        if base is not None or tuned is not None:
            rows.append((name, _number(base), _number(tuned)))
    matches = _exact(evidence)
    if matches is not None:
        rows.append(("Exact answers", f"{matches[0]} of {matches[2]}", f"{matches[1]} of {matches[2]}"))
    if _is_number(value.get("baseRougeL")) or _is_number(value.get("tunedRougeL")):
        rows.append(("ROUGE-L, mean", _number(value.get("baseRougeL")), _number(value.get("tunedRougeL"))))
    return rows


def judge_gate(evidence: Evidence) -> tuple[bool, list[str]] | None:
    """Whether spec.evaluate.gate is met, and its thresholds, or what misses them in words; None without one."""
    gate = _mapping(evidence.section("evaluate").get("gate"))
    known = {name: value for name, value in gate.items() if name in THRESHOLDS and value is not None}
    if not known or not evidence.evaluation:
        return None
    missed = missed_thresholds(known, evidence.evaluation)
    return not missed, list(missed) or [f"{name} {value:g}" for name, value in known.items()]


def resources(evidence: Evidence) -> list[Row]:
    """What the job took; only what is known."""
    history, rows = evidence.history, []
    for name, key in (("Accelerator nodes", "acceleratorSeconds"), ("All pods", "podSeconds")):
        if _is_number(history.get(key)):
            rows.append(Row(name, f"{format_seconds(history[key])} ({history[key]:,.0f} pod-seconds)"))
    cost = history.get("cost")
    if isinstance(cost, Mapping) and _is_number(cost.get("amount")) and cost.get("currency"):
        price = cost.get("pricePerHour")
        each = f" at {price:g} {cost['currency']} a node and hour" if _is_number(price) else ""
        rows.append(Row("Cost", f"{cost['amount']:,.2f} {cost['currency']}{each}"))
    elif rows:
        rows.append(Row("Cost", "not known: no price is configured for these nodes"))
    if _is_number(history.get("goodput")):
        rows.append(Row("Goodput", f"{history['goodput']:.2%}"))
    train = evidence.metrics(contract.TRAIN)
    if _is_number(train.get("tokensPerSecond")):
        rows.append(Row("Throughput", f"{train['tokensPerSecond']:,.0f} tokens a second"))
    if _is_number(train.get("mfu")):
        rows.append(Row("Model FLOPs utilisation", f"{train['mfu']:.1%}"))
    for name, key in (("Host memory", "hostMemoryBytes"), ("Device memory", "deviceMemoryBytes")):
        if _is_number(train.get(key)):
            rows.append(Row(f"{name}, most of any process", f"{train[key] / (1 << 30):.2f} GiB"))
    return rows


def data_rows(evidence: Evidence) -> list[Row]:
    """What was trained on."""
    data, rows = evidence.data, []
    for name, key in (("Records read", "records"), ("Rejected", "rejected"), ("Documents trained on", "documents"),
                      ("Documents held out", "validationDocuments"), ("Tokens", "tokens"),
                      ("Tokens learnt", "supervisedTokens"), ("Rows", "rows")):  # fmt: skip
        if _is_number(data.get(key)):
            rows.append(Row(name, f"{data[key]:,}"))
    for name, key, unit in (("Learnt share of the tokens", "supervisedPercent", " %"),
                            ("Documents that teach the model to stop", "stopSupervisedPercent", " %"),
                            ("Epochs", "epochs", "")):  # fmt: skip
        if _is_number(data.get(key)):
            rows.append(Row(name, f"{data[key]:g}{unit}"))
    rows += [Row(name, str(data[key])) for name, key in (("Format", "format"), ("Packing", "packing")) if key in data]
    return rows


def settings(evidence: Evidence) -> list[Row]:
    """The spec's choices, in the API's own words."""
    rows = []
    for section in ("method", "training", "parallelism", "accelerator"):
        rows += [Row(f"{section}.{name}", value) for name, value in _flat(evidence.section(section))]
    return rows


def lineage(evidence: Evidence) -> list[Row]:
    """What the result was made from and by, each with what names it exactly."""
    rows = []
    for name, key, source in (
        ("Base model", contract.MODEL_INPUT, evidence.base_source),
        ("Dataset", contract.DATASET_INPUT, evidence.dataset_source),
    ):
        if source is not None:
            rows.append(Row(name, source))
        if (version := evidence.version(key)) is not None:
            rows.append(Row(f"{name}, revision", version, mono=True))
    for name, manifest in evidence.manifests.items():
        rows.append(Row(f"{_WORDS.get(name, name)}, digest", manifest.digest, mono=True))
    if isinstance(digest := evidence.history.get("specDigest"), str):
        rows.append(Row("Spec, digest", digest, mono=True))
    for stage, image in _mapping(evidence.history.get("images")).items():
        rows.append(Row(f"Image of {stage}", str(image), mono=True))
    versions: dict[str, str] = {"finetune-trainer": evidence.trainer_version} if evidence.trainer_version else {}
    for manifest in evidence.manifests.values():
        versions.update(manifest.versions)
    rows += [Row(name, version, mono=True) for name, version in sorted(versions.items())]
    return rows


def format_seconds(seconds: float) -> str:
    """A duration as people say it: 42 s, 3 min 05 s, 2 h 14 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


_WORDS = {
    contract.MODEL_INPUT: "Base model",
    contract.DATASET_INPUT: "Dataset",
    contract.PREPARE: "Prepared data",
    contract.COMPILE: "Compiled graphs",
    contract.TRAIN: "Checkpoint",
    contract.CONSOLIDATE: "Adapter or model",
    contract.MERGE: "Merged model",
    contract.EVALUATE: "Evaluation",
}


def _subtitle(evidence: Evidence) -> str:
    method = evidence.section("method")
    kind = {"lora": "LoRA", "full": "full fine-tuning"}.get(str(method.get("type")), "fine-tuning")
    base = (evidence.base_source or "").removeprefix("hf://")
    data = (evidence.dataset_source or "").removeprefix("hf://")
    return " · ".join(part for part in (base, kind, data) if part)


def _charts(evidence: Evidence) -> list[dict[str, Any]]:
    """The charts that have something to show: title, unit, SVG, legend of (name, style)."""
    kept = _kept_timings(evidence)
    marks = _attempt_marks(evidence, kept)
    checkpoints = _checkpoint_marks(evidence)
    loss = [Line("training", _points(evidence.steps, "loss"), "tuned")]
    if evidence.held_out:
        loss.append(Line("held out", _points(evidence.held_out, "validationLoss"), "held-out", dots=True))
    rate = [Line("learning rate", _points(evidence.steps, "learningRate"), "tuned")]
    norm = [Line("gradient norm", _points(evidence.steps, "gradientNorm"), "tuned")]
    speed = [Line("tokens a second", _points(kept, "tokensPerSecond"), "tuned")]
    found = []
    for title, unit, lines, on_it, zero in (
        ("Loss", "nats a token", loss, [*checkpoints, *marks], False),
        ("Learning rate", "", rate, [], True),
        ("Throughput", "tokens a second", speed, marks, True),
        ("Gradient norm", "before clipping", norm, [], True),
    ):
        drawn = draw_chart(title, unit, lines, on_it, zero=zero)
        if drawn:
            legend = [(line.name, line.style) for line in lines if line.points] if len(lines) > 1 else []
            styles = {mark.style for mark in on_it}
            legend += [(name, style) for name, style in (("checkpoint", "saved"), ("new attempt", "restart"))
                       if style in styles]  # fmt: skip
            found.append({"title": title, "unit": unit, "svg": drawn, "legend": legend})
    return found


def _kept_timings(evidence: Evidence) -> list[Mapping[str, Any]]:
    """One timing a step, in order: that of the last attempt that did it, which is the one that was kept."""
    by_step = {timing["step"]: timing for timing in evidence.timings}
    return [by_step[step] for step in sorted(by_step)]


def _attempt_marks(evidence: Evidence, kept: Sequence[Mapping[str, Any]]) -> list[Mark]:
    marks, before = [], None
    for timing in kept:
        attempt = timing.get("attempt")
        if before is not None and attempt != before:
            marks.append(Mark(timing["step"], f"attempt {attempt} went on before step {timing['step']:,}", "restart"))
        before = attempt
    return marks


def _checkpoint_marks(evidence: Evidence) -> list[Mark]:
    every = evidence.section("training").get("checkpointEverySteps")
    last = evidence.steps[-1]["step"] if evidence.steps else 0
    if not isinstance(every, int) or every < 1 or last / every > 40:
        return []
    steps = sorted({*range(every, last + 1, every), last})
    return [Mark(step, f"checkpoint of step {step:,}", "saved") for step in steps if step]


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[key])) for line in lines if _is_number(line.get(key))]


def _prompts(evidence: Evidence) -> list[dict[str, Any]]:
    entries = [entry for entry in evidence.evaluation.get("prompts") or () if isinstance(entry, Mapping)]
    return [
        {
            "prompt": _cut(str(entry.get("prompt") or "").strip()),
            "answers": [
                (name, key, _cut(entry.get(key)), _score(entry, key))
                for name, key in _ANSWERS
                if entry.get(key) is not None
            ],
        }
        for entry in entries
    ]


def _score(entry: Mapping[str, Any], key: str) -> str:
    """How near an answer is to the expected one, in a word; empty where nothing says."""
    if entry.get(f"{key}Exact") is True:
        return "exact"
    rouge = entry.get(f"{key}RougeL")
    return f"ROUGE-L {rouge:.2f}" if _is_number(rouge) else ""


def _exact(evidence: Evidence) -> tuple[int, int, int] | None:
    """(base, tuned, prompts with an expected answer) that are right to the letter; None where nothing is expected."""
    entries = [entry for entry in evidence.evaluation.get("prompts") or () if isinstance(entry, Mapping)]
    asked = [entry for entry in entries if entry.get("expected") is not None]
    if not asked:
        return None
    base, tuned = (sum(bool(entry.get(name)) for entry in asked) for name in ("baseExact", "tunedExact"))
    return base, tuned, len(asked)


def _stages(evidence: Evidence) -> list[dict[str, str]]:
    rows = []
    for entry in evidence.history.get("stages") or ():
        if not isinstance(entry, Mapping):
            continue
        seconds = entry.get("seconds")
        rows.append(
            {
                "name": str(entry.get("name", "")),
                "state": str(entry.get("state", "")),
                "attempts": str(entry.get("attempts", "")),
                "time": _duration(seconds),
            }
        )
    return rows


def _attempts(evidence: Evidence) -> list[dict[str, str]]:
    rows = []
    for entry in evidence.attempts:
        lost, recovery = entry.get("lostSteps"), entry.get("recoverySeconds")
        rows.append(
            {
                "what": f"{entry.get('stage', '')} {entry.get('attempt', '')}".strip(),
                "when": str(entry.get("endTime") or "").replace("T", " ").removesuffix("Z"),
                "reason": str(entry.get("reason", "")),
                "message": str(entry.get("message", "")),
                "node": str(entry.get("node") or ""),
                "lost": f"{lost:,}" if _is_number(lost) else "not known",
                "recovery": _duration(recovery),
            }
        )
    return rows


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    spans = [span for span in sample.get("spans") or () if isinstance(span, Mapping)]
    return {
        "place": f"{sample.get('file', '')}, line {sample.get('line', '')}",
        "learnt": f"{sample.get('supervisedTokens', '')} of {sample.get('tokens', '')} tokens learnt",
        "spans": [(_cut(str(span.get("text", ""))), bool(span.get("learnt"))) for span in spans],
    }


def _trainable(evidence: Evidence) -> int | None:
    found = evidence.history.get("trainableParameters") or evidence.metrics(contract.TRAIN).get("trainableParameters")
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _flat(value: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, item in value.items():
        if isinstance(item, Mapping):
            rows += _flat(item, f"{before}{name}.")
        elif isinstance(item, (list, tuple)):
            rows.append((f"{before}{name}", ", ".join(str(part) for part in item)))
        elif item is not None:
            rows.append((f"{before}{name}", str(item).lower() if isinstance(item, bool) else str(item)))
    return rows


def _short(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _duration(value: Any) -> str:
    return format_seconds(float(value)) if _is_number(value) else ""


def _number(value: Any) -> str:
    return format_number(float(value)) if _is_number(value) else "not measured"


def _cut(text: Any) -> str | None:
    if text is None:
        return None
    whole = str(text)
    return whole if len(whole) <= _LONGEST_ANSWER else whole[:_LONGEST_ANSWER] + " …"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
