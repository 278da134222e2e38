"""How many processors a container may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune_trainer.cpus import available_cpus

MINE = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("max 100000\n", MINE, id="no quota"),
        pytest.param("100000 100000\n", 1, id="one processor"),
        pytest.param("50000 100000\n", 1, id="half a processor counts as one"),
        pytest.param("99900000 100000\n", MINE, id="a quota beyond the machine"),
        pytest.param("not a quota", MINE, id="a file of another form"),
    ],
)
def test_the_quota_of_the_control_group_counts(tmp_path: Path, text: str, expected: int) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(text)
    assert available_cpus(file) == expected


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert available_cpus(tmp_path / "missing") == MINE
