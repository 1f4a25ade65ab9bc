"""Admits requests: at most `capacity` requests run at the same time, and the others wait in order of arrival.

One context manager (`admit`) holds a request from arrival to end and counts how it ended. The gauges therefore return
to zero for any end (a disconnected client, a fault, an error). When the engine stops, `EngineStopped` is raised in a
request that waits for its next token. A request that waits for admission is then admitted at once, and gets
`EngineStopped` before its first token. This module does not know HTTP.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from hpc_router.sim.metrics import Outcome, RequestCounts, RequestPhase


@dataclass(slots=True, eq=False)
class Ticket:
    """The admission of one request. `outcome` is an error unless another outcome is set."""

    phase: RequestPhase = RequestPhase.QUEUED
    outcome: Outcome = Outcome.ERROR
    stopped: bool = False
    _task: asyncio.Task[object] | None = field(default_factory=asyncio.current_task)
    _waiting: bool = False

    async def wait(self, awaitable: Awaitable[object]) -> None:
        """Awaits `awaitable`. Raises EngineStopped if the engine stops before it is done."""
        self._waiting = True
        try:
            await awaitable
        except asyncio.CancelledError:
            if not self.stopped or self._task is None or self._task.uncancel():
                raise  # the client has disconnected as well
        finally:
            self._waiting = False
        if self.stopped:
            raise EngineStopped

    def stop(self) -> None:
        self.stopped = True
        if self._waiting and self._task is not None:
            self._task.cancel()


class EngineStopped(Exception):
    """Raised when the engine stops. The response then ends after the tokens that were already produced."""


class AdmissionQueue:
    """The queue of one engine, which limits the running requests to `capacity` and counts all requests."""

    def __init__(self, *, capacity: int | None) -> None:
        self.counts = RequestCounts()
        self._places = asyncio.Semaphore(capacity) if capacity is not None else None
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._tickets: set[Ticket] = set()

    def refuse(self) -> None:
        """Makes every request that arrives from now on end with EngineStopped."""
        self._stopping = True

    def stop(self) -> None:
        """Makes every request that runs, waits or arrives later end with EngineStopped."""
        self.refuse()
        for ticket in tuple(self._tickets):
            ticket.stop()

    async def idle(self) -> None:
        """Waits until no request runs or waits."""
        await self._idle.wait()

    @asynccontextmanager
    async def admit(self, *, prompt_tokens: int) -> AsyncIterator[Ticket]:
        """Waits until the request may run, yields its ticket, and counts its outcome at the end."""
        ticket = Ticket(stopped=self._stopping)
        self._tickets.add(ticket)
        self._idle.clear()
        self.counts.waiting += 1
        try:
            async with self._place(ticket):
                self.counts.waiting -= 1
                self.counts.running += 1
                ticket.phase = RequestPhase.BEFORE_FIRST_TOKEN
                self.counts.prompt_tokens += prompt_tokens
                yield ticket
        except (asyncio.CancelledError, ConnectionError):
            ticket.outcome = Outcome.ABORT
            self.counts.aborted[ticket.phase] += 1
            raise
        except EngineStopped:
            ticket.outcome = Outcome.ABORT
            raise
        finally:
            self._tickets.discard(ticket)
            if ticket.phase is RequestPhase.QUEUED:
                self.counts.waiting -= 1
            else:
                self.counts.running -= 1
            self.counts.finished[ticket.outcome] += 1
            if not self.counts.running and not self.counts.waiting:
                self._idle.set()

    @asynccontextmanager
    async def _place(self, ticket: Ticket) -> AsyncIterator[None]:
        """Waits for a free place and holds it during the block. If the engine stops, enters the block without a
        place."""
        places = None if ticket.stopped else self._places
        if places is not None:
            try:
                await ticket.wait(places.acquire())
            except EngineStopped:
                places = None
        try:
            yield
        finally:
            if places is not None:
                places.release()
