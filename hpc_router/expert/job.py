"""The agent as a process: configuration, logs, signals, exit status.

Exit status: 0 drained, 1 failed, 2 a value to edit. The log file is written by the file thread, so no log line waits
for the shared file system. `main` takes the place of whatever signal handlers the job's launcher left.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import uvloop

from hpc_router import frozen
from hpc_router.config import Deployment
from hpc_router.errors import HpcRouterError
from hpc_router.expert.agent import Agent
from hpc_router.expert.guard import become_subreaper
from hpc_router.filethread import FileThread, FileThreadHandler
from hpc_router.jobdir import Exit, JobDir, Reason
from hpc_router.lease import PATIENCE_S
from hpc_router.rundir import RunDir, open_run, private_umask

logger = logging.getLogger(__name__)

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def main(run: Path, replica: str, deployment: Deployment | None = None) -> int:
    """Be this replica of the run until it ends. `deployment`: another than the run's own config."""
    try:
        opened = open_run(run)
        job = JobDir(opened, replica)
        job.claim()  # a no-op for a job that was submitted
        become_subreaper()
        with file_thread(job) as files, private_umask():
            return uvloop.run(_live(opened, replica, deployment, files))
    except HpcRouterError as error:
        sys.stderr.write(f"{error}\n")
        return 2


@contextmanager
def file_thread(job: JobDir) -> Iterator[FileThread]:
    """The thread for all writes, with the agent's log among them; a terminal sees the log as well."""
    files = FileThread(f"files of {job.replica}")
    handlers: list[logging.Handler] = [FileThreadHandler(files, logging.FileHandler(job.agent_log, encoding="utf-8"))]
    if sys.stderr.isatty():
        handlers.append(logging.StreamHandler())
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, handlers=handlers, force=True)
    try:
        yield files
    finally:
        files.close(timeout_s=PATIENCE_S)


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
