"""The thresholds of spec.evaluate.gate: which of them the figures of an evaluation miss, in words.

The operator judges a finished evaluation by this, again whenever the gate is changed, and the evaluate stage where its
stage.json has a gate (without an operator). Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

GATE_REMEDY = "Train longer or on better data, or change the gate."
"""What to do about a missed gate, whichever threshold it was."""


@dataclass(frozen=True)
class Threshold:
    """One field of spec.evaluate.gate.

    `miss(threshold, metrics)` is None when the evaluate stage's metrics meet it, else what was found and what is
    allowed. `needs_loss`: it is about held-out records; else about prompts that have an expected answer.
    """

    name: str
    needs_loss: bool
    miss: Callable[[float, Mapping[str, Any]], str | None]


def missed_thresholds(gate: Mapping[str, Any], metrics: Mapping[str, Any]) -> tuple[str, ...]:
    """One sentence for each threshold of `gate` that the metrics of evaluate's report miss, () when it is met.

    A sentence names metric, value and threshold. A figure that is missing misses its threshold. ValueError on a
    threshold that is not known.
    """
    if unknown := gate.keys() - THRESHOLDS.keys():
        raise ValueError(f"no thresholds of evaluate.gate: {', '.join(sorted(unknown))}")
    return tuple(_sentences(gate, metrics))


def _sentences(gate: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[str]:
    for threshold in THRESHOLDS.values():
        allowed = gate.get(threshold.name)
        if allowed is not None and (missed := threshold.miss(allowed, metrics)) is not None:
            yield missed


def _number(metrics: Mapping[str, Any], name: str) -> float | None:
    value = metrics.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _not_measured(what: str, threshold: str, remedy: str) -> str:
    return f"The tuned model's {what} was not measured, and spec.evaluate.gate.{threshold} needs it: {remedy}."


_NEEDS_RECORDS = "hold out more records by dataset.validationPercent"
_NEEDS_ANSWERS = "give evaluate.prompts expected answers"


def _miss_loss_ratio(most: float, metrics: Mapping[str, Any]) -> str | None:
    base, tuned = _number(metrics, "baseLoss"), _number(metrics, "tunedLoss")
    if base is None or tuned is None:
        return _not_measured("held-out loss beside the base model's", "maxLossRatioToBase", _NEEDS_RECORDS)
    if tuned <= most * base:
        return None
    return (
        f"The tuned model's held-out loss is {tuned} and the base model's {base}; "
        f"spec.evaluate.gate.maxLossRatioToBase allows {most} times the base model's."
    )


def _miss_loss(most: float, metrics: Mapping[str, Any]) -> str | None:
    tuned = _number(metrics, "tunedLoss")
    if tuned is None:
        return _not_measured("held-out loss", "maxLoss", _NEEDS_RECORDS)
    if tuned <= most:
        return None
    return f"The tuned model's held-out loss is {tuned}; spec.evaluate.gate.maxLoss allows {most}."


def _miss_perplexity(most: float, metrics: Mapping[str, Any]) -> str | None:
    loss, perplexity = _number(metrics, "tunedLoss"), _number(metrics, "tunedPerplexity")
    if perplexity is None and loss is None:
        return _not_measured("perplexity", "maxPerplexity", _NEEDS_RECORDS)
    # The report has no perplexity that does not fit a float: then it is larger than any threshold.
    found = math.inf if perplexity is None else perplexity
    if found <= most:
        return None
    return f"The tuned model's held-out perplexity is {found}; spec.evaluate.gate.maxPerplexity allows {most}."


def _miss_answers(what: str, metric: str, threshold: str) -> Callable[[float, Mapping[str, Any]], str | None]:
    def miss(least: float, metrics: Mapping[str, Any]) -> str | None:
        found, prompts = _number(metrics, metric), metrics.get("promptsCompared")
        if found is None:
            return _not_measured(what, threshold, _NEEDS_ANSWERS)
        if found >= least:
            return None
        return (
            f"The tuned model's {what} is {found}, the mean over {prompts} prompts with an expected answer; "
            f"spec.evaluate.gate.{threshold} asks for {least}."
        )

    return miss


THRESHOLDS: Mapping[str, Threshold] = {
    threshold.name: threshold
    for threshold in (
        Threshold("maxLossRatioToBase", True, _miss_loss_ratio),
        Threshold("maxLoss", True, _miss_loss),
        Threshold("maxPerplexity", True, _miss_perplexity),
        Threshold("minExactMatch", False, _miss_answers("exact match", "tunedExactMatch", "minExactMatch")),
        Threshold("minRougeL", False, _miss_answers("ROUGE-L", "tunedRougeL", "minRougeL")),
    )
}
"""Every threshold by its field, in the order in which misses are told."""
