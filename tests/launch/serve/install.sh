#!/usr/bin/env bash
# Installs Chromium for the tests of the page, or prints why it can't.
set -euo pipefail
if command -v chromium > /dev/null || command -v chromium-browser > /dev/null; then
  exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "tests/launch/serve need Chromium: as root, apt-get install chromium" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends chromium > /dev/null
