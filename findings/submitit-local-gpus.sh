#!/usr/bin/env bash
# submitit 1.5.4, seen 2026-11-29: jobs of the local executor share the first GPUs.
#
# Each job with `gpus_per_node=N` gets CUDA_VISIBLE_DEVICES=0,...,N-1, also while other jobs run. On a machine with four
# GPUs, four jobs of one GPU each all use GPU 0. `visible_gpus` chooses other devices, but nothing keeps account of them:
# the program that submits has to.
#
# Seen:
#   first job:  CUDA_VISIBLE_DEVICES=0
#   second job: CUDA_VISIBLE_DEVICES=0   (while the first one runs)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'submitit==1.5.4' || exit 2

cat >"$folder/jobs.py" <<'PYTHON'
import os
import pathlib
import sys
import time

import submitit

folder = pathlib.Path(sys.argv[1])


def job(name: str, other: str) -> str:
    """Its devices, told once both jobs run."""
    (folder / name).touch()
    while not (folder / other).exists():
        time.sleep(0.05)
    return os.environ["CUDA_VISIBLE_DEVICES"]


executor = submitit.LocalExecutor(folder / "jobs")
executor.update_parameters(gpus_per_node=1, timeout_min=1)
jobs = [executor.submit(job, "first", "second"), executor.submit(job, "second", "first")]
seen = [job.result() for job in jobs]
print(f"first job:  CUDA_VISIBLE_DEVICES={seen[0]}")
print(f"second job: CUDA_VISIBLE_DEVICES={seen[1]}   (while the first one runs)")
sys.exit(seen != ["0", "0"])
PYTHON
"$folder/venv/bin/python" "$folder/jobs.py" "$folder" || {
  echo "changed: this is no longer what submitit 1.5.4 did" >&2
  exit 1
}
