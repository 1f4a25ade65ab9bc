"""What a process gets from its Slurm job: the environment variables that Slurm sets, among them the id of the job, and
the signals that announce the job's end. Also says which variables a process or job that it starts must not inherit."""

import os
import signal
from collections.abc import Mapping
from typing import Final

JOB_PREFIXES: Final = ("SUBMITIT_", "SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SQUEUE_", "SCANCEL_", "SINFO_")
"""Prefixes of variables that are not passed on, because they belong to another job or set options of Slurm's commands.
With an inherited SLURM_CPU_BIND, for example, every process of a nested job would run on one core."""
KEPT: Final = frozenset({"SLURM_CONF"})
"""Variables with such a prefix that are passed on: SLURM_CONF names the cluster's configuration file."""
JOB_ID: Final = "HPC_ROUTER_JOB_ID"
"""Variable with the id of the Slurm job that a service runs in."""
JOB_END: Final = "HPC_ROUTER_JOB_END"
"""Variable with the end of that job in Unix seconds, as Slurm set it when the job's step started."""
WARNING_SIGNALS: Final = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals with which Slurm announces the end of the walltime. Our jobs ask for SIGUSR2; a job of the user, in which
`cluster=allocation` runs its steps, often asks for SIGUSR1."""

END_SIGNALS: Final = (signal.SIGALRM, signal.SIGQUIT)
"""Further signals that a user may send to a job with `scancel --signal` or `--signal`, and that end a process without
a record unless it handles them. SIGHUP is another one; to the router, it means that it reads its settings again."""


def current_job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns the id of the Slurm job that this process runs in; None if it runs in no job."""
    return environment.get(JOB_ID) or environment.get("SLURM_JOB_ID")


def without_job_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns `environment` without the variables that Slurm sets for a job or that set options of Slurm's commands."""
    return {k: v for k, v in environment.items() if k in KEPT or not k.startswith(JOB_PREFIXES)}
