"""Finds out whether the user's `sbatch.dependency` was met, so that further jobs are submitted without it.

A dependency on other jobs, once met, stays met. But Slurm 24.11 and later refuse a dependency on a job that they have
forgotten (MinJobAge, five minutes). So further jobs are submitted without it as soon as one has started with it, or
waits for something else: Slurm names that as the reason only after it has found the dependency met.
"""

from collections.abc import Set
from typing import Final

from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.cluster.launchers.slurm.node_fit import resources_of
from hpc_router.cluster.launchers.slurm.sbatch import dependency_of
from hpc_router.cluster.launchers.slurm.squeue import stored_snapshot
from hpc_router.config.schema import Deployment
from hpc_router.state.job_records import JobDir, Runner
from hpc_router.state.registry import split_replica
from hpc_router.state.run_directory import RunDir

_AFTER_DEPENDENCIES: Final = ("Resources", "Priority")
"""Reasons for which a job waits once its dependencies are met."""


def met_dependencies(run: RunDir, deployment: Deployment, wanted: Set[str]) -> Set[str]:
    """Returns the dependencies in `wanted` that a job of this run, submitted with them, has shown to be met. Reads
    `jobs/` and the last answer of squeue once, and not at all if `wanted` is empty."""
    if not wanted or not run.jobs.is_dir():
        return set()
    jobs = (JobDir(run, folder.name) for folder in run.jobs.glob("[!.]*"))
    snapshot = stored_snapshot(run)
    queued = snapshot.jobs if snapshot is not None else {}
    free = {job_id for job_id, one in queued.items() if one.reason in _AFTER_DEPENDENCIES}
    return wanted & {found for job in jobs if (found := _met_by(job, deployment, free)) is not None}


def _met_by(job: JobDir, deployment: Deployment, free: Set[str]) -> str | None:
    """Returns the dependency that the config had when `job` was submitted; None if it had none, or if the job has not
    started and is not in `free`, the ids of jobs whose dependencies are met. A job of an earlier version, which did not
    record it, is assumed to have had the one that `deployment` has now."""
    info = job.info()
    if info is None or info.runner is not Runner.SLURM:
        return None
    if info.job_id not in free and job.process() is None and job.ended() is None:
        return None
    if info.dependency is not None:
        return info.dependency or None
    expert = split_replica(job.replica)[0]
    if expert != ROUTER and expert not in deployment.experts:
        return None
    return dependency_of(deployment.cluster, resources_of(deployment, expert)[1])
