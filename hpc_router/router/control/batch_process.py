"""Runs the program that executes batches, `hpc_router.router.batches`, while this router leads and there are batches.

The program is a process of its own, so that its work delays neither the control process nor requests, and uses no
memory while there are no batches. Also removes expired files and batches that ended long ago.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from hpc_router import backoff
from hpc_router.config.schema import DAY_S
from hpc_router.router.batches.stored_batches import StoredBatches
from hpc_router.router.batches.stored_files import StoredFiles
from hpc_router.router.control.tied_process import run_process
from hpc_router.state.io_thread import FileThread
from hpc_router.state.job_records import JobDir
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

CHECK_S: Final = 0.5
"""Interval in seconds at which new batches, and whether this router leads, are looked for."""
CLEAN_S: Final = 600.0
"""Interval in seconds at which expired files and old batches are removed."""
MAX_PAUSE_S: Final = 30.0


def batch_argv(run: RunDir, replica: str) -> list[str]:
    """Returns the command line of the program that executes batches through the router `replica`."""
    return [sys.executable, "-m", "hpc_router.router.batches", "--run", str(run.path), "--replica", replica]


class BatchProcess:
    """Runs the program as long as it is needed. `replica`: name of this router; `leads` returns whether it leads;
    `keep_days` returns `router.batch.keep_days`."""

    def __init__(
        self, run: RunDir, files: FileThread, *, replica: str, leads: Callable[[], bool], keep_days: Callable[[], float]
    ) -> None:
        self._argv, self._files, self._leads, self._keep_days = batch_argv(run, replica), files, leads, keep_days
        self._thread = files
        self._log = JobDir(run, replica).batches_log
        self._stored = StoredFiles(run)
        self._batches = StoredBatches(run, self._stored)
        self._cleaned_at = -CLEAN_S

    async def run_forever(self) -> None:
        """Starts the program when there is a batch that has not ended, and stops it when this router does not lead any
        more. If it fails, starts it again after a pause that grows with the failures in a row."""
        # A thread of its own, because removing large files must not delay the router's record.
        thread = self._thread = FileThread("files of batches")
        try:
            await self._run_forever()
        finally:
            thread.close(timeout_s=0)

    async def _run_forever(self) -> None:
        failures = 0
        while True:
            await asyncio.sleep(backoff.pause_s(failures, first_s=CHECK_S, max_s=MAX_PAUSE_S))
            if not self._leads():
                continue
            await self._clean()
            if not await self._thread.run(self._batches.any_active):
                continue
            status = await self._run_while_leading()
            failures = 0 if status in (0, None) else failures + 1
            if status:
                logger.warning("the process that runs batches ended with status %d; it is started again", status)

    async def _run_while_leading(self) -> int | None:
        """Runs the program until it ends and returns its exit status; stops it and returns None if this router does not
        lead any more."""
        running = asyncio.create_task(run_process(self._argv, self._files, self._log), name="batches")
        try:
            while self._leads():
                await asyncio.wait({running}, timeout=CHECK_S)
                if running.done():
                    return running.result()
                await self._clean()
            return None
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def _clean(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._cleaned_at < CLEAN_S:
            return
        self._cleaned_at, at = now, time.time()
        removed = await self._thread.run(partial(self._stored.remove_expired, now=at))
        removed += await self._thread.run(partial(self._batches.remove_ended, before=at - self._keep_days() * DAY_S))
        if removed:
            logger.info("%d expired files and old batches were removed", removed)
