"""Runs the control loop (`hpc-router reconcile --loop`) beside the router, in a process of its own.

Because it is a separate process, requests never wait for a file system or Slurm, and a crash of the loop does not end
the router. The loop ends when its router ends, because that closes the loop's standard input.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Awaitable, Callable

from hpc_router.background_tasks import OnFailure, restarting
from hpc_router.router.control.tied_process import run_process
from hpc_router.router.ipc.supervisor import STABLE_S, pause_s
from hpc_router.state.io_thread import FileThread
from hpc_router.state.job_records import JobDir
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)


def control_argv(run: RunDir, replica: str) -> list[str]:
    """Returns the command line of the control loop. `replica`: name of the router beside which it runs."""
    verb = ["reconcile", "--loop", "--tied", "--while-leading", replica, "--run", str(run.path)]
    return [sys.executable, "-m", "hpc_router.cli", *verb]


class ReconcileProcess:
    """Keeps the control loop running within `async with`. Restarts it after a pause that grows with the failures in a
    row (`pause_s`)."""

    def __init__(
        self,
        run: RunDir,
        files: FileThread,
        *,
        replica: str,
        on_failure: OnFailure = lambda task, error: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._argv = control_argv(run, replica)
        self._files = files
        self._log = JobDir(run, replica).reconcile_log
        self._on_failure = on_failure
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "ReconcileProcess":
        self._task = asyncio.create_task(
            restarting("control loop", self._run_forever, self._on_failure), name="control loop"
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run_forever(self) -> None:
        in_a_row = 0
        while True:
            started_at = self._clock()
            try:
                status = await run_process(self._argv, self._files, self._log)
                logger.warning("the control loop ended with status %d; it is started again", status)
            except OSError as error:
                logger.warning("the control loop cannot be started: %s", error)
            in_a_row = 1 if self._clock() - started_at >= STABLE_S else in_a_row + 1
            await self._sleep(pause_s(in_a_row))
