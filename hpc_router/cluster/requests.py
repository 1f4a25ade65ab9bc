"""The exact job of each replica: what `plan` prints is what is submitted."""

import sys

from hpc_router.cluster.launcher import JobRequest
from hpc_router.cluster.slots import ROUTER
from hpc_router.config import Deployment, ResourceConfig
from hpc_router.registry import split_replica
from hpc_router.rundir import RunDir


def request_for(run: RunDir, deployment: Deployment, replica: str) -> JobRequest:
    expert = split_replica(replica)[0]
    resources = ResourceConfig() if expert == ROUTER else deployment.experts[expert].resources
    module = "hpc_router.router" if expert == ROUTER else "hpc_router.expert"
    argv = (sys.executable, "-m", module, "--run", str(run.path), "--replica", replica)
    return JobRequest(replica, argv, resources)
