"""Checks of folders and software that jobs need, made before anything is submitted.

A check returns faults, which end `plan` and `up`, and warnings, where only a node can show a fault. Checks examine this
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
    """The result of one check."""

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


Check = Callable[[ClusterConfig, Path], CheckResult]
"""Called with the cluster and the folder of the run; for a new run, the folder of all runs."""


def prerequisites(cluster: ClusterConfig, runs: Path, *, ask: bool) -> CheckResult:
    """Run all checks. `ask`: also those that start programs."""
    results = [check(cluster, runs) for name, check in CHECKS.items() if ask or name not in PROGRAM_CHECKS]
    return CheckResult(
        [f for result in results for f in result.faults], [w for result in results for w in result.warnings]
    )


def scratch(cluster: ClusterConfig, _runs: Path) -> CheckResult:
    """Checks `cluster.scratch`. It is on the nodes, so from another machine only the length of its path is checked."""
    here = cluster.kind == "local"
    if not here and "$" in cluster.scratch:
        return CheckResult()
    try:
        folder = expanded(cluster.scratch, {**os.environ, **cluster.env})
    except ConfigError as error:
        return CheckResult([str(error)])
    fault = path_error(folder) or (usage_error(folder) if here else None)
    return CheckResult([f"cluster.scratch={cluster.scratch}: {fault}"] if fault is not None else [])


def run_directory(cluster: ClusterConfig, runs: Path) -> CheckResult:
    """Slurm must be able to name log files in the run directory, and nodes must see it. A local file system is only a
    warning, because a cluster may be one host; the first job shows whether nodes see it (FailureReason.RUN_UNSEEN)."""
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
    """The type of the file system of a path, which need not exist; None if it is not known."""
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


CHECKS: Final[Mapping[str, Check]] = {"scratch": scratch, "run directory": run_directory, "software": software}
PROGRAM_CHECKS: Final = frozenset({"software"})
"""Names of the checks that start programs."""
