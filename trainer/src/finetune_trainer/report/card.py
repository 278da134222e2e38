"""The model card README.md in the hub's layout: YAML front matter, then what the model is, how it was made.

render_card turns an Evidence into Markdown. The front matter has only what is known: base_model and datasets where they
are the hub's, and no licence, for nobody told it. Answers of a model stand in fences longer than any in them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_trainer.report.evidence import Evidence
from finetune_trainer.report.page import Row, comparison, data_rows, lineage, resources, settings

ADAPTER, MODEL = "adapter", "model"
"""What lies in the folder that the card stands in."""

_HUB = "hf://"
_LONGEST_ANSWER = 1500
_MOST_PROMPTS = 10


def render_card(evidence: Evidence, contents: str) -> str:
    """README.md of a folder whose root holds `contents`, ADAPTER or MODEL."""
    name = evidence.job.get("name", "fine-tuned model")
    method = evidence.section("method")
    lines = ["---", _front_matter(evidence, contents).rstrip("\n"), "---", "", f"# {_plain(name)}", ""]
    lines += [_introduction(evidence, contents, method), ""]
    lines += ["## Use", "", "```python", *_usage(evidence, contents), "```", ""]
    if rows := comparison(evidence):
        lines += ["## Evaluation", "", "| on held-out records and prompts | base | tuned |", "|---|---|---|"]
        lines += [f"| {_cell(measure)} | {_cell(base)} | {_cell(tuned)} |" for measure, base, tuned in rows]
        lines.append("")
    lines += _prompts(evidence)
    for title, found in (
        ("Training data", data_rows(evidence)),
        ("Training", settings(evidence)),
        ("What it took", resources(evidence)),
        ("Lineage", lineage(evidence)),
    ):
        lines += _table(title, found)
    lines += ["The whole story, with curves and every attempt, is in [report.html](report.html).", ""]
    return "\n".join(lines)


def _front_matter(evidence: Evidence, contents: str) -> str:
    from huggingface_hub import ModelCardData

    method = str(evidence.section("method").get("type", "lora"))
    base, data = _on_hub(evidence.base_source), _on_hub(evidence.dataset_source)
    facts: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": None if base is None else "adapter" if contents == ADAPTER else "finetune",
        "datasets": None if data is None else [data],
        "library_name": "peft" if contents == ADAPTER else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["finetune-operator", method],
    }
    return str(ModelCardData(**{name: value for name, value in facts.items() if value is not None}).to_yaml())


def _introduction(evidence: Evidence, contents: str, method: Mapping[str, Any]) -> str:
    base = f"`{_plain(evidence.base_source.removeprefix(_HUB))}`" if evidence.base_source else "its base model"
    data = f" on `{_plain(evidence.dataset_source.removeprefix(_HUB))}`" if evidence.dataset_source else ""
    how = "with LoRA" if method.get("type", "lora") == "lora" else "in all its weights"
    what = "This is the adapter; it needs the base model." if contents == ADAPTER else "This is the whole model."
    return f"{base} fine-tuned {how}{data}. {what}"


def _usage(evidence: Evidence, contents: str) -> Sequence[str]:
    if contents == ADAPTER:
        return (
            "from peft import AutoPeftModelForCausalLM",
            "",
            'model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")',
        )
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", torch_dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
    )


def _prompts(evidence: Evidence) -> list[str]:
    lines = []
    entries = [entry for entry in evidence.evaluation.get("prompts") or () if isinstance(entry, Mapping)]
    for number, entry in enumerate(entries[:_MOST_PROMPTS], start=1):
        lines += [f"### Prompt {number}", ""]
        for title, key in (("Prompt", "prompt"), ("Expected", "expected"), ("Base", "base"), ("Tuned", "tuned")):
            if entry.get(key) is not None:
                lines += [f"{title}:", "", *_fenced(str(entry[key])), ""]
    if len(entries) > _MOST_PROMPTS:
        lines += [f"{len(entries) - _MOST_PROMPTS} more are in report.html.", ""]
    return lines


def _fenced(text: str) -> list[str]:
    shown = text if len(text) <= _LONGEST_ANSWER else text[:_LONGEST_ANSWER] + " …"
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", shown.replace("\r", ""), fence]


def _table(title: str, rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    body = [f"| {_cell(row.name)} | {_cell(row.value)} |" for row in rows]
    return [f"## {title}", "", "| | |", "|---|---|", *body, ""]


def _on_hub(source: str | None) -> str | None:
    return source.removeprefix(_HUB) if source is not None and source.startswith(_HUB) else None


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """One line without what Markdown or HTML would take for its own."""
    return re.sub(r"([`<>\[\]*\\])", r"\\\1", " ".join(text.split()))
