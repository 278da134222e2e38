"""compile as a program, and train after it; tests/neuron_vendor plays the vendor's tool and its cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from neuron_runs import PROGRAM, VENDOR, neuron_config
from neuron_vendor import graphs

from finetune_trainer import contract, neuron_cache, stage
from finetune_trainer.contract import ArtifactRef, ExitCode, Report, StageConfig
from finetune_trainer.errors import UserError
from finetune_trainer.neuron_cache import ARTIFACT_NAME, NeuronCache
from finetune_trainer.stages import compile as compile_stage
from finetune_trainer.stages import train
from finetune_trainer.stages.train import Launch
from finetune_trainer.stages.train_args import parse_args

TESTS = str(VENDOR.parent)


@pytest.fixture(autouse=True)
def _vendor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The stand-ins on PATH and in the place of train's program; reports go to a file."""
    for name in ("WORKER_MODULE", "AGENT_MODULE"):
        monkeypatch.setattr(train, name, PROGRAM)
    monkeypatch.setenv("PATH", f"{VENDOR}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", TESTS)
    monkeypatch.setenv(contract.TERMINATION_PATH_ENV, str(tmp_path / "termination"))
    monkeypatch.setattr(compile_stage, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(neuron_cache, "UNSEEN_SECONDS", 0.0)
    for name in list(os.environ):
        if name.startswith(("NEURON_", "XLA_")):
            monkeypatch.delenv(name)


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """What the tool was started with so far, run by run."""
    path = tmp_path / "record.jsonl"
    monkeypatch.setenv("FAKE_NEURON_RECORD", str(path))
    return lambda: [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_stage(config: StageConfig, tmp_path: Path, number: int = 0) -> Report:
    """The stage by its own main, as a pod runs it; the report that the kubelet would read."""
    path = tmp_path / f"stage-{config.stage}-{number}.json"
    path.write_bytes(contract.canonical_json(config.as_json()))
    code = stage.main([config.stage, "--config", str(path)])
    report = contract.parse_report((tmp_path / "termination").read_bytes())
    assert report.exit_code == code
    return report


def cache_of(workspace: Path) -> NeuronCache:
    return NeuronCache(workspace / contract.NEURON_CACHE_FOLDER)


def train_after(config: StageConfig, report: Report) -> StageConfig:
    """stage.json of the training that a compilation was for."""
    follower = replace(config, stage=contract.TRAIN, inputs={**config.inputs, **dict(report.artifacts)})
    return replace(follower, output=contract.stage_output("n", "j", contract.TRAIN, contract.stage_digest(follower)))


# ---- one launcher for both


@pytest.mark.parametrize(("nodes", "procs"), [(1, 1), (1, 2), (2, 2)], ids=["one rank", "one node", "two nodes"])
def test_compile_starts_what_train_starts_but_for_the_step_limit_and_the_tool_around_it(
    workspace: Path, tmp_path: Path, nodes: int, procs: int
) -> None:
    config = neuron_config(workspace, nodes=nodes, procs=procs)
    trains = replace(config, stage=contract.TRAIN)
    made = [
        Launch(each, parse_args(each), 0, tmp_path, trace_steps=steps) for each, steps in ((trains, 0), (trains, 10))
    ]
    training, tracing = (launch.command() for launch in made)
    assert tracing == ["neuron_parallel_compile", *training, "--trace-steps", "10"]
    assert made[0].environment() == made[1].environment()
    assert "NEURON_EXTRACT_GRAPHS_ONLY" not in made[0].environment(), "the tool sets it, and nobody else"


def test_the_traced_program_reads_what_train_will_read(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(neuron_config(workspace), progress={"url": "http://127.0.0.1:9/"})
    seen: list[StageConfig] = []

    def look(launch: Launch) -> list[str]:
        seen.append(contract.load_stage_config(launch.scratch / train.CONFIG_NAME))
        raise UserError("Enough", "seen")

    monkeypatch.setattr(Launch, "command", look)
    report = run_stage(config, tmp_path)
    assert report.reason == "Enough"
    [program] = seen
    follower = train_after(config, report)
    assert (program.stage, program.spec, program.parallelism) == (follower.stage, follower.spec, follower.parallelism)
    assert program.inputs == config.inputs
    assert contract.stage_digest(program) == contract.stage_digest(follower)
    assert not program.progress, "the stage posts graphs, the traced program posts no steps"


def test_the_program_really_started_has_the_environment_of_train_and_the_extraction_switch_on_top(
    workspace: Path, tmp_path: Path, record: Callable[[], list[dict[str, Any]]]
) -> None:
    config = neuron_config(workspace)
    assert run_stage(config, tmp_path).exit_code == ExitCode.SUCCESS
    [started] = record()
    follower = replace(config, stage=contract.TRAIN)
    launch = Launch(follower, parse_args(follower), 0, tmp_path)
    own = {"TMPDIR", "_"}  # the scratch folder of the run, and the shell's last word
    expected = {name: value for name, value in launch.environment().items() if name not in own}
    assert {name: value for name, value in started["environment"].items() if name not in own} == expected
    files = started["command"].index("--config")
    assert started["command"][:files] == launch.command()[:files]
    assert started["command"][-2:] == ["--trace-steps", "10"]


# ---- compiling


def test_the_graphs_of_a_training_are_compiled_and_reported(workspace: Path, tmp_path: Path) -> None:
    config = neuron_config(workspace)
    report = run_stage(config, tmp_path)
    assert (report.exit_code, report.reused) == (ExitCode.SUCCESS, False)
    facts = {name: report.metrics[name] for name in ("graphs", "graphsCompiled", "cacheHits", "graphsFailed")}
    assert facts == {"graphs": 3, "graphsCompiled": 3, "cacheHits": 0, "graphsFailed": 0}
    artifact = json.loads((config.output_path / ARTIFACT_NAME).read_text())
    assert artifact["key"] == report.metrics["cacheKey"]
    assert len(artifact["graphs"]) == 3
    cache = cache_of(workspace)
    assert all(cache.neff_bytes(name) for name in artifact["graphs"])


def test_another_job_of_the_same_shape_ends_at_once_and_traces_nothing(
    workspace: Path, tmp_path: Path, record: Callable[[], list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_stage(neuron_config(workspace), tmp_path)
    other = neuron_config(workspace, job="other", training={"learningRate": 0.5}, data={"maxSteps": 90})
    began = time.monotonic()
    second = run_stage(other, tmp_path, 1)
    assert time.monotonic() - began < 2
    assert second.reused
    assert second.metrics["cacheHits"] == second.metrics["graphs"] == 3
    assert second.metrics["cacheKey"] == first.metrics["cacheKey"]
    assert len(record()) == 1
    assert "all 3 graphs are compiled already" in capsys.readouterr().out


def test_a_miss_is_explained_and_what_both_need_is_not_compiled_twice(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage(neuron_config(workspace), tmp_path)
    capsys.readouterr()
    monkeypatch.setenv("FAKE_NEURON_GRAPHS", "first,longer")
    report = run_stage(neuron_config(workspace, job="longer", data={"rowLength": 256}), tmp_path, 1)
    assert "not compiled yet: rows.length was 128 and is 256" in capsys.readouterr().out
    assert report.metrics["cacheMiss"] == "rows.length was 128 and is 256"
    assert (report.metrics["graphsCompiled"], report.metrics["cacheHits"]) == (1, 1)


def test_the_finished_stage_run_again_is_reused_and_one_whose_graphs_are_gone_compiles_again(
    workspace: Path, tmp_path: Path, record: Callable[[], list[dict[str, Any]]]
) -> None:
    config = neuron_config(workspace)
    run_stage(config, tmp_path)
    assert run_stage(config, tmp_path, 1).reused
    assert len(record()) == 1
    [name, *_] = json.loads((config.output_path / ARTIFACT_NAME).read_text())["graphs"]
    (cache_of(workspace).folder / name / "model.neff").unlink()
    report = run_stage(config, tmp_path, 2)
    assert (report.reused, report.metrics["graphsCompiled"], report.metrics["cacheHits"]) == (False, 1, 2)
    assert len(record()) == 2


def test_a_gang_compiles_together_and_each_pod_reports_the_same_artifact(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = neuron_config(workspace, nodes=2)
    monkeypatch.setenv("FAKE_NEURON_ONLY_NODE", "1:second pipeline rank")
    path = tmp_path / "stage.json"
    path.write_bytes(contract.canonical_json(config.as_json()))
    pods = [start_pod(path, tmp_path / f"pod-{node}", {contract.NODE_RANK_ENV: str(node)}) for node in range(2)]
    assert [pod.wait(timeout=60) for pod in pods] == [0, 0]
    first, second = (contract.parse_report((tmp_path / f"pod-{node}").read_bytes()) for node in range(2))
    assert first.artifacts == second.artifacts
    assert first.metrics["graphs"] == 4, "a graph that only the second node has is part of the manifest"
    assert len(json.loads((config.output_path / ARTIFACT_NAME).read_text())["graphs"]) == 4


def start_pod(config: Path, report: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """The stage in a process of its own, with the stand-ins in place."""
    code = (
        "import sys; from finetune_trainer.stages import train, compile; import finetune_trainer.__main__ as program\n"
        f"train.WORKER_MODULE = train.AGENT_MODULE = {PROGRAM!r}; compile._POLL_SECONDS = 0.05\n"
        "program.main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "compile", "--config", str(config)],
        env={**os.environ, contract.TERMINATION_PATH_ENV: str(report), **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


# ---- what goes wrong


@pytest.mark.parametrize("code", ["0", "1", "count"])
def test_a_graph_that_fails_fails_the_stage_whatever_the_tools_exit_code(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setenv("FAKE_NEURON_FAIL", "update")
    monkeypatch.setenv("FAKE_NEURON_EXIT", code)
    report = run_stage(neuron_config(workspace), tmp_path)
    assert (report.exit_code, report.reason) == (ExitCode.USER_ERROR, "CompileFailed")
    assert report.message.startswith("1 of 3 graphs failed (neuronxcc-")
    assert "[NLA001]  Unhandled exception with message: tensor size must be more than 0" in report.message
    assert not list(cache_of(workspace).keys_folder.glob("*.json")), "no manifest promises it"


def test_a_graph_that_was_kept_as_failed_is_tried_again(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = neuron_config(workspace)
    monkeypatch.setenv("FAKE_NEURON_FAIL", "update")
    run_stage(config, tmp_path)
    monkeypatch.delenv("FAKE_NEURON_FAIL")
    report = run_stage(config, tmp_path, 1)
    assert (report.exit_code, report.metrics["graphsCompiled"]) == (ExitCode.SUCCESS, 1)


def test_a_compiler_that_is_killed_for_memory_is_told_as_that(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NEURON_KILL", "later")
    report = run_stage(neuron_config(workspace), tmp_path)
    assert (report.exit_code, report.reason) == (ExitCode.OUT_OF_HOST_MEMORY, "CompilerOutOfMemory")
    assert "stages.compile.resources" in report.message


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("OSError: [Errno 28] No space left on device: 'model.neff'", "VolumeFull"),
        ("[F134] neuronx-cc terminated abnormally - Please open a support ticket", "CompilerCrashed"),
    ],
    ids=["the volume is full", "the compiler crashed"],
)
def test_what_may_go_well_another_time_is_tried_again(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, reason: str
) -> None:
    monkeypatch.setenv("FAKE_NEURON_FAIL", "later")
    monkeypatch.setenv("FAKE_NEURON_WORDS", words)
    report = run_stage(neuron_config(workspace), tmp_path)
    assert (report.exit_code, report.reason) == (ExitCode.RETRYABLE, reason)
    assert words.split(" - ")[0] in report.message


def test_a_tool_that_is_cut_short_is_tried_again_though_it_exits_with_0(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NEURON_SILENT", "1")
    report = run_stage(neuron_config(workspace), tmp_path)
    assert (report.exit_code, report.reason) == (ExitCode.RETRYABLE, "CompileIncomplete")
    monkeypatch.delenv("FAKE_NEURON_SILENT")
    again = run_stage(neuron_config(workspace), tmp_path, 1)
    assert (again.exit_code, again.metrics["graphsCompiled"], again.metrics["cacheHits"]) == (ExitCode.SUCCESS, 0, 3)


def test_a_lock_that_a_dead_tool_left_blocks_nobody(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NEURON_HANG", "later")
    report = run_stage(neuron_config(workspace), tmp_path)
    assert (report.exit_code, report.reason) == (ExitCode.RETRYABLE, "CompileIncomplete")
    monkeypatch.delenv("FAKE_NEURON_HANG")
    assert run_stage(neuron_config(workspace), tmp_path, 1).exit_code == ExitCode.SUCCESS
    monkeypatch.setenv("FAKE_NEURON_GRAPHS", "next")
    entry = cache_of(workspace).folder / graphs.COMPILER / "MODULE_9+ff"
    entry.mkdir()
    assert graphs.take_lock(entry)
    assert run_stage(neuron_config(workspace, data={"rowLength": 64}), tmp_path, 2).exit_code == ExitCode.SUCCESS
    assert graphs.take_lock(entry), "a lock of another job's dead compiler is gone too"


def test_what_the_program_says_itself_is_the_stages_report(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NEURON_ERROR", "UnknownTargetModule")
    report = run_stage(neuron_config(workspace), tmp_path)
    assert (report.stage, report.exit_code, report.reason) == ("compile", ExitCode.USER_ERROR, "UnknownTargetModule")


def test_a_program_that_asks_for_no_graph_is_no_neuron_program(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NEURON_GRAPHS", "")
    report = run_stage(neuron_config(workspace), tmp_path)
    assert (report.exit_code, report.reason) == (ExitCode.USER_ERROR, "NothingTraced")


def test_a_tool_that_ends_before_it_starts_a_rank_is_told_by_its_last_words(workspace: Path, tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "neuron_parallel_compile"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho ModuleNotFoundError: libneuronxla\nexit 3\n")
    tool.chmod(0o755)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
        report = run_stage(neuron_config(workspace), tmp_path)
    assert (report.exit_code, report.reason) == (ExitCode.RETRYABLE, "CompileIncomplete")
    assert "ended with 3 before it started a rank. Its last words: ModuleNotFoundError: libneuronxla" in report.message


def test_an_image_without_the_tool_is_named(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    report = run_stage(neuron_config(workspace), tmp_path)
    assert (report.exit_code, report.reason) == (ExitCode.USER_ERROR, "CompilerMissing")


def test_compile_on_other_accelerators_is_refused(workspace: Path, tmp_path: Path) -> None:
    config = neuron_config(workspace)
    spec = {name: value for name, value in config.spec.items() if name != "accelerator"}
    parallelism = {**config.parallelism, "tensorParallelSize": 1, "dataParallelSize": 2, "globalBatchSize": 6}
    report = run_stage(replace(config, spec=spec, parallelism=parallelism), tmp_path)
    assert (report.exit_code, report.reason) == (ExitCode.USER_ERROR, "InvalidStageConfig")


def test_a_pod_that_is_stopped_takes_its_compilers_along_and_the_next_attempt_goes_on(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = neuron_config(workspace)
    monkeypatch.setenv("FAKE_NEURON_SECONDS", "30")
    path = tmp_path / "stage.json"
    path.write_bytes(contract.canonical_json(config.as_json()))
    pod = start_pod(path, tmp_path / "stopped", {})
    deadline = time.monotonic() + 30
    while not list(cache_of(workspace).folder.glob("neuronxcc-*/*/*.lock")):
        assert time.monotonic() < deadline, "no graph was begun to be compiled"
        assert pod.poll() is None
        time.sleep(0.05)
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(timeout=10) == ExitCode.RETRYABLE
    assert contract.parse_report((tmp_path / "stopped").read_bytes()).reason == "Terminated"
    monkeypatch.setenv("FAKE_NEURON_SECONDS", "0")
    assert run_stage(config, tmp_path).exit_code == ExitCode.SUCCESS


def test_two_jobs_of_one_shape_compile_once(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Callable[[], list[dict[str, Any]]]
) -> None:
    monkeypatch.setenv("FAKE_NEURON_SECONDS", "0.3")
    pods = []
    for number, job in enumerate(("one", "other")):
        path = tmp_path / f"{job}.json"
        path.write_bytes(contract.canonical_json(neuron_config(workspace, job=job).as_json()))
        pods.append(start_pod(path, tmp_path / f"report-{number}", {}))
    assert [pod.wait(timeout=60) for pod in pods] == [0, 0]
    reports = [contract.parse_report((tmp_path / f"report-{number}").read_bytes()) for number in range(2)]
    assert sorted(report.metrics["graphsCompiled"] for report in reports) == [0, 3]
    assert sorted(report.reused for report in reports) == [False, True]
    assert len(record()) == 1


# ---- how far it is


@pytest.fixture
def posts() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An endpoint on this machine: its address, and what was posted to it."""
    seen: list[dict[str, Any]] = []

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            """Silent."""

    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/progress", seen
    server.shutdown()
    thread.join()
    server.server_close()


def test_graphs_are_posted_as_steps(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    posts: tuple[str, list[dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, seen = posts
    monkeypatch.setattr(compile_stage, "_PROGRESS_SECONDS", 0.0)
    monkeypatch.setenv("FAKE_NEURON_SECONDS", "0.3")
    run_stage(replace(neuron_config(workspace), progress={"url": url}), tmp_path)
    assert seen[0] == {"step": 0, "totalSteps": 0, "phase": "tracing"}
    assert (seen[-1]["step"], seen[-1]["totalSteps"], seen[-1]["phase"]) == (3, 3, "compiling")
    assert "3 of 3 graphs are compiled" in capsys.readouterr().out


# ---- train after it


def test_train_finds_everything_compiled_and_compiles_nothing(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = neuron_config(workspace)
    report = run_stage(train_after(config, run_stage(config, tmp_path)), tmp_path)
    assert (report.exit_code, report.metrics["graphsCompiled"]) == (ExitCode.SUCCESS, 0)
    said = capsys.readouterr().out
    assert "all 3 graphs of this training are compiled" in said
    assert "is compiled while the training waits" not in said


def test_a_graph_that_was_not_traced_is_compiled_in_train_and_told(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = neuron_config(workspace)
    follower = train_after(config, run_stage(config, tmp_path))
    monkeypatch.setenv("FAKE_NEURON_MORE", "at the last step only")
    report = run_stage(follower, tmp_path)
    assert (report.exit_code, report.metrics["graphsCompiled"]) == (ExitCode.SUCCESS, 1)
    assert "is compiled while the training waits: it is none of the 3 graphs" in capsys.readouterr().out


def test_train_ends_before_its_first_step_where_its_key_is_not_the_compiled_one(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = neuron_config(workspace)
    follower = train_after(config, run_stage(config, tmp_path))
    monkeypatch.setenv("NEURON_FUSE_SOFTMAX", "1")
    report = run_stage(follower, tmp_path)
    assert (report.exit_code, report.reason) == (ExitCode.USER_ERROR, "CompileCacheMiss")
    assert 'environment.NEURON_FUSE_SOFTMAX was absent and is "1"' in report.message


def test_train_ends_before_its_first_step_where_graphs_are_gone(workspace: Path, tmp_path: Path) -> None:
    config = neuron_config(workspace)
    follower = train_after(config, run_stage(config, tmp_path))
    for path in cache_of(workspace).folder.glob("neuronxcc-*/*/model.done"):
        path.unlink()
    report = run_stage(follower, tmp_path)
    assert (report.exit_code, report.reason) == (ExitCode.USER_ERROR, "CompileCacheMiss")
    assert report.message.startswith("3 of 3 graphs of key")


def test_train_waits_for_what_its_node_does_not_see_yet(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = neuron_config(workspace)
    follower = train_after(config, run_stage(config, tmp_path))
    monkeypatch.setattr(neuron_cache, "UNSEEN_SECONDS", 20.0)
    monkeypatch.setattr(neuron_cache, "_LOOK_SECONDS", 0.05)
    [path, *_] = cache_of(workspace).folder.glob("neuronxcc-*/*/model.neff")
    hidden = path.rename(path.with_name("unseen"))
    timer = threading.Timer(0.3, lambda: hidden.rename(path))
    timer.start()
    report = run_stage(follower, tmp_path)
    timer.join()
    assert (report.exit_code, report.metrics["graphsCompiled"]) == (ExitCode.SUCCESS, 0)
    assert "waiting to see the compiled graphs" in capsys.readouterr().out


def test_a_miss_in_train_is_told_against_what_its_own_compile_stage_made(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = neuron_config(workspace)
    follower = train_after(config, run_stage(config, tmp_path))
    monkeypatch.setenv("NEURON_FUSE_SOFTMAX", "1")
    run_stage(neuron_config(workspace, job="nearer", data={"rowLength": 64}), tmp_path, 1)
    report = run_stage(follower, tmp_path)
    assert 'environment.NEURON_FUSE_SOFTMAX was absent and is "1"' in report.message
    assert "rows.length" not in report.message


def test_without_a_compile_stage_training_compiles_for_itself(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(neuron_config(workspace, stage=contract.TRAIN), inputs=neuron_config(workspace).inputs)
    report = run_stage(config, tmp_path)
    assert (report.exit_code, report.metrics["graphsCompiled"]) == (ExitCode.SUCCESS, 3)
    assert "no compile stage ran" in capsys.readouterr().out


def test_a_compile_artifact_alone_promises_nothing(workspace: Path, tmp_path: Path) -> None:
    config = neuron_config(workspace, stage=contract.TRAIN)
    inputs = {**config.inputs, contract.COMPILE: ArtifactRef("finetune/gone", contract.digest_of("gone"))}
    report = run_stage(replace(config, inputs=inputs), tmp_path)
    assert report.reason == "CompileCacheMiss"
    assert "nothing was compiled into this cache yet" in report.message
