#!/usr/bin/env bash
# Makes .venv with everything a checkout needs (requirements/dev.txt, hashes checked) and all distributions installed
# editable. Called by `make setup`; does nothing when .venv already holds the pinned set.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
need_gib=10   # torch with its CUDA libraries is 6.7 GB; PyPI has no other x86 Linux wheel
python=""
for candidate in "${PYTHON:-}" python3.11 python3.12 python3; do
  [ -n "$candidate" ] && command -v "$candidate" >/dev/null || continue
  if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "setup: no Python 3.11 or 3.12 on PATH; install one, or name it: make setup PYTHON=/path/to/python3.11" >&2
  exit 1
fi

key=$({ cat requirements/dev.txt operator/pyproject.toml trainer/pyproject.toml client/pyproject.toml; "$python" -V; pwd; } | sha256sum | cut -d' ' -f1)
if [ "$(cat $venv/.setup-key 2>/dev/null)" = "$key" ]; then
  exit 0
fi

if [ ! -x $venv/bin/python ]; then
  free_gib=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
  if [ "$free_gib" -lt "$need_gib" ]; then
    echo "setup: $free_gib GiB free here and .venv needs $need_gib GiB; free some disk space and run again" >&2
    exit 1
  fi
fi
echo "setup: making $venv with $("$python" -V) (about 7 GB, a few minutes the first time)"
# A half-made environment is thrown away: it is cheaper to make again than to trust.
rm -rf $venv
quiet=(--quiet)
if [ -t 2 ]; then quiet=(); fi  # a person who waits sees uv's progress bars
"$python" -m venv $venv
$venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
# Bytecode now: importing torch and transformers without takes 10 s in every process where none may be written later.
# Hard links from uv's cache where it is on the same file system, copies where it is not.
$venv/bin/uv pip install "${quiet[@]}" --python $venv/bin/python --compile-bytecode --require-hashes -r requirements/dev.txt
$venv/bin/uv pip install "${quiet[@]}" --python $venv/bin/python --no-deps --no-build-isolation -e trainer -e operator -e client
echo "$key" > $venv/.setup-key
