"""Starts the operator: reads the configuration, sets up logging, runs until a signal. `finetune-operator` on PATH."""

from __future__ import annotations

import gc
import logging
import os
import sys

from finetune_operator.config import ConfigError, read_config

NEW_OBJECTS_TO_COLLECT = 20_000
"""How many objects are made before garbage is looked for. Python's own 700 cost a busy operator a tenth of its time:
each event makes thousands, nearly all of which go by their reference counts."""


def main() -> int:
    """Exit code 0 after a signal, 2 when the configuration is wrong."""
    try:
        config = read_config(os.environ)
    except ConfigError as error:
        print(f"finetune-operator: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stdout, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for chatty in ("kopf.objects", "kopf.activities", "aiohttp.access"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))
    from finetune_operator.handlers import run  # kopf takes a second to import; a wrong configuration is told before it

    gc.set_threshold(NEW_OBJECTS_TO_COLLECT)
    run(config)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
