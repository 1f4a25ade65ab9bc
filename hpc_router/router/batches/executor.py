"""Runs the batches of a run beside the router that leads, until none is left.

The control process of that router starts and restarts this program. Two of them may run for a moment, such as during a
handover: the journals keep one result per line (see `journal`).
"""

import asyncio
import logging
import time
from functools import partial
from typing import Final

from hpc_router.background_tasks import restarting
from hpc_router.config.schema import Deployment
from hpc_router.errors import RegistryError
from hpc_router.router.batches.batch_run import BatchRun, RunLimits
from hpc_router.router.batches.sender import sending
from hpc_router.router.batches.stored_batches import StoredBatches
from hpc_router.router.batches.stored_files import StoredFiles
from hpc_router.state.run_directory import RunDir
from hpc_router.state.user_tokens import read_tokens

logger = logging.getLogger(__name__)

POLL_S: Final = 0.5
"""Interval in seconds at which new batches are looked for."""
IDLE_S: Final = 5.0
"""Time in seconds without a batch after which the program ends."""
LINE_BYTES: Final = 2**16
"""Maximum length in bytes of a line besides its request's body."""


async def execute(run: RunDir, deployment: Deployment, *, replica: str, stopping: asyncio.Event) -> None:
    """Runs all batches that have not ended, and new ones, until there was none for `IDLE_S` seconds or `stopping` is
    set. `replica`: the router to which their requests are sent."""
    config = deployment.router
    files = StoredFiles(run)
    batches = StoredBatches(run, files)
    limits = RunLimits(
        max_lines=config.batch.max_lines,
        max_line_bytes=int(config.max_body_mb * 2**20) + LINE_BYTES,
        in_flight=config.batch.in_flight,
    )
    slots, running = asyncio.Semaphore(limits.in_flight), dict[str, asyncio.Task[None]]()
    clock = asyncio.get_running_loop().time
    busy_at = clock()
    async with sending(run, replica, connections=limits.in_flight) as sender:
        while not stopping.is_set() and clock() - busy_at < IDLE_S:
            for batch in await asyncio.to_thread(batches.active):
                if batch.id not in running:
                    one = BatchRun(batch, batches, files, sender.send, slots, limits, stopping, partial(_is_valid, run))
                    running[batch.id] = asyncio.create_task(restarting("batch", one.run, _no_report), name=batch.id)
            running = {name: task for name, task in running.items() if not task.done()}
            busy_at = clock() if running else busy_at
            await _wait(stopping, POLL_S)
        await asyncio.gather(*running.values(), return_exceptions=True)


def _is_valid(run: RunDir, token_id: str) -> bool:
    """Returns whether a user's token exists and has not expired. While the tokens cannot be read, it counts as
    valid."""
    try:
        tokens = read_tokens(run)
    except RegistryError:
        return True
    return any(t.id == token_id and (t.expires_at is None or t.expires_at > time.time()) for t in tokens)


async def _wait(stopping: asyncio.Event, limit_s: float) -> None:
    try:
        async with asyncio.timeout(limit_s):
            await stopping.wait()
    except TimeoutError:
        pass


def _no_report(task: str, error: str) -> None:
    """The failure of a batch is only logged; the batch is continued."""
