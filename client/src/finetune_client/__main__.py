"""Entry of `kubectl finetune` and `finetune`: kubectl runs a program kubectl-finetune on PATH for the former."""

from __future__ import annotations

import sys


def main() -> None:
    """Run what the command line says and exit with its code (errors.Exit)."""
    from finetune_client.commands import run

    sys.exit(run(sys.argv[1:]))


def complete() -> None:
    """Entry of kubectl_complete-finetune, which kubectl runs when its user presses the tabulator."""
    from finetune_client.commands import complete

    sys.exit(complete(sys.argv[1:]))


if __name__ == "__main__":
    main()
