"""Settings for every test: properties are checked on the same examples in every run, so that a failure is a change's.

`HYPOTHESIS_PROFILE=explore make unit` looks for new counter-examples instead.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
