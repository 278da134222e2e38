"""The gate: what each threshold takes, and that a miss names metric, value and threshold."""

from __future__ import annotations

import pytest

from finetune_trainer.evaluation_gate import THRESHOLDS, missed_thresholds

METRICS = {
    "baseLoss": 2.0,
    "tunedLoss": 1.5,
    "tunedPerplexity": 4.481689,
    "tunedExactMatch": 0.25,
    "tunedRougeL": 0.6,
    "promptsCompared": 4,
}


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        pytest.param(
            {"maxLossRatioToBase": 0.7},
            ("held-out loss is 1.5", "base model's 2.0", "maxLossRatioToBase allows 0.7"),
            id="the ratio of both losses",
        ),
        pytest.param({"maxLoss": 1.4}, ("held-out loss is 1.5", "maxLoss allows 1.4"), id="the loss"),
        pytest.param({"maxPerplexity": 4}, ("perplexity is 4.481689", "maxPerplexity allows 4"), id="the perplexity"),
        pytest.param(
            {"minExactMatch": 0.5}, ("exact match is 0.25", "4 prompts", "minExactMatch asks for 0.5"), id="exact match"
        ),
        pytest.param({"minRougeL": 0.61}, ("ROUGE-L is 0.6,", "4 prompts", "minRougeL asks for 0.61"), id="ROUGE-L"),
    ],
)
def test_a_miss_names_metric_value_and_threshold(gate: dict[str, float], words: tuple[str, ...]) -> None:
    (sentence,) = missed_thresholds(gate, METRICS)
    for each in words:
        assert each in sentence


def test_a_value_that_equals_its_threshold_meets_it() -> None:
    gate = {
        "maxLossRatioToBase": 0.75,
        "maxLoss": 1.5,
        "maxPerplexity": 4.481689,
        "minExactMatch": 0.25,
        "minRougeL": 0.6,
    }
    assert gate.keys() == THRESHOLDS.keys()
    assert missed_thresholds(gate, METRICS) == ()


def test_several_misses_are_all_told_in_the_order_of_the_fields() -> None:
    told = missed_thresholds({"minRougeL": 1, "maxLoss": 1, "minExactMatch": None, "maxPerplexity": 99}, METRICS)
    assert [sentence.split("gate.")[1].split()[0] for sentence in told] == ["maxLoss", "minRougeL"]


@pytest.mark.parametrize("name", THRESHOLDS)
def test_a_figure_that_is_missing_misses_its_threshold(name: str) -> None:
    (sentence,) = missed_thresholds({name: 0.5}, {})
    assert "was not measured" in sentence
    assert f"spec.evaluate.gate.{name}" in sentence


def test_a_perplexity_too_large_for_a_number_is_above_every_threshold() -> None:
    (sentence,) = missed_thresholds({"maxPerplexity": 1e9}, {"tunedLoss": 800.0})
    assert "perplexity is inf" in sentence


def test_a_loss_that_is_no_number_meets_nothing() -> None:
    assert len(missed_thresholds({"maxLoss": 5, "maxLossRatioToBase": 5}, METRICS | {"tunedLoss": float("nan")})) == 2


def test_a_threshold_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="maxLos$"):
        missed_thresholds({"maxLos": 1}, METRICS)
