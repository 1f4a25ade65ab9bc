"""Checks folders and software that jobs need, before anything is submitted.

A check returns faults, which end `plan` and `up`, and warnings, if only a node can show the fault. Checks examine this
machine; on cluster=local the jobs run here.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hpc_router.cluster.planning.software_checks import software_faults
from hpc_router.config.schema import ClusterConfig
from hpc_router.config.slurm_options import check_run_path
from hpc_router.errors import ConfigError
from hpc_router.expert.engine_process.scratch_dir import expanded, path_error, usage_error

MOUNTS: Final = Path("/proc/self/mountinfo")
_LOCAL_FILE_SYSTEMS: Final = frozenset({"tmpfs", "ramfs", "overlay", "squashfs", "devtmpfs"})


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The faults and warnings of one check."""

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


Check = Callable[[ClusterConfig, Path], CheckResult]
"""A check. Its arguments are the cluster and the folder of the run; for a new run, the folder of all runs."""


def prerequisites(cluster: ClusterConfig, runs: Path, *, ask: bool) -> CheckResult:
    """Runs all checks and returns their faults and warnings. `ask`: also runs those that start programs."""
    results = [check(cluster, runs) for name, check in CHECKS.items() if ask or name not in PROGRAM_CHECKS]
    return CheckResult(
        [f for result in results for f in result.faults], [w for result in results for w in result.warnings]
    )


def scratch(cluster: ClusterConfig, _runs: Path) -> CheckResult:
    """Checks `cluster.scratch`, a folder of the nodes. On another machine than a node, only the length of its path is
    checked."""

    def fault(folder: Path, *, here: bool) -> str | None:
        return path_error(folder) or (usage_error(folder) if here else None)

    return _folder_of_nodes(cluster, "cluster.scratch", cluster.scratch, fault)


def staging(cluster: ClusterConfig, _runs: Path) -> CheckResult:
    """Checks `cluster.stage_to`, which the first job on a node creates."""

    def fault(folder: Path, *, here: bool) -> str | None:
        if not folder.is_absolute():
            return "not an absolute path (valid: such as /local)"
        return f"no such folder: {folder.parent}" if here and not folder.parent.is_dir() else None

    if cluster.stage_to is None:
        return CheckResult()
    return _folder_of_nodes(cluster, "cluster.stage_to", cluster.stage_to, fault)


def _folder_of_nodes(cluster: ClusterConfig, key: str, value: str, fault: Callable[..., str | None]) -> CheckResult:
    """Checks a folder of the nodes. `fault(folder, here=...)` returns why the folder cannot be used; `here`: jobs run
    on this machine."""
    here = cluster.kind == "local"
    if not here and "$" in value:
        return CheckResult()
    try:
        found = fault(expanded(value, {**os.environ, **cluster.env}, key=key), here=here)
    except ConfigError as error:
        return CheckResult([str(error)])
    return CheckResult([f"{key}={value}: {found}"] if found is not None else [])


def run_directory(cluster: ClusterConfig, runs: Path) -> CheckResult:
    """Checks that Slurm can name log files in the run directory, and that nodes may see it. A local file system is only
    a warning, because a cluster may be one host; the first job shows whether nodes see it
    (FailureReason.RUN_UNSEEN)."""
    try:
        check_run_path(runs.absolute(), cluster.kind)
    except ConfigError as error:
        return CheckResult([str(error)])
    kind = None if cluster.kind == "local" else file_system(runs.absolute())
    if kind not in _LOCAL_FILE_SYSTEMS:
        return CheckResult()
    what = f"the run directory would be in {runs.absolute()}, a {kind} of this host: nodes may not see it"
    return CheckResult(warnings=[f"{what} (`runs=DIR` or `--run DIR` names a folder of the shared file system)"])


def file_system(path: Path) -> str | None:
    """Returns the type of the file system of a path, which need not exist; None if it is not known."""
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
            if best is None or depth >= best[0]:  # a later mount at the same place covers an earlier one
                best = (depth, rest.partition(" ")[0])
    return None if best is None else best[1]


def software(cluster: ClusterConfig, _runs: Path) -> CheckResult:
    return CheckResult(*software_faults(cluster))


CHECKS: Final[Mapping[str, Check]] = {
    "scratch": scratch,
    "staging": staging,
    "run directory": run_directory,
    "software": software,
}
PROGRAM_CHECKS: Final = frozenset({"software"})
"""Names of the checks that start programs."""
