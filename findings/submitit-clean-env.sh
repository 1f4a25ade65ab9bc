#!/usr/bin/env bash
# submitit 1.5.4, seen 2026-11-29: `submitit.helpers.clean_env()` removes SLURM_CONF.
#
# The context manager is meant for submitting a job from inside a job: it removes the variables of the surrounding job, so
# that the new one does not inherit them. It removes every variable that begins with SLURM_, and SLURM_CONF is one, which
# does not describe the job but names the cluster's configuration file. At a site that sets it (several clusters, a
# container, a file elsewhere than /etc/slurm/slurm.conf), `sbatch` inside the context finds another configuration or none.
#
# Seen:
#   outside: SLURM_CONF=/opt/site/slurm.conf SLURM_JOB_ID=7
#   inside:  SLURM_CONF=None SLURM_JOB_ID=None
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'submitit==1.5.4' || exit 2

SLURM_CONF=/opt/site/slurm.conf SLURM_JOB_ID=7 "$folder/venv/bin/python" - <<'PYTHON' || {
import subprocess
import sys

import submitit


def seen() -> str:
    """What a program started here gets, as sbatch would be."""
    ask = "import os; print(*(f'{name}={os.environ.get(name)}' for name in ('SLURM_CONF', 'SLURM_JOB_ID')))"
    return subprocess.check_output([sys.executable, "-c", ask], text=True).strip()


print(f"outside: {seen()}")
with submitit.helpers.clean_env():
    inside = seen()
print(f"inside:  {inside}")
sys.exit(inside != "SLURM_CONF=None SLURM_JOB_ID=None")
PYTHON
  echo "changed: this is no longer what submitit 1.5.4 did" >&2
  exit 1
}
