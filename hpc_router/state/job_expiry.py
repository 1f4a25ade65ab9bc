"""Finds the time at which this process's Slurm job ends, which the service publishes in its record.

Slurm 24.11 and later set SLURM_JOB_END_TIME at the start of the job. If the time limit is changed later, only the
deployment's `squeue.json` shows it; on older releases, that file is the only source.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

from hpc_router.net.job_environment import JOB_END, current_job_id
from hpc_router.state.run_directory import RunDir
from hpc_router.state.stamped_file import StampedFile

MIN_CHANGE_S: Final = 1.0
"""Minimum change of the end in seconds that is published. A smaller one is only rounding, because Slurm prints whole
seconds."""


class JobExpiry:
    """Reads the end of the job in Unix seconds. The end is None if this process runs in no Slurm job, and while it is
    unknown."""

    def __init__(self, run: RunDir, environment: Mapping[str, str]) -> None:
        self._job_id = current_job_id(environment)
        self._ends_at = _number(environment.get(JOB_END))
        self._queue = StampedFile(run.squeue_json, _ends_by_job)

    def read(self) -> float | None:
        """Returns the job's end. Reads `squeue.json` if it has changed. While the file cannot be read, returns the last
        known end."""
        if self._job_id is None:
            return None
        try:
            ends = self._queue.read() or {}
        except OSError:
            return self._ends_at
        found = ends.get(self._job_id)
        if found is not None and (self._ends_at is None or abs(found - self._ends_at) >= MIN_CHANGE_S):
            self._ends_at = found
        return self._ends_at


def _ends_by_job(content: Mapping[str, Any]) -> dict[str, float]:
    jobs = content.get("jobs")
    if not isinstance(jobs, dict):
        return {}
    ends = {job_id: _number(job.get("ends_at")) for job_id, job in jobs.items() if isinstance(job, dict)}
    return {job_id: end for job_id, end in ends.items() if end is not None}


def _number(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
