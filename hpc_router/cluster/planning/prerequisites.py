"""Checks of folders, software and Slurm that jobs need. `plan`, `up` and `doctor` use the same list of checks.

`plan` and `up` run the checks on the login node before they submit jobs. `doctor` runs them there and in a job on a
node. The faults of the checks in BLOCKING end `plan` and `up`; those of other checks become warnings.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from hpc_router.cluster.planning.finding import CheckResult, Finding, fault, note, ok
from hpc_router.cluster.planning.host_checks import home, hub_cache, proxies
from hpc_router.cluster.planning.share_claim import other_user
from hpc_router.cluster.planning.slurm_checks import slurm
from hpc_router.cluster.planning.software_checks import software_faults
from hpc_router.config.schema import ClusterConfig, Deployment
from hpc_router.config.slurm_options import check_run_path
from hpc_router.errors import ConfigError
from hpc_router.expert.engine_process.scratch_dir import expanded, path_error, usage_error
from hpc_router.expert.staging.folder_lock import FolderLock
from hpc_router.state.run_directory import place_error
from hpc_router.state.share_dir import DIR_KEY, check_share

MOUNTS: Final = Path("/proc/self/mountinfo")
_LOCAL_FILE_SYSTEMS: Final = frozenset({"tmpfs", "ramfs", "overlay", "squashfs", "devtmpfs"})


@dataclass(frozen=True, slots=True)
class CheckedHost:
    """The host on which this process runs the checks. `runs`: the run directory; for a new run, the folder of all runs.
    `on_node`: whether this process runs in a Slurm job."""

    deployment: Deployment
    runs: Path
    on_node: bool = False

    @property
    def cluster(self) -> ClusterConfig:
        return self.deployment.cluster

    @property
    def runs_jobs(self) -> bool:
        """Returns whether jobs run on this host."""
        return self.on_node or self.cluster.kind == "local"


Check = Callable[[CheckedHost], CheckResult]


def prerequisites(host: CheckedHost, *, ask: bool) -> CheckResult:
    """Runs all checks for `plan` and returns their findings. `ask`: whether to include the checks that start programs
    or write files."""
    found: list[Finding] = []
    for name, check in CHECKS.items():
        if ask or name not in PROGRAM_CHECKS:
            result = check(host)
            found += result.findings if name in BLOCKING else [note(warning) for warning in _all_texts(result)]
    return CheckResult(found)


def _all_texts(result: CheckResult) -> list[str]:
    return [*result.faults, *result.warnings]


def scratch(host: CheckedHost) -> CheckResult:
    """Checks the folder `cluster.scratch`, which is on the nodes. A host that runs no jobs can check only the length of
    its path."""

    def found(folder: Path, *, here: bool) -> str | None:
        return path_error(folder) or (usage_error(folder) if here else None)

    return _folder_of_nodes(host, "cluster.scratch", host.cluster.scratch, found)


def staging(host: CheckedHost) -> CheckResult:
    """Checks the folder `cluster.stage_to`, which the first job on a node creates."""

    def found(folder: Path, *, here: bool) -> str | None:
        if not folder.is_absolute():
            return "not an absolute path (valid: such as /local)"
        if here and not folder.parent.is_dir():
            return f"no such folder: {folder.parent}"
        if here and (error := flock_error(folder.parent)) is not None:
            return f"flock does not work there, which protects copies in use: {error} (valid: a disk of the node)"
        return None

    if host.cluster.stage_to is None:
        return CheckResult()
    return _folder_of_nodes(host, "cluster.stage_to", host.cluster.stage_to, found)


def _folder_of_nodes(host: CheckedHost, key: str, value: str, found: Callable[..., str | None]) -> CheckResult:
    """Checks the folder `value` on the nodes, which the config key `key` sets. `found(folder, here=...)` returns why
    the folder cannot be used, or None; its argument `here` says whether jobs run on this host."""
    if not host.runs_jobs and "$" in value:
        return CheckResult()
    try:
        problem = found(expanded(value, {**os.environ, **host.cluster.env}, key=key), here=host.runs_jobs)
    except ConfigError as error:
        return CheckResult([fault(str(error), key=key)])
    return CheckResult([fault(f"{key}={value}: {problem}", key=key) if problem is not None else ok(f"{key}={value}")])


def sharing(host: CheckedHost) -> CheckResult:
    """Checks that the owner can share the router through the folder `router.share_dir`, and that no other run uses
    it."""
    router = host.deployment.router
    if router.share_dir is None or router.share_group is None:
        return CheckResult()
    path = Path(router.share_dir)
    try:
        warnings = check_share(path, router.share_group)
        user = other_user(path, host.runs)
    except ConfigError as error:
        return CheckResult([fault(str(error), key=error.key)])
    except OSError as error:
        return CheckResult([fault(f"{DIR_KEY}={path}: {error.strerror}: {error.filename}", key=DIR_KEY)])
    if user is not None:
        fix = f"`hpc-router down --run {user}`, or another folder"
        return CheckResult([fault(f"{DIR_KEY}={path}: the router of {user} serves through it", fix, DIR_KEY)])
    return CheckResult([note(warning, key=DIR_KEY) for warning in warnings] or [ok(f"{DIR_KEY}={path}")])


def run_directory(host: CheckedHost) -> CheckResult:
    """Checks that the run directory can be created, that Slurm can name log files in it, and that nodes can see it. A
    directory on a local file system is only a warning, because a cluster may be one host. The first job then shows
    whether its node sees the directory (FailureReason.RUN_UNSEEN)."""
    runs, kind = host.runs.absolute(), host.cluster.kind
    try:
        check_run_path(runs, kind)
    except ConfigError as error:
        return CheckResult([fault(str(error), key="runs")])
    if not host.on_node and (problem := place_error(runs)) is not None:
        return CheckResult([fault(f"runs={runs}: {problem}", key="runs")])
    of = file_system(runs)
    if kind == "local" or of not in _LOCAL_FILE_SYSTEMS:
        return CheckResult([ok(f"{runs} is on {of or 'an unknown file system'}")])
    what = f"the run directory would be in {runs}, a {of} of this host: nodes may not see it"
    return CheckResult([note(what, "`runs=DIR` or `--run DIR` names a folder of the shared file system", "runs")])


def flock_error(folder: Path) -> str | None:
    """Returns why `flock` fails in this folder; None if it works."""
    try:
        lock = FolderLock.take(folder, shared=True)
    except OSError as error:
        return error.strerror
    if lock is not None:
        lock.release()
    return None


def file_system(path: Path) -> str | None:
    """Returns the type of the file system at `path`, which need not exist; None if the type is not known."""
    best: tuple[int, str] | None = None
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return None
    for line in lines:
        about, _, rest = line.partition(" - ")
        words = about.split(" ")
        if len(words) > 4 and path.is_relative_to(mount := Path(words[4].replace("\\040", " "))):
            depth = len(mount.parts)
            if best is None or depth >= best[0]:  # a later mount at the same path hides an earlier one
                best = (depth, rest.partition(" ")[0])
    return None if best is None else best[1]


def software(host: CheckedHost) -> CheckResult:
    """Checks that the modules and the container exist. In a job, checks only the container, because the job has loaded
    its modules."""
    cluster = replace(host.cluster, kind="local") if host.on_node else host.cluster
    faults, warnings = software_faults(cluster)
    of_faults = [fault(text, key=text.partition("=")[0]) for text in faults]
    return CheckResult([*of_faults, *(note(text, key=re.split("[=:]", text)[0]) for text in warnings)])


def slurm_settings(host: CheckedHost) -> CheckResult:
    """Checks Slurm's settings, except on a host that runs jobs: nodes have the settings of the login node."""
    return CheckResult() if host.runs_jobs else slurm(host.deployment)


CHECKS: Final[Mapping[str, Check]] = {
    "scratch": scratch,
    "staging": staging,
    "run directory": run_directory,
    "sharing": sharing,
    "software": software,
    "home": lambda host: home(),
    "proxies": lambda host: proxies(host.cluster, on_node=host.runs_jobs),
    "hub cache": lambda host: hub_cache(host.deployment),
    "Slurm": slurm_settings,
}
BLOCKING: Final = frozenset({"scratch", "staging", "run directory", "sharing", "software"})
"""Names of the checks whose faults end `plan` and `up`. The other checks concern a node or a service that this machine
knows only in part."""
PROGRAM_CHECKS: Final = frozenset({"software", "home", "Slurm"})
"""Names of the checks that start programs or write files."""
