"""Claims a replica for a service that a user starts by hand: the next generation of the router, or a slot of an expert.

The claiming process becomes the service: a process of this host, or a step of the Slurm job in which the user called
`srun`. The control loop does not manage an expert that was started by hand (slots `h0`, `h1`, ...), but a router that
was started by hand counts as the run's router. For an expert on several nodes, the first task of the step claims the
replica, and the other tasks join it.
"""

import itertools
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from hpc_router.cluster.control_loop.loop import ControlLoop
from hpc_router.cluster.control_loop.slots import ROUTER_SLOT, Observed, Slot
from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.expert.job import RANK
from hpc_router.state.job_records import JobDir, JobInfo, Process, Runner, start_ticks
from hpc_router.state.registry import split_replica
from hpc_router.state.run_directory import RunDir

JOIN_S: Final = 120.0
"""Time limit in seconds for the first task of a step to claim a replica, while the other tasks wait."""
_POLL_S: Final = 0.2
_LARGEST_STEP: Final = 2**31
"""Maximum id of a step that `srun` starts. Larger ids are those of steps that Slurm starts itself: the batch script, an
interactive shell, adopted processes."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a Slurm job, and the task in it that is this process."""

    job_id: str
    step_id: str
    task: int
    tasks: int


def step_of(environment: Mapping[str, str]) -> Step | None:
    """Returns the step in which `srun` started this process; None if there is none."""
    job_id, step_id = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", "")
    if not (job_id and step_id.isdecimal() and int(step_id) < _LARGEST_STEP):
        return None
    task = environment.get(RANK) or environment.get("SLURM_PROCID", "0")
    return Step(job_id, step_id, int(task), int(environment.get("SLURM_STEP_NUM_TASKS", "1")))


def rank_of(step: Step | None, expert: str, *, nodes: int) -> int:
    """Returns the rank of this process among those of its replica. It is 0 for an expert on one node, because each task
    of a step is then a replica of its own.

    Raises ConfigError if the expert needs several `nodes` and `srun` did not start one task on each.
    """
    if nodes == 1:
        return 0
    tasks = 1 if step is None else step.tasks
    if tasks != nodes:
        key = f"experts.{expert}.resources.nodes"
        wanted = f"srun --nodes={nodes} --ntasks-per-node=1"
        raise ConfigError(
            f"{key}={nodes}: this step has {tasks} task(s) (valid: inside a Slurm job, {wanted})", key=key
        )
    return 0 if step is None else step.task


def claim_router(run: RunDir) -> str:
    """Claims the next generation of the router and returns its replica. If several routers run, the newest leads."""
    generations = [attempt.generation for attempt in _observed(run).get(ROUTER_SLOT, ())]
    for generation in itertools.count(max(generations, default=0) + 1):
        if _claim(run, ROUTER_SLOT.replica(generation)):
            return ROUTER_SLOT.replica(generation)
    raise AssertionError("unreachable: there is always a next generation")


def claim_expert(run: RunDir, expert: str) -> str:
    """Claims the first slot `h0`, `h1`, ... without a live job, and returns its replica."""
    observed = _observed(run)
    for number in itertools.count():
        slot = Slot(expert, f"h{number}")
        attempts = observed.get(slot, ())
        if any(attempt.live for attempt in attempts):
            continue
        replica = slot.replica(max((a.generation for a in attempts), default=0) + 1)
        if _claim(run, replica):
            return replica
    raise AssertionError("unreachable: there is always a next slot")


def join_expert(
    run: RunDir,
    expert: str,
    step: Step,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Waits until the first task of this step has claimed a replica, and returns the replica. Raises LaunchError if
    that takes longer than JOIN_S."""
    deadline = clock() + JOIN_S
    while (replica := _claimed(run, expert, step)) is None:
        if clock() >= deadline:
            raise LaunchError(f"the first task of step {step.job_id}.{step.step_id} claimed nothing in {JOIN_S:g} s")
        sleep(_POLL_S)
    return replica


def _claimed(run: RunDir, expert: str, step: Step) -> str | None:
    for folder in run.jobs.glob(f"{expert}-h*"):
        job = JobDir(run, folder.name)
        info, process = job.info(), job.process()
        if split_replica(folder.name)[0] != expert or info is None or process is None:
            continue
        if info.runner is Runner.STEP and (info.job_id, process.step_id) == (step.job_id, step.step_id):
            return folder.name
    return None


def _observed(run: RunDir) -> Observed:
    return ControlLoop(run, deployment=Deployment()).preview().observed


def _claim(run: RunDir, replica: str) -> bool:
    job = JobDir(run, replica)
    if not job.claim():
        return False
    pid, host, argv = os.getpid(), socket.gethostname(), tuple(sys.argv)
    ticks, step = start_ticks(pid), step_of(os.environ)
    if step is None:
        job.write(JobInfo(str(pid), host, ticks, argv=argv))
        return True
    assert ticks is not None
    job.write(JobInfo(step.job_id, host, argv=argv, runner=Runner.STEP, shared=True))
    job.write(Process(pid=pid, start_ticks=ticks, host=host, step_id=step.step_id))
    return True
