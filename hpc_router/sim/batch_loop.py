"""The simulated engine's clockwork: runs a batch step by step, each as long as the roofline says, and wakes requests.

Steps are due one after the other; a step that ends late makes the next one shorter, and lag that cannot be made up is
counted, so that whoever measures knows that the machine, not the model, was the limit.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from hpc_router.sim.continuous_batching import Batch, Sequence
from hpc_router.sim.latency import Clock
from hpc_router.sim.roofline import RooflineEngine


@dataclass(slots=True, eq=False)
class Seat:
    """One request's place in the batch; what `generate` paces its tokens by."""

    sequence: Sequence
    given: int = 0
    more: asyncio.Event = field(default_factory=asyncio.Event)
    taken: int = 0

    async def first(self, prompt_tokens: int, *, running: int) -> None:
        await self._token()

    async def next(self, *, running: int) -> None:
        await self._token()

    async def _token(self) -> None:
        self.taken += 1
        while self.given < self.taken:
            self.more.clear()
            await self.more.wait()


class Batching:
    """`step_s`, `lost_s`: seconds that steps were to last, and by which they lagged behind for good."""

    def __init__(self, engine: RooflineEngine, clock: Clock) -> None:
        self._engine, self._clock = engine, clock
        self._slowdown = engine.options.slowdown
        self.batch = Batch(engine.kv_tokens, engine.max_seqs, engine.max_tokens)
        self._seats: dict[Sequence, Seat] = {}
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.step_s = self.lost_s = 0.0

    @asynccontextmanager
    async def seat(self, prompt_tokens: int) -> AsyncIterator[Seat]:
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        sequence = self.batch.add(prompt_tokens)
        seat = self._seats[sequence] = Seat(sequence)
        self._work.set()
        try:
            yield seat
        finally:
            self.batch.remove(sequence)
            del self._seats[sequence]

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        due_s = self._clock.now_s()
        while True:
            pieces = self.batch.plan()
            if not pieces:
                self._work.clear()
                if self.batch.idle:
                    await self._work.wait()
                else:
                    await self._clock.sleep(0)
                due_s = self._clock.now_s()
                continue
            lasts_s = self._engine.step_s(pieces) * self._slowdown
            due_s += lasts_s
            self.step_s += lasts_s
            late_s = self._clock.now_s() - due_s
            if late_s > 0:
                self.lost_s += late_s
                due_s += late_s
            await self._clock.sleep(max(0.0, due_s - self._clock.now_s()))
            for sequence in self.batch.finish():
                seat = self._seats.get(sequence)
                if seat is not None:
                    seat.given += 1
                    seat.more.set()
