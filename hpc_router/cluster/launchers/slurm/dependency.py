"""Finds out whether the user's `sbatch.dependency` was met, so that further jobs are submitted without it.

A dependency on other jobs, once met, stays met. But Slurm 24.11 and later refuse a dependency on a job that they have
forgotten (MinJobAge, five minutes). So further jobs are submitted without it as soon as one has started with it.
"""

from collections.abc import Set

from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.cluster.launchers.slurm.node_fit import resources_of
from hpc_router.cluster.launchers.slurm.sbatch import dependency_of
from hpc_router.config.schema import Deployment
from hpc_router.state.job_records import JobDir, Runner
from hpc_router.state.registry import split_replica
from hpc_router.state.run_directory import RunDir


def met_dependencies(run: RunDir, deployment: Deployment, wanted: Set[str]) -> Set[str]:
    """Returns the dependencies in `wanted` with which a job of this run has started. Reads `jobs/` once, and not at all
    if `wanted` is empty."""
    if not wanted or not run.jobs.is_dir():
        return set()
    jobs = (JobDir(run, folder.name) for folder in run.jobs.glob("[!.]*"))
    return wanted & {found for job in jobs if (found := _started_with(job, deployment)) is not None}


def _started_with(job: JobDir, deployment: Deployment) -> str | None:
    """Returns the dependency that the config had when `job`, which has started, was submitted; None if it had none or
    the job has not started. A job of an earlier version, which did not record it, is assumed to have had the one that
    `deployment` has now."""
    info = job.info()
    if info is None or info.runner is not Runner.SLURM or (job.process() is None and job.ended() is None):
        return None
    if info.dependency is not None:
        return info.dependency or None
    expert = split_replica(job.replica)[0]
    if expert != ROUTER and expert not in deployment.experts:
        return None
    return dependency_of(deployment.cluster, resources_of(deployment, expert)[1])
