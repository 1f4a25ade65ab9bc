"""The Slurm job in which `up cluster=allocation` runs: its nodes, its end, and whether further steps can start in it.

A step that does not fit into the job waits for ever; Slurm 24.11 and later print no message about it. So `plan`
compares the replicas with the job's nodes. If `up` itself runs in a step, which may hold all resources, `plan` also
tries to start a step.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from hpc_router.cluster.launchers.commands import SlurmCommandError, run_slurm_command
from hpc_router.cluster.launchers.slurm.sbatch import BatchJob, option_words
from hpc_router.cluster.launchers.slurm.sinfo import NodeKind, parse_gres
from hpc_router.cluster.launchers.slurm.squeue import running_steps

TIMEOUT_S: Final = 30.0
WAIT_S: Final = 3
"""Seconds that a trial step waits for resources."""
MAX_STEP_ID: Final = 2**31
"""Larger ids are those of the batch script, the shell of salloc and the like, which hold no resources."""
_NODES: Final = re.compile(r"\bNodes=(\S+) CPU_IDs=(\S+) Mem=(\d+) GRES=(\S*)")
_END: Final = re.compile(r"\bEndTime=(\S+)")
_REFUSED: Final = re.compile(r"Unable to create step")


@dataclass(frozen=True, slots=True)
class HeldJob:
    """The Slurm job in which `up` runs. `kinds`: its nodes, grouped by their resources. `ends_at`: Unix seconds; None
    if it has no time limit."""

    kinds: tuple[NodeKind, ...]
    ends_at: float | None


def ask_held_job(job_id: str) -> HeldJob:
    """Returns the job with this id, as `scontrol` describes it. Raises SlurmCommandError."""
    argv = ["scontrol", "--details", "--oneliner", "show", "job", job_id]
    return parse_held_job(run_slurm_command(argv, timeout_s=TIMEOUT_S, environment={"SLURM_TIME_FORMAT": "standard"}))


def parse_held_job(text: str) -> HeldJob:
    kinds = tuple(
        NodeKind(
            nodes=count_hosts(hosts),
            cpus=_count_numbers(cpus),
            memory_mb=int(memory) or None,
            gpus=parse_gres(gres),
            features=frozenset(),
            state="alloc",
        )
        for hosts, cpus, memory, gres in _NODES.findall(text)
    )
    end = _END.search(text)
    try:
        ends_at = datetime.fromisoformat(end[1]).timestamp() if end is not None else None
    except ValueError:  # Unknown
        ends_at = None
    return HeldJob(kinds, ends_at)


def count_hosts(hosts: str) -> int:
    """Returns the number of hosts in a list: `n[1-3,7],m1` -> 5."""
    total = 0
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hosts):
        number = 1
        for ranges in re.findall(r"\[([^\]]*)\]", name):
            number *= _count_numbers(ranges)
        total += number
    return total


def _count_numbers(ranges: str) -> int:
    """Returns how many numbers are in a list of ranges: `1-3,7` -> 4."""
    total = 0
    for each in ranges.split(","):
        first, _, last = each.partition("-")
        total += int(last or first) - int(first) + 1
    return total


def current_step_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns the id of the srun step in which this process runs; None in a batch script or in the shell of salloc."""
    step = environment.get("SLURM_STEP_ID", "")
    return step if step.isdecimal() and int(step) < MAX_STEP_ID else None


def step_fault(jobs: Sequence[BatchJob]) -> str | None:
    """Returns a fault if a step for one of these jobs cannot start while this process's own step runs. Returns None if
    this process runs in no step, or if all those steps can start. Returns None without a test if further steps run in
    the job, because they may be the replicas. Raises SlurmCommandError."""
    step_id = current_step_id()
    if step_id is None or not jobs:
        return None
    job_id = jobs[0].jobid
    own = f"{job_id}.{step_id}"
    if any(step != own and step.rpartition(".")[2].isdecimal() for step in running_steps([str(job_id)])):
        return None
    tried: list[dict[str, object]] = []
    for job in jobs:
        request = job.requests[0]
        options = {k: v for k, v in job.step_options(request).items() if k not in ("output", "error", "open-mode")}
        if request.is_router or options in tried:
            continue
        tried.append(options)
        try:
            run_slurm_command(["srun", *option_words(options), f"--immediate={WAIT_S}", "true"], timeout_s=TIMEOUT_S)
        except SlurmCommandError as error:
            if error.output is not None and _REFUSED.search(error.output):
                return (
                    f"cluster.kind=allocation: no step for {request.replica} can start beside step {own}, in which "
                    "this command runs and which holds the job's resources: run it without srun (in the sbatch "
                    "script, or in the shell of salloc), or with `srun --overlap --mem=0`"
                )
    return None
