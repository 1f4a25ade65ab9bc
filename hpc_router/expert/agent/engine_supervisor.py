"""Keeps one engine running: starts it, waits until it serves, waits for its end, finds the cause, and starts it again.

It reports every step to one observer. It returns when starting the engine again cannot help. Cancelling it ends the
engine. It does not handle requests.
"""

import asyncio
import json
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

from hpc_router.errors import UpstreamError
from hpc_router.expert.agent.engine_relay import ENGINE
from hpc_router.expert.agent.restart_policy import RestartPolicy
from hpc_router.expert.engine_process.process import EngineProcess
from hpc_router.expert.engines import Engine, EngineFailure
from hpc_router.expert.multinode.start_strategy import StartStrategy
from hpc_router.net.protocol import METRICS, MODELS
from hpc_router.relay.upstream.interface import Upstream
from hpc_router.state.io_thread import FileThread
from hpc_router.state.job_records import FailureReason, JobPhase

logger = logging.getLogger(__name__)

POLL_S: Final = 0.1
POLL_TIMEOUT_S: Final = 5.0
WATCH_S: Final = 3.0
WATCH_TIMEOUT_S: Final = 7.0
_MAX_LIST_BYTES: Final = 2**20
_MAX_METRICS_BYTES: Final = 2**24
_PREFIX_CACHING: Final = re.compile(rb'^vllm:cache_config_info\{.*\benable_prefix_caching="(True|False)"', re.MULTILINE)
HUNG_MISSES: Final = 3
"""Consecutive failed probes after which a ready engine counts as hung: 30 s, with WATCH_S and WATCH_TIMEOUT_S."""


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """The properties of an engine that has loaded its model. None: the engine does not report the value, or not yet.
    `load_s`: seconds from the start of the engine until it was ready."""

    load_s: float
    max_model_len: int | None
    prefix_caching: bool | None


@dataclass(slots=True)
class _Facts:
    """The values that an engine has reported since its start. `listed`: the `max_model_len` of each model in its list
    of models; None until it has sent the list. `metrics_read`: whether it has sent its metrics."""

    listed: dict[str, int | None] | None = None
    metrics_read: bool = False
    prefix_caching: bool | None = None


class EngineObserver(Protocol):
    def phase_changed(
        self, phase: JobPhase, *, failure: EngineFailure | None = None, engine_pid: int | None = None
    ) -> None:
        """Called when the engine enters a phase. `failure`: why the previous process ended."""


