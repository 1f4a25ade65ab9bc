"""Runs the engine process of one rank. At most one process runs at a time, and no call blocks while it starts or
ends."""

import asyncio
import logging
from types import TracebackType
from typing import Self

from hpc_router.expert.engine_process.process import Command, EngineProcess
from hpc_router.expert.engines import Engine, EngineFailure
from hpc_router.net.protocol import RankState
from hpc_router.state.io_thread import FileThread
from hpc_router.state.job_records import FailureReason

logger = logging.getLogger(__name__)


class RankEngine:
    """The engine process of one rank. `attempt`: number of the current or last attempt. `failure`: why the process
    ended; None if it runs or was ended by `end`."""

    def __init__(self, engine: Engine, files: FileThread) -> None:
        self._engine = engine
        self._files = files
        self._task: asyncio.Task[None] | None = None
        self.attempt = 0
        self.failure: EngineFailure | None = None

    @property
    def running(self) -> bool:
        """Returns whether there is a process, including one that is being ended."""
        return self._task is not None and not self._task.done()

    @property
    def state(self) -> RankState:
        if self.running:
            return RankState.RUNNING
        return RankState.IDLE if self.failure is None else RankState.ENDED

    def start(self, attempt: int, command: Command) -> None:
        assert not self.running, f"attempt {self.attempt} still runs"
        self.attempt, self.failure = attempt, None
        self._task = asyncio.create_task(self._run(command), name=f"attempt {attempt}")

    def end(self, why: str) -> None:
        """Begins to end the process and returns at once. `running` becomes False when the process has ended."""
        if self._task is not None and not self._task.done() and not self._task.cancelling():
            logger.info("ending the engine: %s", why)
            self._task.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end("this rank ends")
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, command: Command) -> None:
        try:
            async with await EngineProcess.start(command, self._files) as process:
                logger.info("attempt %d: engine started, process %s", self.attempt, process.pid)
                failure = await process.failure(self._engine.signs)
        except OSError as error:
            failure = EngineFailure(FailureReason.CRASHED, f"cannot be started: {error}")
        logger.warning("attempt %d: engine failed (%s): %s", self.attempt, failure.reason, failure.message)
        self.failure = failure
