"""What the commands that people give by hand have in common: an error is one line, and its exit code the contract's.

merge_adapter.py, consolidate_checkpoint.py and preview.py call this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from finetune_trainer.artifacts import find_artifact
from finetune_trainer.contract import ContractError, ExitCode
from finetune_trainer.errors import StageError, UserError
from finetune_trainer.stage import as_stage_error

_INTERRUPTED = 130
"""The shell's exit code of a program that Ctrl-C ended."""


def run_by_hand(run: Callable[[], object], stopped: str = "stopped") -> int:
    """Run a command and return its exit code; what is wrong is told on stderr, `stopped` after Ctrl-C.

    What is no known error of the machine, the volume or the user is a bug and passes.
    """
    try:
        run()
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return _INTERRUPTED
    except (StageError, ContractError, OSError, MemoryError) as error:
        known = as_stage_error(error)
        if known is None:
            raise
        print(f"{known.reason}: {known.message}", file=sys.stderr)
        return known.exit_code
    return ExitCode.SUCCESS


def check_output(output: Path, what: str) -> Path:
    """The absolute path of a folder that a command will write; UserError (OutputExists) when something is there."""
    output = output.absolute()
    if output.exists():
        whole = f"a complete {what} already" if find_artifact(output) else "there already"
        raise UserError("OutputExists", f"{output} is {whole}: name another folder, or remove it")
    return output
