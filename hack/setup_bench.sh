#!/usr/bin/env bash
# Makes .venv-bench: the trainer's pinned set and what bench/trainer compares it with (requirements/bench.txt, hashes
# checked). Called by `make bench-trainer`; does nothing when it is current. Needs .venv, whose uv it uses.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-bench
key=$({ cat requirements/bench.txt trainer/pyproject.toml; .venv/bin/python -V; pwd; } | sha256sum | cut -d' ' -f1)
if [ "$(cat $venv/.setup-key 2>/dev/null)" = "$key" ]; then
  exit 0
fi
echo "setup: making $venv (hard links to uv's cache where it is on this file system, else 7 GB)"
rm -rf $venv
.venv/bin/python -m venv --without-pip $venv
.venv/bin/uv pip install --quiet --python $venv/bin/python --compile-bytecode --require-hashes -r requirements/bench.txt
.venv/bin/uv pip install --quiet --python $venv/bin/python --no-deps --no-build-isolation -e trainer
echo "$key" > $venv/.setup-key
