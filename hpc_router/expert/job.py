"""The agent as a process: configuration, logs, signals, exit status.

Exit status: 0 drained, 1 failed, 2 a value to edit. The log file is written by the file thread, so no log line waits
for the shared file system. `main` takes the place of whatever signal handlers the job's launcher left.
"""

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Final

import uvloop

from hpc_router import frozen
from hpc_router.config import Deployment
from hpc_router.errors import HpcRouterError
from hpc_router.expert.agent import Agent
from hpc_router.expert.guard import become_subreaper
from hpc_router.filethread import FileThread, file_thread
from hpc_router.jobdir import Exit, JobDir, Reason
from hpc_router.rundir import RunDir, open_run, private_umask

logger = logging.getLogger(__name__)

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def main(run: Path, replica: str, deployment: Deployment | None = None) -> int:
    """Be this replica of the run until it ends. `deployment`: another than the run's own config."""
    try:
        opened = open_run(run)
        job = JobDir(opened, replica)
        job.claim()  # a no-op for a job that was submitted
        become_subreaper()
        with file_thread(f"files of {replica}", log=job.agent_log) as files, private_umask():
            return uvloop.run(_live(opened, replica, deployment, files))
    except HpcRouterError as error:
        sys.stderr.write(f"{error}\n")
        return 2


async def _live(run: RunDir, replica: str, deployment: Deployment | None, files: FileThread) -> int:
    try:
        agent = Agent(run, replica, deployment or frozen.read(run.config), files=files, environment=os.environ)
    except HpcRouterError as error:
        logger.error("%s", error)
        JobDir(run, replica).write(Exit(ok=False, reason=Reason.BAD_OPTION, message=str(error)))
        raise
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, agent.drain, number.name)
    end = await agent.run()
    return 0 if end.ok else 1
