#!/usr/bin/env bash
# Wheels for a machine with Python 3.12, torch, transformers and safetensors, and no network: gpu_wheels.sh DIR [PYTHON]
# DIR then holds the other packages that gpu.sh imports, in the versions of constraints.txt. PYTHON (python3) makes the
# wheels. It needs pip, and torch to build DeepSpeed, which has no wheel on the index.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 DIR [PYTHON]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$1 python=${2:-python3}
names='accelerate annotated-types certifi charset-normalizer diffusers einops hjson idna importlib_metadata markdown-it-py
mdurl msgpack omegaconf peft pillow psutil py-cpuinfo pycocotools pydantic pydantic_core Pygments requests rich
typing-inspection urllib3 zipp'
platforms='manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64
manylinux_2_12_x86_64 manylinux2010_x86_64 manylinux_2_5_x86_64'

pinned() { grep -iE "^${1//[-_]/[-_]}==" "$root/constraints.txt" || { echo "constraints.txt names no $1" >&2; exit 2; }; }

mkdir -p "$folder"
wanted=$(for name in $names; do pinned "$name"; done)
# shellcheck disable=SC2046,SC2086  # lists of words
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  $(printf -- '--platform %s ' $platforms) -d "$folder" $wanted
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation -w "$folder" "$(pinned deepspeed)"
du -cb "$folder"/*.whl | tail -1 | awk '{printf "%.1f MB in wheels\n", $1 / 1e6}'
