"""Requests for jobs that run a small program instead of an agent."""

import sys
from pathlib import Path

from hpc_router.cluster.launchers.interface import JobRequest
from hpc_router.config.schema import ResourceConfig


def request_of(service: Path, replica: str, *, how: str = "polite", gpus: int = 0) -> JobRequest:
    argv = (sys.executable, str(service), str(service.with_name(replica)), how)
    return JobRequest(replica, argv, ResourceConfig(gpus=gpus))
