"""Submission through submitit, in a process of its own: `python -m hpc_router.cluster.launchers.submitit_process`.

Requests come as JSON on stdin, results go to stdout, one JSON line per job. The caller starts it in a new session, so
that Ctrl-C in a terminal reaches no job, and several jobs share the cost of loading submitit, which nothing else loads.
Each `job.json` is written here, right after its submission: a caller that dies in between leaves no unknown job behind.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import submitit

import hpc_router
from hpc_router.cluster.launchers import job_entry
from hpc_router.cluster.launchers.submit import ASKED
from hpc_router.state.job_records import JobDir, JobInfo, Runner, Submitter, start_ticks
from hpc_router.state.run_directory import RunDir

A_YEAR_MIN: Final = 60 * 24 * 365
"""submitit's local default is two minutes, after which it kills the service."""


@dataclass(frozen=True, slots=True)
class Submission:
    """Claimed replicas that share one job. `script`: the batch script that Slurm gets, None for this machine."""

    run: str
    argv_of: dict[str, list[str]]
    script: str | None = None
    gpus: tuple[int, ...] = ()

    @property
    def jobs(self) -> list[JobDir]:
        return [JobDir(RunDir(Path(self.run)), replica) for replica in self.argv_of]


@dataclass(frozen=True, slots=True)
class Submitted:
    """`error` is None for a job that was submitted."""

    replicas: list[str]
    job_id: str | None = None
    error: str | None = None


def to_json(submissions: Sequence[Submission]) -> str:
    return json.dumps([asdict(s) for s in submissions])


def from_json(text: str) -> list[Submission]:
    return [Submission(s["run"], s["argv_of"], s["script"], tuple(s["gpus"])) for s in json.loads(text)]


def submit(submission: Submission) -> Submitted:
    """One job. On this machine its id is the process id of submitit's controller."""
    replicas = list(submission.argv_of)
    if all((stop := job.stop()) is not None and stop.cancel_at is not None for job in submission.jobs):
        return Submitted(replicas, error=ASKED)
    try:
        executor = _executor(submission)
        job_id = executor.submit(job_entry.start, submission.run, submission.argv_of, hpc_router.__version__).job_id
    except subprocess.CalledProcessError as error:
        return Submitted(replicas, error=(error.stderr or error.stdout or str(error)).strip())
    except submitit.core.utils.FailedJobError as error:
        return Submitted(replicas, error=str(error))
    except Exception as error:  # noqa: BLE001 - submitit raises what it likes; the caller gets it as text
        return Submitted(replicas, error=f"{type(error).__name__}: {error}")
    try:
        _write_down(submission, job_id)
    except OSError as error:  # a job that nobody knows would run for ever
        if submission.script is not None:
            subprocess.run(["scancel", job_id], check=False)
        return Submitted(replicas, error=f"{error.strerror}: its job {job_id} was cancelled")
    return Submitted(replicas, job_id=job_id)


def _write_down(submission: Submission, job_id: str) -> None:
    here, local = socket.gethostname(), submission.script is None
    for job in submission.jobs:
        job.write(
            JobInfo(
                job_id=job_id,
                host=here,
                start_ticks=start_ticks(int(job_id)) if local else None,
                gpus=submission.gpus,
                argv=tuple(submission.argv_of[job.replica]),
                runner=Runner.PROCESS if local else Runner.SLURM,
                shared=len(submission.argv_of) > 1,
            )
        )


class _BatchExecutor(submitit.SlurmExecutor):
    """submitit's, with a batch script that `cluster.batch` wrote."""

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
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    text = sys.stdin.read()
    for stream in (0, 1, 2):  # controllers outlive us and our caller: they must hold none of its pipes
        os.dup2(nothing, stream)
    submissions = from_json(text)
    me = Submitter(os.getpid(), start_ticks(os.getpid()) or 0, socket.gethostname())
    for job in (job for submission in submissions for job in submission.jobs):
        job.write(me)
    with answers:
        for submission in submissions:  # a line for each, so that one who loses us knows how far we came
            answers.write(json.dumps(asdict(submit(submission))) + "\n")
            answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
