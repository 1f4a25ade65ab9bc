"""Runs the control loop beside the router, as a process of its own.

The data path must not wait for a file system or a controller, and a fault in one must not take the other down. The
loop dies with its router: it holds the other end of a pipe.
"""

import asyncio
import contextlib
import logging
import sys
from pathlib import Path
from typing import Final

from hpc_router.background import OnFailure, restarting
from hpc_router.rundir import RunDir

logger = logging.getLogger(__name__)

RESTART_PAUSE_S: Final = 5.0
STOP_S: Final = 10.0


def control_argv(run: RunDir, replica: str) -> list[str]:
    verb = ["reconcile", "--loop", "--tied", "--while-leading", replica, "--run", str(run.path)]
    return [sys.executable, "-m", "hpc_router.cli", *verb]


class ControlLoop:
    """`async with` keeps it running; it is started again when it dies."""

    def __init__(self, run: RunDir, *, replica: str, on_failure: OnFailure = lambda task, error: None) -> None:
        self._argv = control_argv(run, replica)
        self._log: Path = run.logs / "reconcile.log"
        self._on_failure = on_failure
        self._keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "ControlLoop":
        self._keeper = asyncio.create_task(
            restarting("control loop", self._keep, self._on_failure), name="control loop"
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._keeper is not None
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)

    async def _keep(self) -> None:
        while True:
            try:
                status = await self._run_once()
                logger.warning("the control loop ended with status %d; it is started again", status)
            except OSError as error:
                logger.warning("the control loop cannot be started: %s", error)
            await asyncio.sleep(RESTART_PAUSE_S)

    async def _run_once(self) -> int:
        with self._log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *self._argv, stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                try:
                    async with asyncio.timeout(STOP_S):
                        await process.wait()
                except TimeoutError:
                    process.kill()
                    await process.wait()
