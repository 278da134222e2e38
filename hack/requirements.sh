#!/usr/bin/env bash
# Resolves requirements/*.in into *.txt: pins with hashes, no index address. The trainer's pins are made first, for Python
# 3.10 too; the others are constrained by them, so that one environment holds both distributions. With names of sets, only
# these: hack/requirements.sh neuron dev
set -euo pipefail
cd "$(dirname "$0")/../requirements"
wanted=("$@")
lock() {
  local name=$1 python=$2
  shift 2
  if [ ${#wanted[@]} -gt 0 ] && [[ " ${wanted[*]} " != *" $name "* ]]; then return; fi
  ../.venv/bin/uv pip compile --universal --python-version "$python" --generate-hashes --no-emit-index-url --no-header --no-annotate \
    --quiet "$@" "$name.in" -o "$name.txt"
}
lock trainer 3.10
lock python310 3.10 -c trainer.txt
lock dev 3.11 -c trainer.txt
lock operator 3.11 -c dev.txt
lock client 3.11 -c dev.txt
lock bench 3.11 -c dev.txt
# A Neuron base image has all that these need, and its versions stay: only what is named is pinned. That it fits together at
# all is asked of the resolver first, with the trainer's own pins.
if [ ${#wanted[@]} -eq 0 ] || [[ " ${wanted[*]} " == *" neuron "* ]]; then
  ../.venv/bin/uv pip compile --universal --python-version 3.10 --quiet -c trainer.txt neuron.in >/dev/null
fi
lock neuron 3.10 -c trainer.txt --no-deps
{
  echo "# What hack/setup.sh needs before it can install requirements/dev.txt: uv, the same pin as there."
  awk '/^uv==/ {p = 1} p {print} p && !/\\$/ {exit}' dev.txt
} > bootstrap.txt
