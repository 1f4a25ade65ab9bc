"""The address of a run's router, for those who would send it the owner's token.

A record outlives a router that was killed, and its port may be a stranger's by now: only a router whose job may still
live is given the token.
"""

from dataclasses import dataclass

from hpc_router.cluster.launcher import JobState
from hpc_router.cluster.local import LocalLauncher
from hpc_router.errors import LaunchError
from hpc_router.registry import Kind, Reader, Record, leading_router
from hpc_router.rundir import RunDir


@dataclass(frozen=True, slots=True)
class RouterAccess:
    url: str
    token: str
    replica: str


def live_router(run: RunDir) -> Record | None:
    """The leading router among those not known to have ended."""
    records = {name: r for name, r in Reader(run.registry).snapshot().items() if r.kind is Kind.ROUTER}
    states = LocalLauncher(run).observe(records)
    return leading_router({name: r for name, r in records.items() if states[name] in _MAY_LIVE})


_MAY_LIVE = (JobState.RUNNING, JobState.UNKNOWN)


def router_access(run: RunDir) -> RouterAccess:
    """Raises LaunchError when no router serves."""
    record = live_router(run)
    if record is None:
        raise LaunchError(f"no router serves {run.path}; `hpc-router up --run {run.path}` starts one")
    return RouterAccess(record.url, run.token(), record.replica)
