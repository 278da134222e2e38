"""`finetune-trainer <stage> --config PATH`, also `python -m finetune_trainer`. Everything is in stage.py."""

from __future__ import annotations

import signal
import sys

from finetune_trainer import stage
from finetune_trainer.contract import STAGES


def main() -> None:
    """Run the stage named on the command line and exit with its code. What is set here is set for the whole process."""
    signal.signal(signal.SIGTERM, stage.end_terminated)
    stage.set_environment(next((word for word in sys.argv[1:] if word in STAGES), ""))
    sys.exit(stage.main())


if __name__ == "__main__":
    main()
