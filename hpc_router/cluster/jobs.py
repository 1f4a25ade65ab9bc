"""Submission through submitit, in a process of its own: `python -m hpc_router.cluster.jobs`.

Requests come as JSON on stdin, results go as JSON to stdout. The caller starts it in a new session, so that Ctrl-C in
a terminal reaches no job, and several jobs share the cost of loading submitit, which nothing else imports. Each
`job.json` is written here, right after its submission: a caller that dies in between leaves no unknown job behind.
"""

import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import submitit

import hpc_router
from hpc_router.cluster import body
from hpc_router.jobdir import JobDir, JobInfo, start_ticks
from hpc_router.rundir import RunDir

A_YEAR_MIN: Final = 60 * 24 * 365
"""submitit's local default is two minutes, after which it kills the service."""


@dataclass(frozen=True, slots=True)
class Submission:
    """One claimed job with what was chosen for it."""

    run: str
    replica: str
    argv: tuple[str, ...]
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Submitted:
    """`error` is None for a job that was submitted."""

    replica: str
    job_id: str | None = None
    error: str | None = None


def batch_to_json(submissions: Sequence[Submission]) -> str:
    return json.dumps([asdict(s) for s in submissions])


def batch_from_json(text: str) -> list[Submission]:
    return [Submission(s["run"], s["replica"], tuple(s["argv"]), tuple(s["gpus"])) for s in json.loads(text)]


def submit_local(submission: Submission) -> Submitted:
    """Start one job on this machine. The job id is the process id of submitit's controller."""
    job = JobDir(RunDir(Path(submission.run)), submission.replica)
    try:
        executor = submitit.LocalExecutor(job.path)
        executor.update_parameters(
            timeout_min=A_YEAR_MIN, gpus_per_node=len(submission.gpus), visible_gpus=list(submission.gpus)
        )
        started = executor.submit(
            body.start, submission.run, submission.replica, list(submission.argv), hpc_router.__version__
        )
    except Exception as error:  # noqa: BLE001 - submitit raises what it likes; the caller gets it as text
        return Submitted(submission.replica, error=f"{type(error).__name__}: {error}")
    job.write(
        JobInfo(
            job_id=started.job_id,
            host=socket.gethostname(),
            start_ticks=start_ticks(int(started.job_id)),
            gpus=submission.gpus,
            argv=submission.argv,
        )
    )
    return Submitted(submission.replica, job_id=started.job_id)


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    text = sys.stdin.read()
    for stream in (0, 1, 2):  # controllers outlive us and our caller: they must hold none of its pipes
        os.dup2(nothing, stream)
    with answers:
        json.dump([asdict(submit_local(s)) for s in batch_from_json(text)], answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
