"""The report and the model card of a job's folder, made from real artifacts with invented numbers."""

from __future__ import annotations

import html
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_jobs
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer import contract
from finetune_trainer.artifacts import remove_artifact
from finetune_trainer.contract import StageConfig, stage_digest
from finetune_trainer.report.card import ADAPTER, MODEL, render_card
from finetune_trainer.report.charts import Line, Mark, draw_chart, format_number
from finetune_trainer.report.evidence import collect_evidence
from finetune_trainer.report.page import format_seconds, render_page
from finetune_trainer.report.reporting import leave_report, report_folder


class Text(HTMLParser):
    """The text of a page outside its style, every tag, and whatever an attribute would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self._parts: list[str] = []
        self._in_style = False
        self.feed(page)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._in_style = tag == "style"
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self._parts.append(data)


@pytest.fixture
def job(workspace: Path) -> StageConfig:
    return report_jobs.write_job(workspace)


def page_of(config: StageConfig) -> str:
    return render_page(collect_evidence(config))


def test_the_page_tells_what_was_gained_and_what_it_took(job: StageConfig) -> None:
    text = Text(page_of(job)).text
    for words in (
        "Held-out loss 1.842 −20.5% against the base",
        "Exact answers 1 of 1 the base: 0",
        "Perplexity 10.15 6.31",
        "ROUGE-L, mean 0.1842 1",
        "Base ROUGE-L 0.18",
        "Tuned exact",
        "Gate passed maxLossRatioToBase 0.95",
        "Goodput 93.1%",
        "76.68 USD at 21.5 USD a node and hour",
        "6.82M 6,815,744",
        "18,342 tokens a second",
        "train 1 2026-11-20 03:12:44 NodeFault",
        "labelled UnschedulablePendingReplacement",
        "sha256:" + "5" * 64,
        "registry.example/neuron:sha-0123456789ab",
        "8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920",
        job.input(contract.PREPARE).digest,
        "transformers 4.57.6",
    ):
        assert words in text


def test_the_page_loads_nothing_and_runs_nothing(job: StageConfig) -> None:
    page = page_of(job)
    found = Text(page)
    assert not found.tags & {"script", "link", "img", "iframe", "object", "embed", "form"}
    assert found.loads == []
    assert not re.search(r"url\(|@import|https?://", page)


def test_an_answer_is_shown_to_the_letter_and_never_interpreted(job: StageConfig) -> None:
    page = page_of(job)
    assert "<script>" not in page
    assert "<b>Hello</b> & welcome" in Text(page).text
    assert html.escape("<b>bold</b>") in page


@settings(max_examples=40)
@given(text=st.text(max_size=60))
def test_no_answer_can_add_an_element_to_the_page(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    entry = {"prompt": text, "expected": text, "base": text, "tuned": text, "baseExact": True, "tunedExact": True}
    evidence = replace(collect_evidence(_empty(tmp_path_factory)), evaluation={"prompts": [entry]})
    plain = replace(
        evidence, evaluation={"prompts": [dict.fromkeys(entry, "x") | {"baseExact": True, "tunedExact": True}]}
    )
    assert render_page(evidence).count("<") == render_page(plain).count("<")


def _empty(tmp_path_factory: pytest.TempPathFactory) -> StageConfig:
    folder = tmp_path_factory.mktemp("nothing")
    return StageConfig(contract.EVALUATE, "image", {}, "finetune/jobs/n/j/evaluate-0", workspace=str(folder))


def test_training_that_was_interrupted_is_drawn_with_its_attempts_and_checkpoints(job: StageConfig) -> None:
    charts = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page_of(job), re.S)]
    assert len(charts) == 4
    titles = [title.text or "" for title in charts[0].iter("title")]
    assert titles[:5] == [
        "checkpoint of step 400",
        "checkpoint of step 800",
        "checkpoint of step 1,200",
        "attempt 2 went on before step 410",
        "attempt 3 went on before step 810",
    ]
    assert [title for title in titles if "held out" in title][-1].startswith("step 1,200: held out 1.82")
    assert charts[0].attrib["aria-label"].startswith("Loss (nats a token) over steps: training from 2.")


def test_what_is_not_known_is_said_and_never_guessed(workspace: Path) -> None:
    history = {**report_jobs.HISTORY, "cost": None, "goodput": None, "attempts": []}
    text = Text(page_of(report_jobs.write_job(workspace, history=history))).text
    assert "Cost not known: no price is configured for these nodes" in text
    assert "USD" not in text
    assert "Goodput" not in text
    assert "No attempt failed." in text


def test_a_gate_that_is_missed_is_told_with_metric_value_and_threshold(workspace: Path) -> None:
    spec = {**report_jobs.SPEC, "evaluate": {"enabled": True, "gate": {"maxPerplexity": 5, "minRougeL": None}}}
    text = Text(page_of(report_jobs.write_job(workspace, history={**report_jobs.HISTORY, "spec": spec}))).text
    assert "Gate not passed The tuned model's held-out perplexity is 6.3098; spec.evaluate.gate.maxPerplexity" in text


def test_a_job_without_evaluation_has_a_report_that_says_so(job: StageConfig) -> None:
    spec = {**report_jobs.SPEC, "evaluate": {"enabled": False}}
    artifacts = {name: ref for name, ref in job.history["artifacts"].items() if name != contract.EVALUATE}
    config = replace(
        job,
        stage=contract.MERGE,
        output=job.input(contract.MERGE).path,
        history={**job.history, "spec": spec, "artifacts": artifacts},
    )
    text = Text(page_of(config)).text
    assert "The tuned model was not evaluated: spec.evaluate.enabled is false." in text
    assert "Base against tuned" not in text


def test_an_artifact_that_is_gone_is_named(job: StageConfig) -> None:
    remove_artifact(job.workspace_path / job.history["artifacts"][contract.TRAIN]["path"])
    page = page_of(job)
    assert "The trained checkpoint is no longer complete at" in Text(page).text
    assert "Training loss" not in page


def test_every_stage_after_training_leaves_a_newer_report(job: StageConfig, capsys: pytest.CaptureFixture[str]) -> None:
    leave_report(job)
    folder = report_folder(job)
    assert {path.name for path in folder.iterdir()} == {"report.html", "README.md"}
    assert str(folder / "report.html") in capsys.readouterr().out
    (folder / "report.html").write_text("old")
    leave_report(job)
    assert "Held-out loss" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_costs_no_stage_its_success(
    job: StageConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    report_folder(job).write_text("a file in the folder's place")
    leave_report(job)
    assert "could not be written" in capsys.readouterr().out


def test_without_a_history_nothing_is_written(job: StageConfig) -> None:
    leave_report(replace(job, history={}))
    assert not report_folder(job).exists()


def test_the_history_is_no_part_of_a_digest(job: StageConfig) -> None:
    assert stage_digest(job) == stage_digest(replace(job, history={}))
    assert contract.parse_stage_config(json.loads(json.dumps(job.as_json()))) == job


def test_the_card_is_a_hub_card_of_what_lies_beside_it(job: StageConfig) -> None:
    evidence = collect_evidence(job)
    model, adapter = (render_card(evidence, contents) for contents in (MODEL, ADAPTER))
    facts = yaml.safe_load(model.split("---")[1])
    assert facts == {
        "base_model": "meta-llama/Meta-Llama-3-8B",
        "base_model_relation": "finetune",
        "datasets": ["databricks/databricks-dolly-15k"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["finetune-operator", "lora"],
    }
    assert yaml.safe_load(adapter.split("---")[1])["library_name"] == "peft"
    assert "AutoPeftModelForCausalLM" in adapter
    assert "| Loss | 2.317 | 1.842 |" in model


def test_an_answer_cannot_end_its_fence_in_the_card(job: StageConfig) -> None:
    card = render_card(collect_evidence(job), MODEL)
    assert "````text\n<script>alert('hello')</script>\n```\n<b>Hello</b> & welcome\n````" in card


def test_a_model_from_elsewhere_is_not_said_to_be_on_the_hub(job: StageConfig) -> None:
    evidence = replace(
        collect_evidence(job), manifests={}, history={"spec": {"model": {"source": "s3://bucket/model"}}}
    )
    facts = yaml.safe_load(render_card(evidence, MODEL).split("---")[1])
    assert "base_model" not in facts
    assert "datasets" not in facts


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2e-5, "2e-5"),
        (0.0123456, "0.01235"),
        (1.8421, "1.842"),
        (18342.5, "18,342"),
        (1e12, "1e12"),
        (-3.5, "-3.5"),
    ],
)
def test_numbers_are_written_as_people_read_them(value: float, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.4, "1.4 s"), (42, "42 s"), (185, "3 min 05 s"), (8040, "2 h 14 min"), (360000, "100 h 00 min")],
)
def test_durations_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(points=st.lists(st.tuples(st.integers(0, 10**6), numbers), max_size=30), zero=st.booleans())
def test_any_curve_is_drawn_inside_its_frame(points: list[tuple[float, float]], zero: bool) -> None:
    drawn = draw_chart("Loss", "", [Line("a < b", points, "tuned", dots=True)], [Mark(3, "x & y", "saved")], zero=zero)
    if not drawn:
        assert not any(abs(y) < float("inf") for _, y in points)
        return
    for circle in ElementTree.fromstring(drawn).iter("circle"):
        assert 0 <= float(circle.attrib["cx"]) <= 460
        assert 0 <= float(circle.attrib["cy"]) <= 250


def test_a_long_curve_keeps_its_peaks() -> None:
    points = [(float(step), 1.0) for step in range(50_000)]
    points[31_337] = (31_337.0, 9.0)
    line = ElementTree.fromstring(draw_chart("Loss", "", [Line("loss", points, "tuned")])).find("polyline")
    assert line is not None
    pairs = [pair.split(",") for pair in line.attrib["points"].split()]
    assert len(pairs) <= 410
    assert min(float(y) for _, y in pairs) < 40
