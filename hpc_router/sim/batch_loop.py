"""Runs a batch step by step. Each step takes the predicted time, and then its requests get their tokens.

Each step starts at the scheduled end of the previous one. If a step ends late, the next one is shortened by the delay.
A delay that cannot be made up is counted, so that a benchmark shows whether this machine was too slow to simulate.
"""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Sequence as Values
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from hpc_router.sim.continuous_batching import Batch, Sequence
from hpc_router.sim.kv_cache import BlockPool
from hpc_router.sim.latency import Clock
from hpc_router.sim.roofline import RooflineEngine


@dataclass(slots=True, eq=False)
class BatchSlot:
    """The token schedule of one request in the batch. `produced`: number of tokens that the batch has produced for it.
    `awaited`: number of tokens for which the request has called `first` or `next`."""

    sequence: Sequence
    produced: int = 0
    awaited: int = 0
    token_ready: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def cached_tokens(self) -> int:
        return self.sequence.blocks.cached_tokens

    async def first(self, prompt_tokens: int, *, running: int) -> None:
        await self._token()

    async def next(self, *, running: int) -> None:
        await self._token()

    async def _token(self) -> None:
        self.awaited += 1
        while self.produced < self.awaited:
            self.token_ready.clear()
            await self.token_ready.wait()


class BatchLoop:
    """Runs the steps of a batch. `step_s`: sum of the predicted durations of all steps, in seconds. `lost_s`: sum of
    the delays that later steps did not make up, in seconds."""

    def __init__(self, engine: RooflineEngine, clock: Clock, pool: BlockPool, *, by_priority: bool = False) -> None:
        self._engine, self._clock = engine, clock
        self._slowdown = engine.options.slowdown
        self.batch = Batch(pool, engine.max_seqs, engine.max_tokens, by_priority=by_priority)
        self._slots: dict[Sequence, BatchSlot] = {}
        self._has_work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.step_s = self.lost_s = 0.0

    @asynccontextmanager
    async def slot(
        self, prompt_tokens: int, hashes: Values[int] = (), *, reads: bool = True, priority: int = 0
    ) -> AsyncIterator[BatchSlot]:
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        sequence = self.batch.add(prompt_tokens, hashes, reads=reads, priority=priority)
        slot = self._slots[sequence] = BatchSlot(sequence)
        self._has_work.set()
        try:
            yield slot
        finally:
            self.batch.remove(sequence)
            del self._slots[sequence]

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        due_s = self._clock.now_s()
        while True:
            steps = self.batch.plan()
            if not steps:
                self._has_work.clear()
                if self.batch.idle:
                    await self._has_work.wait()
                else:
                    await self._clock.sleep(0)
                due_s = self._clock.now_s()
                continue
            duration_s = self._engine.step_s(steps) * self._slowdown
            due_s += duration_s
            self.step_s += duration_s
            late_s = self._clock.now_s() - due_s
            if late_s > 0:
                self.lost_s += late_s
                due_s += late_s
            await self._clock.sleep(max(0.0, due_s - self._clock.now_s()))
            for sequence in self.batch.finish():
                slot = self._slots.get(sequence)
                if slot is not None:
                    slot.produced += 1
                    slot.token_ready.set()