@dataclass(slots=True)
class EngineSupervisor:
    """Starts and watches one engine.

    `progress` returns the number of received chunks: while it grows, an engine that does not answer health checks does
    not count as hung. `engine_lost` is set by the HTTP API when the engine did not accept a request, and cleared here
    when the engine answers again. `break_off` is called before an engine is stopped and after one has ended by itself.
    `on_loaded` is called each time before the phase READY, and again when the engine reports values that it had not
    reported then.
    """

    engine: Engine
    strategy: StartStrategy
    client: Upstream
    files: FileThread
    observer: EngineObserver
    restarts: RestartPolicy
    startup_timeout_s: float
    progress: Callable[[], int] = lambda: 0
    engine_lost: asyncio.Event = field(default_factory=asyncio.Event)
    break_off: Callable[[], None] = lambda: None
    on_loaded: Callable[[LoadedEngine], None] = lambda loaded: None
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    chance: Callable[[], float] = random.random
    clock: Callable[[], float] = time.monotonic
    _facts: _Facts = field(default_factory=_Facts)

    async def run(self) -> EngineFailure:
        """Runs the engine, and starts it again after a failure. Returns the last failure once another start cannot help
        or too many starts have failed."""
        while True:
            command = await self.strategy.next_command()
            if isinstance(command, EngineFailure):
                return command
            ready_s, started_at = 0.0, self.clock()
            async with await EngineProcess.start(command, self.files) as process:
                try:
                    if process.pid is not None:
                        self.observer.phase_changed(JobPhase.LOADING, engine_pid=process.pid)
                        logger.info("engine started, process %d", process.pid)
                    failure = await self._until_ready(process)
                    if failure is None:
                        ready_at = self.clock()
                        self.engine_lost.clear()
                        load_s = round(ready_at - started_at, 3)
                        self.on_loaded(self._loaded(load_s))
                        self.observer.phase_changed(JobPhase.READY, engine_pid=process.pid)
                        logger.info("engine ready after %g s", load_s)
                        failure = await self._until_end_or_hung(process, load_s)
                        ready_s = self.clock() - ready_at  # before this engine and its other ranks are stopped
                finally:
                    self.break_off()
            failure = await self.strategy.resolve_failure(failure)
            logger.warning("engine failed (%s) after %.1f s ready: %s", failure.reason, ready_s, failure.message)
            delay_s = self.restarts.after_failure(failure.reason, ready_s=ready_s, chance=self.chance())
            if delay_s is None:
                return failure
            self.observer.phase_changed(JobPhase.RESTARTING, failure=failure)
            await self.sleep(delay_s)

    async def _until_ready(self, process: EngineProcess) -> EngineFailure | None:
        """Waits until the engine serves, and returns None. Returns a failure if the engine ends before that, or is not
        ready within `startup_timeout_s`."""
        try:
            async with asyncio.timeout(self.startup_timeout_s), asyncio.TaskGroup() as group:
                answers = group.create_task(self._until_serving())
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
        """Waits until the process ends, or until the start strategy reports that the engine cannot serve any more.
        Returns why."""
        ended = asyncio.create_task(process.failure(self.engine.signs))
        wait_broken = asyncio.create_task(self.strategy.wait_broken())
        try:
            await asyncio.wait({ended, wait_broken}, return_when=asyncio.FIRST_COMPLETED)
            return ended.result() if ended.done() else wait_broken.result()
        finally:
            ended.cancel()
            wait_broken.cancel()
            await asyncio.gather(ended, wait_broken, return_exceptions=True)

    async def _until_serving(self) -> EngineFailure | None:
        """Waits until the engine's HTTP API is ready, and returns None. Returns a failure if the engine has not loaded
        all its adapters, because the registry would otherwise list them as served."""
        while not await self._is_ready(timeout_s=POLL_TIMEOUT_S):
            await asyncio.sleep(POLL_S)
        facts = self._facts = _Facts()
        if not self.engine.lists_models:
            return None
        serves = self.engine.serves()
        while not await self._ask() and facts.listed is None and len(serves) > 1:
            await asyncio.sleep(POLL_S)
        if len(serves) == 1:
            return None
        absent = [expert for expert, model in serves.items() if model not in (facts.listed or {})]
        return (
            EngineFailure(FailureReason.WEIGHTS, f"the engine has not loaded {', '.join(absent)}") if absent else None
        )

    async def _ask(self) -> bool:
        """Asks the engine for its list of models and its metrics, if it has not sent them yet. Returns whether both are
        known now; always True for an engine that does not list its models."""
        facts = self._facts
        if facts.listed is None:
            facts.listed = await self._served_models()
        if not facts.metrics_read:
            with suppress(UpstreamError, TimeoutError):
                # vLLM's metrics say whether it caches prefixes; the default depends on the model.
                found = _PREFIX_CACHING.search(await self._read(METRICS, limit=_MAX_METRICS_BYTES))
                facts.metrics_read, facts.prefix_caching = True, None if found is None else found[1] == b"True"
        return self._told

    @property
    def _told(self) -> bool:
        return not self.engine.lists_models or (self._facts.listed is not None and self._facts.metrics_read)

    async def _ask_again(self, load_s: float) -> None:
        """If models or metrics of the engine are unknown, repeats `_ask` until both are known, then calls `on_loaded`;
        otherwise does nothing. `load_s`: time in seconds that the engine took to load."""
        while not self._told:
            await asyncio.sleep(WATCH_S)
            if await self._ask():
                self.on_loaded(self._loaded(load_s))

    def _loaded(self, load_s: float) -> LoadedEngine:
        lengths = [length for length in (self._facts.listed or {}).values() if length is not None]
        return LoadedEngine(load_s, min(lengths, default=None), self._facts.prefix_caching)

    async def _served_models(self) -> dict[str, int | None] | None:
        """Returns the models that the engine lists, with their `max_model_len`; None if the engine sends no valid
        list."""
        try:
            cards = json.loads(await self._read(MODELS, limit=_MAX_LIST_BYTES))["data"]
            lengths = {card["id"]: card.get("max_model_len") for card in cards}
            return {model: length if type(length) is int else None for model, length in lengths.items()}
        except (UpstreamError, TimeoutError, ValueError, KeyError, TypeError, AttributeError):
            return None

    async def _read(self, path: str, *, limit: int) -> bytes:
        """Returns the body of the engine's response to a GET of `path`. Raises TimeoutError, or UpstreamError, for
        example for a body longer than `limit` bytes."""
        async with asyncio.timeout(POLL_TIMEOUT_S), self.client.request("GET", ENGINE, path) as answer:
            return await answer.read(limit)

    async def _until_end_or_hung(self, process: EngineProcess, load_s: float) -> EngineFailure:
        async with asyncio.TaskGroup() as group:
            end = group.create_task(self._until_end(process))
            hanging = group.create_task(self._until_hung())
            others = [group.create_task(self._clear_engine_lost()), group.create_task(self._ask_again(load_s))]
            await asyncio.wait({end, hanging}, return_when=asyncio.FIRST_COMPLETED)
            for task in (end, hanging, *others):
                task.cancel()
        return hanging.result() if end.cancelled() else end.result()

    async def _until_hung(self) -> EngineFailure:
        misses, before = 0, self.progress()
        while misses < HUNG_MISSES:
            await asyncio.sleep(WATCH_S)
            alive = await self._is_ready(timeout_s=WATCH_TIMEOUT_S)
            now = self.progress()
            misses = 0 if alive or now != before else misses + 1
            before = now
        return EngineFailure(FailureReason.TIMEOUT, f"the engine stopped answering: {misses} checks in a row failed")

    async def _clear_engine_lost(self) -> None:
        """Clears `engine_lost` whenever the engine answers again. Never ends."""
        while True:
            await self.engine_lost.wait()
            if await self._is_ready(timeout_s=POLL_TIMEOUT_S):
                self.engine_lost.clear()
            else:
                await asyncio.sleep(POLL_S)

    async def _is_ready(self, *, timeout_s: float) -> bool:
        try:
            async with (
                asyncio.timeout(timeout_s),
                self.client.request("GET", ENGINE, self.engine.ready_path) as answer,
            ):
                return answer.status == 200
        except (UpstreamError, TimeoutError):
            return False
