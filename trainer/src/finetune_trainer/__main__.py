"""`finetune-trainer <stage> --config PATH`, also `python -m finetune_trainer`: stage.py has all of it.

Commands that people give by hand are modules of their own with a main(argv).
"""

from __future__ import annotations

import importlib
import signal
import sys

from finetune_trainer import stage
from finetune_trainer.contract import CONSOLIDATE, MERGE, PREPARE, STAGES

_COMMANDS = {
    "consolidate-checkpoint": ("finetune_trainer.consolidate_checkpoint", CONSOLIDATE),
    "merge-adapter": ("finetune_trainer.merge_adapter", MERGE),
    "preview": ("finetune_trainer.preview", PREPARE),
}
"""Module of each command, and the stage whose environment it needs."""


def main() -> None:
    """Run the stage or command that the command line names and exit with its code.

    What is set here is set for the whole process.
    """
    signal.signal(signal.SIGTERM, stage.end_terminated)
    if sys.argv[1:] and sys.argv[1] in _COMMANDS:
        module, like = _COMMANDS[sys.argv[1]]
        stage.set_environment(like)
        sys.exit(importlib.import_module(module).main(sys.argv[2:]))
    stage.set_environment(next((word for word in sys.argv[1:] if word in STAGES), ""))
    sys.exit(stage.main())


if __name__ == "__main__":
    main()
