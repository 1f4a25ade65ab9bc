"""Who computes and who waits: places for `capacity` requests at once, first come first served beyond it.

One context manager holds a request from arrival to end and files how it ended, so that whatever happens (a client
that leaves, a fault, an error) the gauges return to zero. Knows no HTTP.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass

from hpc_router.expert.sim.metrics import Counts, Outcome, Phase


@dataclass(slots=True)
class Ticket:
    """One request's place. An end that nobody explains is an error."""

    phase: Phase = Phase.QUEUED
    outcome: Outcome = Outcome.ERROR


class Scheduler:
    def __init__(self, *, capacity: int | None) -> None:
        self.counts = Counts()
        self._places = asyncio.Semaphore(capacity) if capacity is not None else None
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Wait until nothing runs or waits."""
        await self._idle.wait()

    @asynccontextmanager
    async def admit(self, *, prompt_tokens: int) -> AsyncIterator[Ticket]:
        ticket = Ticket()
        self._idle.clear()
        self.counts.waiting += 1
        try:
            async with self._places or nullcontext():
                self.counts.waiting -= 1
                self.counts.running += 1
                ticket.phase = Phase.BEFORE_FIRST_TOKEN
                self.counts.prompt_tokens += prompt_tokens
                yield ticket
        except (asyncio.CancelledError, ConnectionError):
            ticket.outcome = Outcome.ABORT
            self.counts.aborted[ticket.phase] += 1
            raise
        finally:
            if ticket.phase is Phase.QUEUED:
                self.counts.waiting -= 1
            else:
                self.counts.running -= 1
            self.counts.finished[ticket.outcome] += 1
            if not self.counts.running and not self.counts.waiting:
                self._idle.set()
