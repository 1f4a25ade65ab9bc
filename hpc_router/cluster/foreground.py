"""Claims for what a person starts by hand, in the foreground: the next generation of the router, a slot of an expert.

The process that claims is the job itself. The control loop leaves such experts alone (`h0`), and counts such a router.
"""

import itertools
import os
import socket
import sys

from hpc_router.cluster.control import Control
from hpc_router.cluster.slots import ROUTER_SLOT, Observed, Slot
from hpc_router.config import Deployment
from hpc_router.jobdir import JobDir, JobInfo, start_ticks
from hpc_router.rundir import RunDir


def claim_router(run: RunDir) -> str:
    """The next generation: of several routers the newest leads."""
    generations = [attempt.generation for attempt in _observed(run).get(ROUTER_SLOT, ())]
    for generation in itertools.count(max(generations, default=0) + 1):
        if _claim(run, ROUTER_SLOT.replica(generation)):
            return ROUTER_SLOT.replica(generation)
    raise AssertionError("unreachable: there is always a next generation")


def claim_expert(run: RunDir, expert: str) -> str:
    """The first slot `h0`, `h1`, ... in which nothing lives."""
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


def _observed(run: RunDir) -> Observed:
    return Control(run, deployment=Deployment()).look().observed


def _claim(run: RunDir, replica: str) -> bool:
    job = JobDir(run, replica)
    if not job.claim():
        return False
    pid = os.getpid()
    job.write(JobInfo(str(pid), socket.gethostname(), start_ticks(pid), argv=tuple(sys.argv)))
    return True
