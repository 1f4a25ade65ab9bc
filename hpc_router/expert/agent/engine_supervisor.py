"""Keeps one engine running: start, wait until it answers, wait for its end, say why, pause, start again.

It tells every step to one observer and returns when no further start can help; cancelling it ends the engine. What
requests do meanwhile is not its concern.
"""

import asyncio
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from hpc_router.errors import UpstreamError
from hpc_router.expert.agent.engine_relay import ENGINE
from hpc_router.expert.agent.restart_policy import Restarts
from hpc_router.expert.engine_process.process import EngineProcess
from hpc_router.expert.engines import Engine, EngineFailure
from hpc_router.expert.multinode.start_strategy import StartStrategy
from hpc_router.net.protocol import MODELS
from hpc_router.relay.upstream.interface import Upstream
from hpc_router.state.io_thread import FileThread
from hpc_router.state.job_records import FailureReason, JobPhase

logger = logging.getLogger(__name__)

POLL_S: Final = 0.1
POLL_TIMEOUT_S: Final = 5.0
WATCH_S: Final = 3.0
WATCH_TIMEOUT_S: Final = 7.0
_MAX_LIST_BYTES: Final = 2**20
HUNG_MISSES: Final = 3
"""A ready engine is asked so often and given so long; after so many misses in a row, half a minute, it hangs."""


class EngineObserver(Protocol):
    def moved(self, phase: JobPhase, *, failure: EngineFailure | None = None, engine_pid: int | None = None) -> None:
        """A step of the engine; `failure` is why it ended."""


@dataclass(slots=True)
class EngineSupervisor:
    """`progress`: a number that changes while answers come, for an engine may be too busy to say that it is ready.
    `engine_lost`: set by the gate when the engine did not take a request; cleared here when the engine answers.
    `break_off` is called before an engine is stopped, and after one has ended by itself."""

    engine: Engine
    attempts: StartStrategy
    client: Upstream
    files: FileThread
    observer: EngineObserver
    restarts: Restarts
    startup_timeout_s: float
    progress: Callable[[], int] = lambda: 0
    engine_lost: asyncio.Event = field(default_factory=asyncio.Event)
    break_off: Callable[[], None] = lambda: None
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    chance: Callable[[], float] = random.random
    clock: Callable[[], float] = time.monotonic

    async def run(self) -> EngineFailure:
        """Returns the failure that no restart can cure, or the last one of too many."""
        while True:
            command = await self.attempts.begin()
            if isinstance(command, EngineFailure):
                return command
            ready_s = 0.0
            async with await EngineProcess.start(command, self.files) as process:
                try:
                    if process.pid is not None:
                        self.observer.moved(JobPhase.LOADING, engine_pid=process.pid)
                        logger.info("engine started, process %d", process.pid)
                    failure = await self._until_ready(process)
                    if failure is None:
                        ready_at = self.clock()
                        self.engine_lost.clear()
                        self.observer.moved(JobPhase.READY, engine_pid=process.pid)
                        logger.info("engine ready")
                        failure = await self._until_end_or_hung(process)
                        ready_s = self.clock() - ready_at  # before the engine and its other ranks are ended
                finally:
                    self.break_off()
            failure = await self.attempts.over(failure)
            logger.warning("engine failed (%s) after %.1f s ready: %s", failure.reason, ready_s, failure.message)
            delay_s = self.restarts.after_failure(failure.reason, ready_s=ready_s, chance=self.chance())
            if delay_s is None:
                return failure
            self.observer.moved(JobPhase.RESTARTING, failure=failure)
            await self.sleep(delay_s)

    async def _until_ready(self, process: EngineProcess) -> EngineFailure | None:
        """None once it answers; else why it never did."""
        try:
            async with asyncio.timeout(self.startup_timeout_s), asyncio.TaskGroup() as group:
                answers = group.create_task(self._answers())
                end = group.create_task(self._until_end(process))
                await asyncio.wait({answers, end}, return_when=asyncio.FIRST_COMPLETED)
                answers.cancel()
                end.cancel()
        except TimeoutError:
            return EngineFailure(
                FailureReason.TIMEOUT, f"no answer within engine.startup_timeout_s={self.startup_timeout_s:g}"
            )
        return answers.result() if end.cancelled() else end.result()

    async def _until_end(self, process: EngineProcess) -> EngineFailure:
        """Why the engine has ended, or must."""
        ended = asyncio.create_task(process.failure(self.engine.signs))
        broken = asyncio.create_task(self.attempts.broken())
        try:
            await asyncio.wait({ended, broken}, return_when=asyncio.FIRST_COMPLETED)
            return ended.result() if ended.done() else broken.result()
        finally:
            ended.cancel()
            broken.cancel()
            await asyncio.gather(ended, broken, return_exceptions=True)

    async def _answers(self) -> EngineFailure | None:
        """Until the engine says by HTTP that it can serve. Adapters that it then has not are a failure: nobody may be
        told that it serves their experts."""
        while not await self._says_ready(timeout_s=POLL_TIMEOUT_S):
            await asyncio.sleep(POLL_S)
        serves = self.engine.serves()
        if len(serves) == 1:
            return None
        while (listed := await self._listed()) is None:
            await asyncio.sleep(POLL_S)
        absent = [expert for expert, model in serves.items() if model not in listed]
        return (
            EngineFailure(FailureReason.WEIGHTS, f"the engine has not loaded {', '.join(absent)}") if absent else None
        )

    async def _listed(self) -> set[str] | None:
        """The models that it says to have; None: no such answer."""
        try:
            async with (
                asyncio.timeout(POLL_TIMEOUT_S),
                self.client.request("GET", ENGINE, MODELS) as answer,
            ):
                return {card["id"] for card in json.loads(await answer.read(_MAX_LIST_BYTES))["data"]}
        except (UpstreamError, TimeoutError, ValueError, KeyError, TypeError):
            return None

    async def _until_end_or_hung(self, process: EngineProcess) -> EngineFailure:
        async with asyncio.TaskGroup() as group:
            end = group.create_task(self._until_end(process))
            hung = group.create_task(self._until_hung())
            finding = group.create_task(self._find_again())
            await asyncio.wait({end, hung}, return_when=asyncio.FIRST_COMPLETED)
            for task in (end, hung, finding):
                task.cancel()
        return hung.result() if end.cancelled() else end.result()

    async def _until_hung(self) -> EngineFailure:
        misses, before = 0, self.progress()
        while misses < HUNG_MISSES:
            await asyncio.sleep(WATCH_S)
            alive = await self._says_ready(timeout_s=WATCH_TIMEOUT_S)
            now = self.progress()
            misses = 0 if alive or now != before else misses + 1
            before = now
        return EngineFailure(FailureReason.TIMEOUT, f"the engine stopped answering: {misses} checks in a row failed")

    async def _find_again(self) -> None:
        """Clear `engine_lost` as soon as the engine answers; never ends."""
        while True:
            await self.engine_lost.wait()
            if await self._says_ready(timeout_s=POLL_TIMEOUT_S):
                self.engine_lost.clear()
            else:
                await asyncio.sleep(POLL_S)

    async def _says_ready(self, *, timeout_s: float) -> bool:
        try:
            async with (
                asyncio.timeout(timeout_s),
                self.client.request("GET", ENGINE, self.engine.ready_path) as answer,
            ):
                return answer.status == 200
        except (UpstreamError, TimeoutError):
            return False
