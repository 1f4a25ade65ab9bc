"""Finds out whether the user's `sbatch.dependency` was met, so that further jobs are submitted without it.

A dependency on other jobs stays met, but Slurm 24.11 and later refuse a dependency on a job that they have forgotten
(MinJobAge, five minutes). So the dependency is left out as soon as one job of the run has started with it.
"""

from typing import Final

from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.cluster.launchers.slurm.node_fit import resources_of
from hpc_router.cluster.launchers.slurm.sbatch import effective_options
from hpc_router.config.schema import Deployment, ResourceConfig
from hpc_router.state.job_records import JobDir, Runner
from hpc_router.state.registry import split_replica
from hpc_router.state.run_directory import RunDir

OPTION: Final = "dependency"


def was_met(run: RunDir, deployment: Deployment, resources: ResourceConfig) -> bool:
    """Returns whether a job of this run has started with the `sbatch.dependency` of these resources."""
    wanted = _dependency(deployment, resources)
    if wanted is None or not run.jobs.is_dir():
        return False
    return any(_has_started_with(JobDir(run, folder.name), deployment, wanted) for folder in run.jobs.glob("[!.]*"))


def _has_started_with(job: JobDir, deployment: Deployment, wanted: str) -> bool:
    expert = split_replica(job.replica)[0]
    if expert != ROUTER and expert not in deployment.experts:
        return False
    resources = resources_of(deployment, expert)[1]
    info = job.info()
    if info is None or info.runner is not Runner.SLURM or _dependency(deployment, resources) != wanted:
        return False
    return job.process() is not None or job.ended() is not None


def _dependency(deployment: Deployment, resources: ResourceConfig) -> str | None:
    value = effective_options(deployment.cluster, resources).sbatch.get(OPTION)
    return value if isinstance(value, str) else None
