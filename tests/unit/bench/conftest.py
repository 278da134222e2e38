"""The benchmark's modules lie beside the program that uses them; its tests import them as that program does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench" / "operator" / "operator_bench"))
