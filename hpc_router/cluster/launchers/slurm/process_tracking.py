"""Finds out which processes of a job receive the job's signals, from Slurm's configuration.

Slurm sends a step's signals to the processes that its process-tracking plugin finds. `proctrack/linuxproc` finds every
descendant of the step, including the engine; `proctrack/cgroup` and `proctrack/pgid` signal the agent alone.
"""

from typing import Final

from hpc_router.cluster.launchers.commands import SlurmCommandError
from hpc_router.cluster.launchers.slurm.site_config import ask_config

SIGNALS_DESCENDANTS: Final = "proctrack/linuxproc"


def process_tracking() -> str | None:
    """Returns Slurm's `ProctrackType`; None if it cannot be read."""
    try:
        return ask_config().get("ProctrackType")
    except SlurmCommandError:
        return None


def signals_note(tracking: str | None = None) -> str | None:
    """Returns a warning if a job's SIGTERM reaches the engine as well as its agent, else None. `tracking`: Slurm's
    `ProctrackType`; None: Slurm is asked."""
    if (tracking or process_tracking()) != SIGNALS_DESCENDANTS:
        return None
    return (
        f"this Slurm ({SIGNALS_DESCENDANTS}) sends a job's SIGTERM to the engine too: `scancel` and preemption may cut "
        "answers in flight, which clients see as errors; `hpc-router drain` and the end of the walltime do not"
    )
