"""Finds out which processes of a job receive the job's signals, from Slurm's configuration.

Slurm sends a step's signals to the processes that its process-tracking plugin finds. `proctrack/linuxproc` finds every
descendant of the step, also the engine; `proctrack/cgroup` and `proctrack/pgid` signal the agent alone.
"""

import re
from typing import Final

from hpc_router.cluster.launchers.commands import SlurmCommandError, run_slurm_command

TIMEOUT_S: Final = 30.0
SIGNALS_DESCENDANTS: Final = "proctrack/linuxproc"


def process_tracking() -> str | None:
    """Returns Slurm's `ProctrackType`; None if it cannot be read."""
    try:
        config = run_slurm_command(["scontrol", "show", "config"], timeout_s=TIMEOUT_S)
    except SlurmCommandError:
        return None
    found = re.search(r"^ProctrackType\s*=\s*(\S+)", config, re.MULTILINE)
    return found[1] if found else None


def signals_note() -> str | None:
    """Returns a warning if a job's SIGTERM reaches the engine as well as its agent; else None."""
    if process_tracking() != SIGNALS_DESCENDANTS:
        return None
    return (
        f"this Slurm ({SIGNALS_DESCENDANTS}) sends a job's SIGTERM to the engine too: `scancel` and preemption may cut "
        "answers in flight, which clients see as errors; `hpc-router drain` and the end of the walltime do not"
    )
