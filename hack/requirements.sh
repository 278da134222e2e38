#!/usr/bin/env bash
# Resolves requirements/*.in into *.txt: pins with hashes, no index address. The trainer's pins are made first, for Python
# 3.10 too; the others are constrained by them, so that one environment holds both distributions.
set -euo pipefail
cd "$(dirname "$0")/../requirements"
lock() {
  local name=$1 python=$2
  shift 2
  ../.venv/bin/uv pip compile --universal --python-version "$python" --generate-hashes --no-emit-index-url --no-header --no-annotate \
    --quiet "$@" "$name.in" -o "$name.txt"
}
lock trainer 3.10
lock dev 3.11 -c trainer.txt
lock operator 3.11 -c dev.txt
lock bench 3.11 -c dev.txt
{
  echo "# What hack/setup.sh needs before it can install requirements/dev.txt: uv, the same pin as there."
  awk '/^uv==/ {p = 1} p {print} p && !/\\$/ {exit}' dev.txt
} > bootstrap.txt
