#!/usr/bin/env bash
# Installs FlowMask as root on a bare Debian or Ubuntu with Python 3.11 or newer: system packages, and a virtual
# environment with the versions of constraints.txt. container/Dockerfile and container/flowmask.def run this script.
#   FLOWMASK_VENV    folder of the environment; default /opt/flowmask
#   FLOWMASK_EXTRAS  optional parts of the package, with commas; default a2d,gpu,serve
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
venv=${FLOWMASK_VENV:-/opt/flowmask}
extras=${FLOWMASK_EXTRAS-a2d,gpu,serve}

# torch.compile and DeepSpeed's CPU Adam build code at run time with g++ and Python's headers. Legends need the font.
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends ca-certificates fonts-dejavu-core g++ git python3-dev python3-venv
rm -rf /var/lib/apt/lists/*

python3 -m venv "$venv"
"$venv/bin/pip" install --no-cache-dir --disable-pip-version-check --progress-bar off \
  --constraint "$source/constraints.txt" "$source${extras:+[$extras]}"
ln -sf "$venv/bin/flowmask" /usr/local/bin/flowmask
flowmask --version
