"""Entry point of a job: checks the version, writes the process id, and replaces itself by the service.

submitit pickles `start` by reference, so it must stay a module-level function of this module. It ends in `execve`, so
that the agent or router runs without submitit's signal handlers (which bypass SIGTERM) and variables. The process id
stays the same, so `process.json` names the service even when submitit's controller was killed. A step of an allocation
is not started by submitit; it runs `python -m hpc_router.cluster.launchers.job_entry`.
"""

import argparse
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import hpc_router
from hpc_router.net.job_environment import JOB_END, JOB_ID, without_job_variables
from hpc_router.state.job_records import Exit, FailureReason, JobDir, Process, start_ticks
from hpc_router.state.run_directory import RunDir


def start(run: str, argv_of: Mapping[str, list[str]], version: str) -> None:
    """Replaces this process by the service; does not return. `argv_of`: the command of each replica in the job; the
    variable $HPC_ROUTER_REPLICA says which of them this task runs. `version`: version of the package that submitted the
    job. All arguments are plain text, so that every version can load a job's pickle."""
    replica = os.environ.get("HPC_ROUTER_REPLICA") or next(iter(argv_of))
    argv = argv_of[replica]
    job = JobDir(RunDir(Path(run)), replica)
    rank = int(os.environ.get("SLURM_PROCID", "0")) if "SLURM_STEP_ID" in os.environ else 0
    if version != hpc_router.__version__:
        message = f"submitted by hpc-router {version}, but the job's interpreter has {hpc_router.__version__}"
        job.write(Exit(ok=False, reason=FailureReason.INTERPRETER, message=message))
        raise SystemExit(message)
    stop = job.stop()
    if stop is not None and stop.cancel_at is not None:
        job.write(Exit(ok=True, reason=FailureReason.DRAINED, message="it was asked to end before it had started"))
        raise SystemExit(0)
    if rank == 0:
        ticks = start_ticks(os.getpid())
        assert ticks is not None
        job.write(Process(os.getpid(), ticks, socket.gethostname(), os.environ.get("SLURM_STEP_ID"), time.time()))
    os.umask(0o077)
    try:
        os.execve(argv[0], argv, _environment(rank))
    except OSError as error:
        job.write(Exit(ok=False, reason=FailureReason.INTERPRETER, message=f"cannot run {argv[0]}: {error.strerror}"))
        raise


def _environment(rank: int) -> dict[str, str]:
    """Returns the environment of the service. It has no Slurm variables, but the job's id and end, and `rank`, in
    variables of this package."""
    own = {"HPC_ROUTER_RANK": str(rank)}
    if "SLURM_JOB_ID" in os.environ:
        own[JOB_ID] = os.environ["SLURM_JOB_ID"]
    if "SLURM_JOB_END_TIME" in os.environ:
        own[JOB_END] = os.environ["SLURM_JOB_END_TIME"]
    return {**without_job_variables(os.environ), **own}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m hpc_router.cluster.launchers.job_entry", description=__doc__)
    for name in ("run", "replica", "version"):
        parser.add_argument(name)
    parser.add_argument("argv", nargs="+", help="the service's command line, after --")
    arguments = parser.parse_args()
    start(arguments.run, {arguments.replica: arguments.argv}, arguments.version)
