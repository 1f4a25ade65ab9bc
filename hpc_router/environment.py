"""What a process of ours hands on of the environment it was started in."""

from collections.abc import Mapping
from typing import Final

FOREIGN: Final = ("SUBMITIT_", "SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SQUEUE_", "SCANCEL_", "SINFO_")
"""Another job's, or options of Slurm's commands that somebody set for their own use: a leaked SLURM_CPU_BIND puts every
process of a nested job on one core."""
KEPT: Final = frozenset({"SLURM_CONF"})
"""Where the cluster is, which is everybody's."""


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if k in KEPT or not k.startswith(FOREIGN)}
