"""What the demo says at its end: answers of both models beside the truth, score, losses, places and times. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from finetune_demo.problem import DemoProblem
from finetune_demo.view import seconds

SHOWN_PROMPTS = 3
NEEDED_EXACT = 8
"""Prompts of ten that the tuned model has to answer word for word; its base answers none of them."""
WIDTH = 80
_LABEL = 14
_NO_BREAK = "\N{NO-BREAK SPACE}"


def lines(job: Mapping[str, Any], evaluation: Mapping[str, Any], workspace: str) -> Iterator[str]:
    """The report's lines, at most WIDTH wide where no path is longer. `workspace` says where the volume lies."""
    status = job["status"]
    asked = job["spec"]["evaluate"]["prompts"]
    for prompt, entry in list(zip(asked, evaluation["prompts"], strict=True))[:SHOWN_PROMPTS]:
        yield from _row("Prompt", prompt["text"])
        if prompt.get("context"):
            yield from _row("Context", prompt["context"])
        yield from _row("Base model", entry["base"])
        yield from _row("Tuned model", entry["tuned"])
        yield from _row("Ground truth", entry["expected"])
        yield ""
    base, tuned, prompts = scores(evaluation)
    yield from _row("Word for word", f"base {base} of {prompts}, tuned {tuned} of {prompts}")
    yield from _row("Held-out loss", f"base {evaluation['baseLoss']:.3f}, tuned {evaluation['tunedLoss']:.3f}")
    artifacts = status.get("artifacts") or {}
    for label, name in (("Merged model", "model"), ("Adapter", "adapter")):
        if artifacts.get(name):
            yield f"{label:<{_LABEL}} {workspace}/{artifacts[name]['path']}"
    stages = [stage for stage in status.get("stages") or () if stage.get("durationSeconds") is not None]
    yield from _row("Stages", *(f"{stage['name']} {seconds(stage['durationSeconds'])}" for stage in stages))


def scores(evaluation: Mapping[str, Any]) -> tuple[int, int, int]:
    """How many prompts base and tuned model answered word for word, and how many there were."""
    prompts = evaluation["prompts"]
    return sum(bool(e["baseExact"]) for e in prompts), sum(bool(e["tunedExact"]) for e in prompts), len(prompts)


def check(evaluation: Mapping[str, Any]) -> None:
    """DemoProblem unless the tuned model learned the answers, its base had none, and the held-out loss fell."""
    base, tuned, prompts = scores(evaluation)
    if tuned < NEEDED_EXACT or base > 0:
        raise DemoProblem(
            f"base {base} of {prompts} and tuned {tuned} of {prompts} answers are word for word, expected 0 and at "
            f"least {NEEDED_EXACT}: if examples/tiny-cpu.yaml or the dataset was changed, train for more steps"
        )
    if evaluation["tunedLoss"] >= evaluation["baseLoss"]:
        raise DemoProblem(
            f"the held-out loss is {evaluation['tunedLoss']} and was {evaluation['baseLoss']} before training: "
            "the model learned nothing that holds for other records"
        )


def _row(label: str, *texts: str) -> list[str]:
    """`label` and `texts` behind it, wrapped; several texts are a list whose entries are not broken."""
    one = texts[0].strip() if len(texts) == 1 else ", ".join(text.replace(" ", _NO_BREAK) for text in texts)
    wrapped = textwrap.wrap(
        one or "(nothing)",
        WIDTH,
        initial_indent=f"{label:<{_LABEL}} ",
        subsequent_indent=" " * (_LABEL + 1),
        break_on_hyphens=False,
    )
    return [line.replace(_NO_BREAK, " ") for line in wrapped]
