"""What a process of ours hands on of the environment it was started in."""

import os
from collections.abc import Mapping
from typing import Final

FOREIGN: Final = ("SUBMITIT_", "SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SQUEUE_", "SCANCEL_", "SINFO_")
"""Another job's, or options of Slurm's commands that somebody set for their own use: a leaked SLURM_CPU_BIND puts every
process of a nested job on one core."""
KEPT: Final = frozenset({"SLURM_CONF"})
"""Where the cluster is, which is everybody's."""


JOB_ID: Final = "HPC_ROUTER_JOB_ID"
"""Under this name a job's services know the Slurm job that they run in."""


def held_job(environment: Mapping[str, str] = os.environ) -> str | None:
    """The Slurm job that this process runs in."""
    return environment.get(JOB_ID) or environment.get("SLURM_JOB_ID")


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if k in KEPT or not k.startswith(FOREIGN)}
