"""Tests marked cuda are skipped, with a reason, where no NVIDIA GPU is to be seen."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU here (torch.cuda.is_available() is false): run it on a GPU node")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)
