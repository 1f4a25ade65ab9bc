"""Builds the job request of a replica, in the same way for `plan` and for the control loop."""

from hpc_router.cluster.control_loop.desired_state import excluded_nodes
from hpc_router.cluster.launchers.interface import ROUTER, JobRequest
from hpc_router.cluster.launchers.slurm.dependency import was_met
from hpc_router.cluster.launchers.slurm.node_fit import resources_of
from hpc_router.cluster.launchers.slurm.sbatch import python_of
from hpc_router.config.revision import revision
from hpc_router.config.schema import Deployment
from hpc_router.state.registry import split_replica
from hpc_router.state.run_directory import RunDir


def request_for(run: RunDir, deployment: Deployment, replica: str) -> JobRequest:
    """Returns the job request of a replica, with the nodes that are excluded now."""
    expert = split_replica(replica)[0]
    resources = resources_of(deployment, expert)[1]
    module = "hpc_router.router" if expert == ROUTER else "hpc_router.expert"
    argv = (python_of(deployment.cluster), "-m", module, "--run", str(run.path), "--replica", replica)
    return JobRequest(
        replica,
        argv,
        resources,
        dependency_met=was_met(run, deployment, resources),
        exclude=excluded_nodes(run),
        revision=revision(deployment, expert),
    )
