"""The first steps of a job, called by submitit inside it: check the version, leave our process id, become the service.

Pickled by reference, so it must stay a module-level function here. It ends in `execve`: what runs on is the agent or
the router alone, without submitit's signal handlers (they bypass SIGTERM) and without its variables. The process id
stays the same, so `process.json` names the service itself even when submitit's controller has been killed.
"""

import os
import socket
from pathlib import Path
from typing import Final

import hpc_router
from hpc_router.jobdir import Exit, JobDir, Process, Reason, start_ticks
from hpc_router.rundir import RunDir

SCRUBBED: Final = ("SUBMITIT_", "SLURM_", "SBATCH_", "SRUN_")
"""A nested submission or engine must not inherit these (a leaked SLURM_CPU_BIND puts all on one core)."""


def start(run: str, replica: str, argv: list[str], version: str) -> None:
    """Does not return. Arguments are plain text: nothing of ours is in the pickle that a version could break."""
    job = JobDir(RunDir(Path(run)), replica)
    if version != hpc_router.__version__:
        message = f"submitted by hpc-router {version}, but the job's interpreter has {hpc_router.__version__}"
        job.write(Exit(ok=False, reason=Reason.INTERPRETER, message=message))
        raise SystemExit(message)
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    job.write(Process(pid=os.getpid(), start_ticks=ticks, host=socket.gethostname()))
    os.umask(0o077)
    try:
        os.execve(argv[0], argv, scrubbed(dict(os.environ)))
    except OSError as error:
        job.write(Exit(ok=False, reason=Reason.INTERPRETER, message=f"cannot run {argv[0]}: {error.strerror}"))
        raise


def scrubbed(environment: dict[str, str]) -> dict[str, str]:
    """Without what belongs to another job."""
    return {key: value for key, value in environment.items() if not key.startswith(SCRUBBED)}
