"""The log of the Neuron compiler's tools: real samples, shortened."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.compilation_log import CompilationLog, parse_summary

LOGS = Path(__file__).parents[2] / "neuron_logs"


def sample(name: str) -> CompilationLog:
    """The log in tests/neuron_logs, whose README says where each was read."""
    return read((LOGS / f"{name}.txt").read_text(encoding="utf-8"))


def read(text: str) -> CompilationLog:
    log = CompilationLog()
    for line in text.splitlines():
        log.feed(line)
    return log


def test_a_summary_with_the_compilers_dots_in_it_is_read() -> None:
    log = sample("summary-2.16")
    assert log.summary is not None
    assert log.summary.succeeded == {
        "neuronxcc-2.16.372.0+4a9b2326/MODULE_9993940051196728623+3cc9a3cb",
        "neuronxcc-2.16.372.0+4a9b2326/MODULE_7470829644182149778+3cc9a3cb",
    }
    assert (log.summary.failed, log.summary.total, log.summary.seconds) == (frozenset(), 2, 195.32730412483215)
    assert log.totals == {"graphs": 2, "successful compilations": 2, "failed compilations": 0}
    assert (log.summed_up, log.failures) == (True, 0)


def test_a_summary_behind_a_launchers_prefix_is_read_and_its_failures_count() -> None:
    log = sample("summary-2.14")
    assert log.summary is not None
    assert log.summary.failed == {"neuronxcc-2.0.0.22266a0+a69f71e55/MODULE_16141953836240613513+abb26765"}
    assert (log.summary.total, log.failures, log.summed_up) == (2, 1, True)


def test_graphs_are_counted_once_whichever_rank_extracts_them_and_a_progress_bar_before_them_is_no_harm() -> None:
    log = sample("trace-2.12")
    assert log.graphs == (
        "neuronxcc-2.12.68.0+4480452af/MODULE_5274156739761925271+d41d8cd9",
        "neuronxcc-2.12.68.0+4480452af/MODULE_931450859643720011+d41d8cd9",
    )
    assert list(log.called) == ["MODULE_931450859643720011+d41d8cd9"]
    assert (log.traced, log.summed_up) == (True, False)


def test_what_is_found_compiled_and_what_is_kept_as_failed_are_told_apart() -> None:
    log = sample("cached")
    assert list(log.cached) == ["neuronxcc-2.7.0.40+f7c6cf2a3/MODULE_12206097846517805328+d41d8cd9"]
    assert list(log.failed) == ["MODULE_d3007680bbf6cce0a595+4497a662"]
    assert any("BIR verification failed" in line for line in log.telling)


def test_the_newer_form_of_the_log_is_read_too() -> None:
    log = sample("newer")
    assert list(log.called) == list(log.completed) == ["MODULE_9886333626096130500+70e3f644"]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        # aws-neuron-samples issue 64
        (
            "2023-12-26T08:37:54Z USER 26191 [neuronxcc.driver.CommandDriver]: [F137] neuronx-cc was forcibly killed - "
            "This most commonly occurs due to insufficient system memory.",
            "ran_out_of_memory",
        ),
        # SDK documentation, known issues of precompiling on trn1.2xlarge
        (
            "ERROR ||PARALLEL_COMPILE||: parallel compilation with neuronx-cc exited with error.Received error "
            "code: -9",
            "ran_out_of_memory",
        ),
        ("OSError: [Errno 28] No space left on device: '/workspace/finetune/neuron-cache/x'", "ran_out_of_space"),
        # nki-samples issue 24
        ("[F134] neuronx-cc terminated abnormally - Please open a support ticket at https://…", "compiler_crashed"),
    ],
    ids=["killed by name", "killed by number", "the volume is full", "the compiler crashed"],
)
def test_the_cause_is_read_from_the_last_words(line: str, name: str) -> None:
    log = read(line)
    causes = {each for each in ("ran_out_of_memory", "ran_out_of_space", "compiler_crashed") if getattr(log, each)}
    assert causes == {name}


def test_nothing_left_to_compile_is_a_summary_too() -> None:
    text = "No todo hlos found in cache or hlo_tasklist, parallel_compile return before spawning workers...."
    log = read(f"2026-01-02 03:04:05.000001:  97  INFO ||NEURON_PARALLEL_COMPILE||: {text}")
    assert (log.summed_up, log.traced, log.failures) == (True, True, 0)


def test_braces_of_the_program_are_no_summary() -> None:
    log = read('configuration {\n"hidden": 3\n}\n{\n    "compilation_summary": {\n        "true": 1\n    }\n}\n')
    assert log.summary is not None
    assert log.summary.total == 1


def test_a_brace_that_is_left_open_right_before_the_summary_hides_nothing() -> None:
    log = read('settings = {\nINFO ||NEURON_PARALLEL_COMPILE||: {\n    "compilation_summary": {\n    }\n}\n')
    assert log.summary is not None
    assert log.summed_up


PIECES = st.sampled_from(
    [
        "{",
        "}",
        '"compilation_summary": {',
        '"true": 1,',
        '"compilation_report": [',
        "Total failed compilations: 7",
        "Extracting graphs (",
        "Extracting graphs (/c/neuronxcc-2/MODULE_1+2/model.hlo)",
        "Using a cached neff at x.neff",
        "[F137]",
        "\x00\ud800",
        "...",
    ]
)


@given(st.lists(st.lists(PIECES, max_size=3).map(" ".join), max_size=12))
def test_whatever_a_program_prints_is_taken(lines: list[str]) -> None:
    log = CompilationLog()
    for line in lines:
        log.feed(line)
    assert log.failures in (0, 7)
    assert set(log.graphs) <= {"neuronxcc-2/MODULE_1+2"}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ('{"compilation_summary": {"true": 2, "false": 1}}', (3, 1)),
        ('{"compilation_summary": {}, "compilation_report": {}}', (0, 0)),
        ('{"compilation_summary": {"true": 1, "timeout": 2}}', (3, 2)),
        ('{"compilation_summary": {"true": "1", "false": -1}}', (0, 0)),
        (
            '{"compilation_summary": {"true": 1}, "compilation_report": {"/neuronxcc-2/MODULE_1/x": {"status": 0}}}',
            (1, 1),
        ),
    ],
    ids=["both", "none", "a status that is neither", "numbers that are none", "a report that says otherwise"],
)
def test_a_summary_is_counted_by_its_worst_account(text: str, numbers: tuple[int, int]) -> None:
    found = parse_summary(text)
    assert found is not None
    assert (found.total, found.total_failed) == numbers
