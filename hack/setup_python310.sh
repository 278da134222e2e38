#!/usr/bin/env bash
# Makes .venv-python310: the trainer's pinned set and what its unit tests need (requirements/python310.txt, hashes checked)
# on Python 3.10, which the Neuron base image has. Called by `make test-python310`; does nothing when it is current. Needs
# .venv, whose uv it uses. The interpreter: PYTHON310, python3.10 on PATH, or the newest 3.10 of pyenv.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-python310
need_gib=6
python=""
candidates=("${PYTHON310:-}" "$(command -v python3.10 || true)")
if command -v pyenv >/dev/null; then
  while read -r path; do candidates+=("$path"); done < <(ls -d "$(pyenv root)"/versions/3.10.*/bin/python3.10 2>/dev/null | sort -rV)
fi
for candidate in "${candidates[@]}"; do
  # By running it: pyenv's shims stand on PATH for versions that are not switched on.
  if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "setup: no Python 3.10 on PATH or in pyenv; install one, or name it: make test-python310 PYTHON310=/path/to/python3.10" >&2
  exit 1
fi

key=$({ cat requirements/python310.txt trainer/pyproject.toml images/trainer/remove_cuda.sh; "$python" -V; pwd; } | sha256sum | cut -d' ' -f1)
if [ "$(cat $venv/.setup-key 2>/dev/null)" = "$key" ]; then
  exit 0
fi
free_gib=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
if [ "$free_gib" -lt "$need_gib" ]; then
  echo "setup: $free_gib GiB free here and $venv needs $need_gib GiB; free some disk space and run again" >&2
  exit 1
fi
echo "setup: making $venv with $("$python" -V) (5 GB without CUDA's libraries, less where uv's cache is on this file system)"
rm -rf $venv
"$python" -m venv --without-pip $venv
.venv/bin/uv pip install --quiet --python $venv/bin/python --compile-bytecode --require-hashes -r requirements/python310.txt
.venv/bin/uv pip install --quiet --python $venv/bin/python --no-deps --no-build-isolation -e trainer
sh images/trainer/remove_cuda.sh $venv/lib/python3.10/site-packages
echo "$key" > $venv/.setup-key
