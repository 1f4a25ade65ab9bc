"""Hands claimed jobs to the process that submits them (`cluster.jobs`), and keeps what became of each."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from hpc_router.environment import scrubbed
from hpc_router.errors import LaunchError
from hpc_router.jobdir import Exit, JobDir
from hpc_router.rundir import RunDir, private_umask

TIMEOUT_S: Final = 60.0
"""For the batch, and as much again for each job in it: a busy controller takes its time."""


def submit_all(batch: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """Replica -> what went wrong with it. `batch`: `jobs.Submission` as plain values, because only the child loads
    submitit."""
    replicas = [replica for submission in batch for replica in submission["argv_of"]]
    try:
        with private_umask():
            done = subprocess.run(
                [sys.executable, "-m", "hpc_router.cluster.jobs"],
                input=json.dumps(batch),
                env=scrubbed(os.environ),
                capture_output=True,
                check=True,
                start_new_session=True,
                text=True,
                timeout=TIMEOUT_S * (1 + len(batch)),
            )
        answers = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        said = (getattr(error, "stderr", None) or "").strip().rpartition("\n")[2]
        return dict.fromkeys(replicas, f"the submitting process failed: {said or error}")
    return {replica: answer["error"] for answer in answers for replica in answer["replicas"]}


def keep_refusals(run: RunDir, refused: Mapping[str, Exit]) -> None:
    """An exit record for each job that was refused. Raises LaunchError if there is any."""
    for replica, end in refused.items():
        JobDir(run, replica).write(end)
    if refused:
        each = "; ".join(f"{replica}: {end.message}" for replica, end in refused.items())
        raise LaunchError(f"cannot be submitted: {each}")
