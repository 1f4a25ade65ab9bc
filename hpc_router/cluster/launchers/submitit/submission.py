"""The caller's side of submission: hands claimed jobs to a process that runs `submitit.process`, and records the
refusals.

submitit takes half a second to import, so only that process imports it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from hpc_router.cluster.launchers.commands import last_error_line
from hpc_router.errors import LaunchError
from hpc_router.net.job_environment import JOB_ID, current_job_id, without_job_variables
from hpc_router.state.job_records import Exit, FailureReason, JobDir
from hpc_router.state.run_directory import RunDir, private_umask

TIMEOUT_S: Final = 60.0
"""Time limit in seconds for the batch, and as much again for each job in it, because a busy Slurm controller answers
slowly."""
CANCELLED: Final = "it was asked to end before it was submitted"
_PROCESS_FAILED: Final = "the submitting process failed"


@dataclass(frozen=True, slots=True)
class Submission:
    """Claimed replicas that share one job. `script`: the batch script for Slurm; None for a job of this machine.
    `after`: id of the job for whose end the submitted job waits. `revisions`: the config revision of each replica.
    `dependency`: as in JobInfo."""

    run: str
    argv_of: Mapping[str, Sequence[str]]
    script: str | None = None
    gpus: tuple[int, ...] = ()
    after: str | None = None
    revisions: Mapping[str, str | None] = field(default_factory=dict)
    dependency: str | None = None

    @property
    def jobs(self) -> list[JobDir]:
        return [JobDir(RunDir(Path(self.run)), replica) for replica in self.argv_of]


def to_json(submissions: Sequence[Submission]) -> str:
    return json.dumps([asdict(s) for s in submissions])


def from_json(text: str) -> list[Submission]:
    return [Submission(**{**s, "gpus": tuple(s["gpus"])}) for s in json.loads(text)]


def task_command(python: str, folder: Path) -> tuple[str, ...]:
    """Returns the command of each task of a submitted job. The command makes submitit load the pickle in `folder` and
    call `job_entry.start`."""
    return (python, "-u", "-m", "submitit.core._submit", str(folder))


def submit_all(submissions: Sequence[Submission]) -> dict[str, str | None]:
    """Submits all jobs. Returns the error of each replica; None if the replica's job was submitted."""
    replicas = [replica for submission in submissions for replica in submission.argv_of]
    held = current_job_id()
    environment = {**without_job_variables(os.environ), **({JOB_ID: held} if held is not None else {})}
    try:
        with private_umask():
            output = _run_submitter(
                to_json(submissions), environment=environment, timeout_s=TIMEOUT_S * (1 + len(submissions))
            )
        default = f"{_PROCESS_FAILED}: it reported nothing about this job"
    except (OSError, subprocess.SubprocessError) as error:
        output, default = getattr(error, "stdout", None) or b"", f"{_PROCESS_FAILED}: {last_error_line(error)}"
    return {**dict.fromkeys(replicas, default), **_results(output)}


def _run_submitter(text: str, *, environment: Mapping[str, str], timeout_s: float) -> bytes:
    """Runs the submitting process with `text` as its stdin, and returns its stdout. After Ctrl-C it leaves the process
    running, which finishes its current job and ends when it cannot write the result to the closed pipe.
    `subprocess.run` would kill it, perhaps between a submission and its record. Raises OSError and SubprocessError."""
    argv = [sys.executable, "-m", "hpc_router.cluster.launchers.submitit.process"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        argv, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=True
    ) as submitter:
        try:
            output, errors = submitter.communicate(text.encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            submitter.kill()
            error.stdout, error.stderr = submitter.communicate()
            raise
    if submitter.returncode:
        raise subprocess.CalledProcessError(submitter.returncode, argv, output, errors)
    return output


def _results(output: bytes) -> dict[str, str | None]:
    """Returns the error of each replica, None if its job was submitted. `output`: one JSON line per job; an incomplete
    last line, which a stopped process leaves, is ignored."""
    results: dict[str, str | None] = {}
    for line in output.splitlines():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        results |= dict.fromkeys(result["replicas"], result["error"])
    return results


def record_refusals(
    run: RunDir, errors: Mapping[str, str | None], exit_for: Callable[[str, str], Exit] | None = None
) -> None:
    """Writes an exit record for each replica whose job was not submitted, and then raises LaunchError. Jobs that were
    cancelled before their submission get a record, but no error is raised for them.

    `errors`: error by replica, None if its job was submitted. `exit_for(replica, error)` makes the record of a job that
    Slurm refused; without it the job counts as crashed.
    """
    refused: dict[str, Exit] = {}
    for replica, error in errors.items():
        job = JobDir(run, replica)
        if error is None or job.info() is not None:  # submitted, even if the process failed afterwards
            continue
        if error == CANCELLED:
            job.write(Exit(ok=True, reason=FailureReason.DRAINED, message=CANCELLED))
            continue
        if error.startswith(_PROCESS_FAILED):
            end = Exit(ok=False, reason=FailureReason.UNANSWERED, message=error)
        elif exit_for is not None:
            end = exit_for(replica, error)
        else:
            end = Exit(ok=False, reason=FailureReason.CRASHED, message=error)
        refused[replica] = end
        job.write(end)
    if refused:
        each = "; ".join(f"{replica}: {end.message}" for replica, end in refused.items())
        raise LaunchError(f"cannot be submitted: {each}")
