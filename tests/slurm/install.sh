#!/usr/bin/env bash
# Installs the packages for the tests on a real SLURM, or prints why it can't. It starts no service.
set -euo pipefail
packages="slurm-wlm slurmdbd munge mariadb-server"
export PATH="$PATH:/usr/sbin:/sbin"
missing=""
for program in slurmctld slurmd slurmdbd munged mariadbd mysql_install_db; do
  command -v "$program" > /dev/null || missing="$missing $program"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" != 0 ]; then
  echo "tests/slurm need$missing: as root, apt-get install $packages" >&2
  exit 1
fi
if ! command -v apt-get > /dev/null; then
  echo "tests/slurm need$missing, and there is no apt-get: install $packages by this system's own means" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends $packages > /dev/null
