"""Gives the share folder (`router.share_dir`) to a run, unless the router of another run serves through it.

The router itself never takes a folder from another run, because it may be a router that should have ended.
"""

import os
from pathlib import Path

from hpc_router.client.router_identity import IdentityCheck, check_identity
from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.state.registry import RegistryReader, leading_router
from hpc_router.state.run_directory import RunDir
from hpc_router.state.share_dir import DIR_KEY, ShareDir, SharedRouter, make_share, sharing_run, write_router


def other_user(path: Path, run: Path) -> Path | None:
    """Returns the run directory, other than `run`, whose router serves through the share folder `path`; None if there
    is none. Raises OSError."""
    other = sharing_run(ShareDir(path, os.getuid()))
    return other if other is not None and other != run.resolve() and _serves(RunDir(other)) else None


def claim_share(run: RunDir, deployment: Deployment) -> None:
    """Creates the share folder, if the config has one, and makes it that of `run`. Raises ConfigError if it cannot be
    used, LaunchError if the router of another run serves through it, and OSError."""
    router = deployment.router
    if router.share_dir is None or router.share_group is None:
        return
    share = make_share(Path(router.share_dir), router.share_group)
    if (other := other_user(share.path, run.path)) is not None:
        raise LaunchError(f"{DIR_KEY}={share.path}: the router of {other} serves through it (valid: another folder)")
    if sharing_run(share) != run.path.resolve():
        content = SharedRouter(str(run.path.resolve()), router.max_body_mb, None)
        write_router(share, content, group=router.share_group)


def _serves(run: RunDir) -> bool:
    """Returns whether a router of this run answers and proves that it is one."""
    try:
        record = leading_router(RegistryReader(run.registry).snapshot())
        return record is not None and check_identity(record, run.secret()) is IdentityCheck.PROVEN
    except (OSError, ConfigError):
        return False
