"""Submits jobs through submitit, in a process of its own: `python -m hpc_router.cluster.launchers.submitit.process`.

Reads the submissions as JSON from stdin, and writes one JSON line with the result of each job to stdout. The caller
starts this process in a new session, so that Ctrl-C in a terminal reaches no job. This process writes a job's
`job.json` right after its submission, so that the run knows every job even if the caller dies.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import submitit

import hpc_router
from hpc_router.cluster.launchers import job_entry
from hpc_router.cluster.launchers.commands import SlurmCommandError, run_slurm_command
from hpc_router.cluster.launchers.submitit.submission import CANCELLED, Submission, from_json
from hpc_router.state.job_records import JobDir, Runner, Submitter, start_ticks

SCANCEL_TIMEOUT_S: Final = 60.0
A_YEAR_MIN: Final = 60 * 24 * 365
"""Timeout of local jobs in minutes. submitit's local executor kills a job after two minutes by default."""


@dataclass(frozen=True, slots=True)
class SubmissionResult:
    """The result of one submission. `job_id`: None if the job was not submitted; `error` then says why."""

    replicas: list[str]
    job_id: str | None = None
    error: str | None = None


def submit(submission: Submission) -> SubmissionResult:
    """Submits one job and returns the result. For a job on this machine, the job's id is the process id of submitit's
    controller."""
    replicas = list(submission.argv_of)
    if all((stop := job.stop()) is not None and stop.cancel_at is not None for job in submission.jobs):
        return SubmissionResult(replicas, error=CANCELLED)
    try:
        executor = _executor(submission)
        job_id = executor.submit(job_entry.start, submission.run, submission.argv_of, hpc_router.__version__).job_id
    except subprocess.CalledProcessError as error:
        return SubmissionResult(replicas, error=(error.stderr or error.stdout or str(error)).strip())
    except submitit.core.utils.FailedJobError as error:
        return SubmissionResult(replicas, error=str(error))
    except Exception as error:  # noqa: BLE001 - submitit raises many kinds; the caller gets the text
        return SubmissionResult(replicas, error=f"{type(error).__name__}: {error}")
    try:
        _write_info(submission, job_id)
    except OSError as error:  # without a record nothing would ever end this job
        if submission.script is not None:
            with suppress(SlurmCommandError):
                run_slurm_command(["scancel", job_id], timeout_s=SCANCEL_TIMEOUT_S)
        return SubmissionResult(replicas, error=f"{error.strerror}: its job {job_id} was cancelled")
    return SubmissionResult(replicas, job_id=job_id)


def write_submitter(submission: Submission, ticks: int) -> None:
    """Records this process, started at `ticks`, as the submitter of each replica. If it dies after a submission, the
    control loop makes `job.json` from this record."""
    for job in submission.jobs:
        job.write(_submitter(submission, job, ticks))


def _submitter(submission: Submission, job: JobDir, ticks: int) -> Submitter:
    return Submitter(
        os.getpid(),
        ticks,
        socket.gethostname(),
        replicas=tuple(submission.argv_of),
        argv=tuple(submission.argv_of[job.replica]),
        after=submission.after,
        revision=submission.revisions.get(job.replica),
        dependency=submission.dependency,
    )


def _write_info(submission: Submission, job_id: str) -> None:
    local = submission.script is None
    runner = Runner.PROCESS if local else Runner.SLURM
    ticks = start_ticks(int(job_id)) if local else None
    for job in submission.jobs:
        planned = _submitter(submission, job, 0)
        job.write(planned.job_info(job_id, start_ticks=ticks, gpus=submission.gpus, runner=runner))


class _BatchExecutor(submitit.SlurmExecutor):
    """submitit's Slurm executor, which submits this package's batch script instead of submitit's."""

    def __init__(self, folder: Path, script: str) -> None:
        super().__init__(folder)
        self._script = script

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._script


def _executor(submission: Submission) -> Any:
    folder = submission.jobs[0].path
    if submission.script is not None:
        return _BatchExecutor(folder, submission.script)
    executor = submitit.LocalExecutor(folder)
    executor.update_parameters(
        timeout_min=A_YEAR_MIN, gpus_per_node=len(submission.gpus), visible_gpus=list(submission.gpus)
    )
    return executor


def main() -> int:
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    text = sys.stdin.read()
    for stream in (0, 1, 2):  # submitit's controllers outlive this process and its caller: they must not hold its pipes
        os.dup2(null, stream)
    submissions = from_json(text)
    for submission in submissions:
        write_submitter(submission, start_ticks(os.getpid()) or 0)
    with results:
        for submission in submissions:  # flushed one by one: a caller whose wait times out knows which were submitted
            results.write(json.dumps(asdict(submit(submission))) + "\n")
            results.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
