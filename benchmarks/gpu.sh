#!/usr/bin/env bash
# Measures this machine's GPU in one run: gpu.sh OUT [--wheels DIR] [--seconds N] [--device cpu] [--tiny]
# Needs Python 3.12 with torch, transformers and safetensors, no network and no weights. DIR: the wheels of
# gpu_wheels.sh, for a machine without the other packages. OUT gets rows.jsonl, with each row when it is done, and
# results.json and tables.md made from it. PYTHON is the interpreter (python3).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3} began=$SECONDS path=$root:$root/benchmarks words=()
while [ $# -gt 0 ]; do
  case $1 in
    --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
    *) words+=("$1"); shift ;;
  esac
done
if [ -n "${wheels:-}" ]; then
  site=$(mktemp -d)
  words+=(--site "$site")
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
  path=$path:$site
fi
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m gpu --spent $((SECONDS - began)) "${words[@]}"
