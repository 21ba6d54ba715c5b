#!/usr/bin/env bash
# Installs what the tests of the page need: Chromium, Gradio and the browser's driver; or says why it can't.
# Gradio 6 wants Pillow 12 and constraints.txt has 13, so that the packages go into a folder of their own.
set -euo pipefail
cd "$(dirname "$0")/../../.."
packages=.venv-serve
if ! command -v chromium > /dev/null && ! command -v chromium-browser > /dev/null; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "tests/launch/serve need Chromium: as root, apt-get install chromium" >&2
    exit 1
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -qq -y --no-install-recommends chromium > /dev/null
fi
if [ ! -e "$packages/.ready" ] || [ constraints.txt -nt "$packages/.ready" ]; then
  rm -rf "$packages"
  .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --target "$packages" \
    --constraint <(grep -v '^pillow==' constraints.txt) 'pillow==12.3.0' \
    brotli gradio gradio_client greenlet groovy hf-gradio httpcore httpx orjson playwright pydub python-multipart pytz \
    safehttpx semantic-version tomlkit
  touch "$packages/.ready"
fi
