"""Background tasks that start again after an unexpected exception.

A failure is logged with its traceback and passed to `on_failure`, a function of the caller. The task starts again after
a pause that doubles with each failure up to `MAX_PAUSE_S`, so that a lasting fault does not fill the log. The task ends
when it is cancelled or when its function returns.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from hpc_router import backoff

logger = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 0.1
MAX_PAUSE_S: Final = 30.0

OnFailure = Callable[[str, str], None]
"""Called with the task's name and the error; the name is a metric's label, so it names a kind of task."""


async def restarting(task: str, body: Callable[[], Awaitable[None]], on_failure: OnFailure) -> None:
    """Runs `body` until it returns. If it raises an exception, calls `on_failure`, pauses, and runs it again. The pause
    grows with each failure; a run that lasted longer than `MAX_PAUSE_S` resets it to `FIRST_PAUSE_S`. `task`: the name
    of the task in logs and metrics."""
    clock, failures = asyncio.get_running_loop().time, 0
    while True:
        started_at = clock()
        try:
            await body()
            return
        except Exception as error:
            failures = 0 if clock() - started_at > MAX_PAUSE_S else failures
            pause_s = backoff.pause_s(failures, first_s=FIRST_PAUSE_S, max_s=MAX_PAUSE_S)
            logger.exception("the background task '%s' failed; it starts again in %g s", task, pause_s)
            on_failure(task, f"{type(error).__name__}: {error}")
        await asyncio.sleep(pause_s)
        failures += 1


@asynccontextmanager
async def background(task: str, body: Callable[[], Awaitable[None]], on_failure: OnFailure) -> AsyncIterator[None]:
    """Runs `restarting` with these arguments as a task during the `async with` block. At the end of the block the task
    is cancelled and awaited."""
    running = asyncio.create_task(restarting(task, body, on_failure), name=task)
    try:
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@dataclass(slots=True)
class TaskFailures:
    """Counts the failures of one process's background tasks. `seen`: name of the task -> (number of its failures, text
    of the last error)."""

    seen: dict[str, tuple[int, str]] = field(default_factory=dict)

    def note(self, task: str, error: str) -> None:
        self.seen[task] = (self.seen.get(task, (0, ""))[0] + 1, error)
