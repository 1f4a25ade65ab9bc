"""The address of a run's router, for those who would send it the owner's token.

A record outlives a router that was killed, and its port may be a stranger's by now: only a router whose job may still
live, and that proves to be the one of its record, is given the token. Each call of a verb asks anew.
"""

from dataclasses import dataclass

from hpc_router.client.router_identity import IdentityCheck, examine
from hpc_router.cluster.control_loop.desired_state import deployment_of
from hpc_router.cluster.launchers.interface import JobState
from hpc_router.cluster.launchers.select import launcher_for
from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.state.registry import Reader, Record, RecordKind, leading_router
from hpc_router.state.run_directory import RunDir


@dataclass(frozen=True, slots=True)
class RouterAccess:
    record: Record
    token: str

    @property
    def url(self) -> str:
        return self.record.url

    @property
    def replica(self) -> str:
        return self.record.replica


def live_router(run: RunDir) -> Record | None:
    """The leading router among those not known to have ended."""
    try:
        deployment = deployment_of(run)
    except ConfigError:  # another version's, or damaged: its router may serve all the same
        deployment = Deployment()
    records = {name: r for name, r in Reader(run.registry).snapshot().items() if r.kind is RecordKind.ROUTER}
    reports = launcher_for(run, deployment).observe(records)
    return leading_router({name: r for name, r in records.items() if reports[name].state in _MAY_LIVE})


_MAY_LIVE = (JobState.RUNNING, JobState.UNKNOWN)


def router_access(run: RunDir) -> RouterAccess:
    """Raises LaunchError when no router serves, or something else answers at its address."""
    return prove_identity(run, recorded_router(run))


def recorded_router(run: RunDir) -> Record:
    """The router by its record alone. Raises LaunchError when there is none."""
    record = live_router(run)
    if record is None:
        raise LaunchError(f"no router serves {run.path}; `hpc-router up --run {run.path}` starts one")
    return record


def prove_identity(run: RunDir, record: Record) -> RouterAccess:
    """Raises LaunchError when nobody or something else answers there."""
    finding = examine(record, run.secret())
    if finding is not IdentityCheck.PROVEN:
        raise LaunchError(
            f"{record.replica} at {record.url}: {finding}; `hpc-router status --run {run.path}` shows more"
        )
    return RouterAccess(record, run.token())
