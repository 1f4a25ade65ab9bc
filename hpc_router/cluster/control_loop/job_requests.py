"""Builds the job requests of replicas, in the same way for `plan` and for the control loop."""

from collections.abc import Sequence

from hpc_router.cluster.launchers.interface import ROUTER, JobRequest
from hpc_router.cluster.launchers.slurm.dependency import met_dependencies
from hpc_router.cluster.launchers.slurm.node_fit import resources_of
from hpc_router.cluster.launchers.slurm.sbatch import dependency_of, python_of
from hpc_router.config.revision import revision
from hpc_router.config.schema import Deployment
from hpc_router.state.registry import split_replica
from hpc_router.state.run_directory import RunDir


def job_requests(
    run: RunDir, deployment: Deployment, replicas: Sequence[str], *, exclude: tuple[str, ...]
) -> list[JobRequest]:
    """Returns the job request of each of the `replicas`. `exclude`: the nodes on which no job may start."""
    experts = {replica: split_replica(replica)[0] for replica in replicas}
    resources = {expert: resources_of(deployment, expert)[1] for expert in experts.values()}
    revisions = {expert: revision(deployment, expert) for expert in resources}
    dependencies = {expert: dependency_of(deployment.cluster, own) for expert, own in resources.items()}
    met = met_dependencies(run, deployment, {name for name in dependencies.values() if name is not None})
    python = python_of(deployment.cluster)
    return [
        JobRequest(
            replica,
            (python, "-m", _module(expert), "--run", str(run.path), "--replica", replica),
            resources[expert],
            dependency_met=dependencies[expert] in met,
            exclude=exclude,
            revision=revisions[expert],
        )
        for replica, expert in experts.items()
    ]


def _module(expert: str) -> str:
    return "hpc_router.router" if expert == ROUTER else "hpc_router.expert"
