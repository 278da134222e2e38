"""A child's output is passed on as it comes and heard line by line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from finetune_trainer.child_output import ChildOutput

CODE = r"""
import sys
out = sys.stdout.buffer
out.write(b"one\n 10%|x\r 20%|xx\rgr\xc3"); out.flush()
out.write(b"\xbcn \xff\n\nlast"); out.flush()
"""


def test_lines_are_whole_whatever_the_chunks_and_nothing_of_the_text_is_lost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    heard: list[str] = []
    with subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        output = ChildOutput(child.stdout, heard.append)
        child.wait()
        output.close(10)
    assert heard == ["one", " 10%|x", " 20%|xx", "grün �", "", "last"]
    assert capsys.readouterr().out == "one\n 10%|x\r 20%|xx\rgrün �\n\nlast"
