"""Finds the router of a run and proves its identity before the owner's token is sent to it.

The record of a killed router stays in the registry, and another process may have got its port. So the router's job must
be live, and the process must prove that it is the router in the record. Every verb checks both again.
"""

from dataclasses import dataclass

from hpc_router.client.router_identity import IdentityCheck, check_identity
from hpc_router.client.router_source import EndpointFolder, SharedSource
from hpc_router.cluster.control_loop.desired_state import readable_deployment
from hpc_router.cluster.launchers.interface import JobState
from hpc_router.cluster.launchers.select import launcher_for
from hpc_router.errors import LaunchError
from hpc_router.state.registry import Record, RecordKind, RegistryReader, leading_router
from hpc_router.state.run_directory import RunDir
from hpc_router.state.share_dir import ShareDir


@dataclass(frozen=True, slots=True)
class RouterAccess:
    """The record of a router whose identity is proven, and the token for it: the owner's, or with a share folder that
    of this user."""

    record: Record
    token: str

    @property
    def url(self) -> str:
        return self.record.url

    @property
    def certificate(self) -> str | None:
        """The only certificate that the router may have, in PEM; None if it serves HTTP."""
        return self.record.certificate

    @property
    def replica(self) -> str:
        return self.record.replica


def live_router(run: RunDir) -> Record | None:
    """Returns the leading router among those whose job may be live; None if there is none."""
    records = {name: r for name, r in RegistryReader(run.registry).snapshot().items() if r.kind is RecordKind.ROUTER}
    reports = launcher_for(run, readable_deployment(run)).observe(records)
    return leading_router({name: r for name, r in records.items() if reports[name].state in _MAY_LIVE})


_MAY_LIVE = (JobState.RUNNING, JobState.UNKNOWN)


def router_access(folder: EndpointFolder) -> RouterAccess:
    """Returns access to the router of a run directory or a share folder after it has proven its identity. Raises
    LaunchError if no router serves, or if the process at its address does not prove that it is the router."""
    return prove_identity(folder, recorded_router(folder)) if isinstance(folder, RunDir) else _shared_access(folder)


def _shared_access(share: ShareDir) -> RouterAccess:
    source = SharedSource(share)
    record, token = source.find(recheck=True), source.token()
    if record is None:
        raise LaunchError(str(source.no_router_error()))
    check = source.check(record, token)
    if check is not IdentityCheck.PROVEN:
        raise LaunchError(f"{record.replica} at {record.url}: {check}; ask the deployment's owner")
    return RouterAccess(record, token)


def recorded_router(run: RunDir) -> Record:
    """Returns the record of the run's router without a proof of its identity. Raises LaunchError if no router
    serves."""
    record = live_router(run)
    if record is None:
        raise LaunchError(f"no router serves {run.path}; `hpc-router up --run {run.path}` starts one")
    return record


def prove_identity(run: RunDir, record: Record) -> RouterAccess:
    """Returns access to the router in `record` after it has proven its identity. Raises LaunchError if its address does
    not answer or another process answers there."""
    check = check_identity(record, run.secret())
    if check is not IdentityCheck.PROVEN:
        raise LaunchError(f"{record.replica} at {record.url}: {check}; `hpc-router status --run {run.path}` shows more")
    return RouterAccess(record, run.token())
