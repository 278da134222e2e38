"""make bench-trainer: every benchmark runs, one that fails is named, and the last line has what figures there are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "bench" / "trainer"


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_trainer", FOLDER / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, name: str, program: str) -> None:
    (folder / f"{name}.py").write_text(program)


def test_figures_of_all_benchmarks_are_put_together_and_failures_are_named(runner: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "a", 'print("talk")\nprint(\'{"merge_rate_to_cp": 0.9, "rounds": 3}\')')
    write(tmp_path, "b", "print('{\"pack_fill\": 1}')\nraise SystemExit(3)")
    write(tmp_path, "c", "print('nothing to tell')")
    write(tmp_path, "d", "print('{\"pack_fill\": 0.995}')\nprint()")
    write(tmp_path, "_rows", "raise SystemExit('this is no benchmark')")
    found, failures = runner.run_all(runner.find_benchmarks(tmp_path))
    assert found == {"merge_rate_to_cp": 0.9, "rounds": 3, "pack_fill": 0.995}
    assert failures == ["b.py ended with 3", "c.py printed no JSON object at its end"]


def test_a_figure_that_no_benchmark_gave_is_null_and_named(runner: ModuleType) -> None:
    figures, missing = runner.summary({"a": 1, "other": 2}, ["a", "b"])
    assert figures == {"a": 1, "b": None}
    assert missing == ["no benchmark gave b"]
