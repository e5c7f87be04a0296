#!/bin/bash
# Installs Debian's Slurm and munge if they are missing: `make test-slurm` starts a throw-away cluster of them.
# Nothing is left running: the daemons that the packages may start are stopped, the tests start their own.
set -euo pipefail

if command -v slurmctld slurmd munged sbatch srun >/dev/null; then
  exit 0
fi
if ! command -v apt-get >/dev/null; then
  echo "install.sh: no apt-get here: install slurmctld, slurmd, sbatch, srun and munged yourself" >&2
  exit 1
fi
as_root=()
if [ "$(id -u)" != 0 ]; then
  as_root=(sudo)
fi
"${as_root[@]}" apt-get update -qq
DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends slurm-wlm munge
for service in slurmctld slurmd munge; do
  "${as_root[@]}" systemctl disable --now "$service" >/dev/null 2>&1 || true
done
