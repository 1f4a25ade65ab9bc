"""The main program of an expert's job: reads the config, opens the log, handles signals, and returns the exit status.
It runs the agent; on the further nodes of an engine, a follower.

Exit status: 0 drained, 1 failed, 2 an invalid value. The file thread writes the log, so no log line waits for the
shared file system. `main` replaces the signal handlers that the job's launcher left.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import uvloop

from hpc_router.config import frozen
from hpc_router.config.adapters import host_of
from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError, HpcRouterError, suggest
from hpc_router.expert.agent.agent import Agent
from hpc_router.expert.engine_process.guard import become_subreaper
from hpc_router.expert.multinode.follower import Follower
from hpc_router.net.job_environment import END_SIGNALS, WARNING_SIGNALS
from hpc_router.state.io_thread import FileThread, file_thread
from hpc_router.state.job_records import Exit, FailureReason, JobDir
from hpc_router.state.registry import split_replica
from hpc_router.state.run_directory import RunDir, open_run, private_umask

logger = logging.getLogger(__name__)

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *WARNING_SIGNALS, *END_SIGNALS)

RANK: Final = "HPC_ROUTER_RANK"
"""Environment variable with the rank of this node, set by a launcher that starts one process per node."""


def main(run: Path, replica: str, deployment: Deployment | None = None, *, rank: int | None = None) -> int:
    """Runs a replica, or one rank of it, until it ends. Returns the exit status.

    `rank`: number of the rank; None: as in the environment, else 0. `deployment` replaces the run's own config.
    """
    try:
        opened = open_run(run)
        job = JobDir(opened, replica)
        rank = _rank(os.environ) if rank is None else rank
        job.claim()  # does nothing for a job that was submitted
        become_subreaper()
        log = job.agent_log if rank == 0 else job.agent_log.with_name(f"{replica}.rank{rank}.log")
        with file_thread(f"files of {replica}", log=log) as files, private_umask():
            return uvloop.run(_run(opened, replica, deployment, files, rank=rank))
    except HpcRouterError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def _rank(environment: Mapping[str, str]) -> int:
    text = environment.get(RANK, "0")
    if not text.isdecimal():
        raise ConfigError(f"{RANK}={text}: not a rank (valid: 0, 1, ...)")
    return int(text)


async def _run(run: RunDir, replica: str, deployment: Deployment | None, files: FileThread, *, rank: int) -> int:
    try:
        body = _body(run, replica, deployment or frozen.read(run.config), files, rank=rank)
    except HpcRouterError as error:
        logger.error("%s", error)
        if rank == 0:
            JobDir(run, replica).write(Exit(ok=False, reason=FailureReason.BAD_OPTION, message=str(error)))
        raise
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN or number is not signal.SIGHUP:  # `nohup` ignores SIGHUP
            loop.add_signal_handler(number, body.signalled, number)
    end = await body.run()
    return 0 if end.ok else 1


def _body(run: RunDir, replica: str, deployment: Deployment, files: FileThread, *, rank: int) -> Agent | Follower:
    expert = split_replica(replica)[0]
    if expert not in deployment.experts:
        raise ConfigError(f"{run.config}: no expert '{expert}'{suggest(expert, deployment.experts)}")
    host = host_of(deployment.experts, expert)
    if host != expert:
        raise ConfigError(f"'{expert}' is an adapter on the engine of '{host}', which serves both: start that one")
    nodes = deployment.experts[expert].resources.nodes
    if rank >= nodes:
        key = f"experts.{expert}.resources.nodes"
        raise ConfigError(f"{key}={nodes}: there is no rank {rank} (valid: 0 to {nodes - 1}, one task per node)")
    if rank == 0:
        return Agent(run, replica, deployment, files=files, environment=os.environ)
    return Follower(run, replica, deployment, rank=rank, files=files, environment=os.environ)
