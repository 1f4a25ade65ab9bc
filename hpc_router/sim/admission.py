"""Admits requests: at most `capacity` requests run at the same time, and the others wait in order of arrival, or of
priority.

One context manager (`admit`) surrounds the work on a request and counts how the request ended, so that the numbers of
running and waiting requests are right after any end (a disconnected client, a fault, an error). When the engine stops,
a request that waits for its next token gets `EngineStopped`. A request that waits for admission is then admitted at
once, and gets `EngineStopped` before its first token. This module does not know HTTP.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from heapq import heappop, heappush

from hpc_router.sim.metrics import Outcome, RequestCounts, RequestPhase


@dataclass(slots=True, eq=False)
class Ticket:
    """The admission of one request. `outcome`: how the request ended; an error until something else is set."""

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


class Places:
    """A limited number of places. A free place goes to the waiting request with the lowest priority value; of several
    with the same value, to the one that came first."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._arrived = 0
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    async def acquire(self, priority: int) -> None:
        """Waits for a place."""
        if self._free:
            self._free -= 1
            return
        self._arrived += 1
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heappush(self._waiting, (priority, self._arrived, granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.release()  # granted in the same step as the cancellation
            raise

    def release(self) -> None:
        while self._waiting:
            granted = heappop(self._waiting)[2]
            if not granted.done():
                granted.set_result(None)
                return
        self._free += 1


class AdmissionQueue:
    """The queue of one engine, which limits the running requests to `capacity` and counts all requests. `by_priority`:
    whether waiting requests are admitted by their priority."""

    def __init__(self, *, capacity: int | None, by_priority: bool = False) -> None:
        self.counts = RequestCounts()
        self._places = Places(capacity) if capacity is not None else None
        self._by_priority = by_priority
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
        """Waits until no request is running or waiting."""
        await self._idle.wait()

    @asynccontextmanager
    async def admit(self, *, prompt_tokens: int, priority: int = 0) -> AsyncIterator[Ticket]:
        """Yields the ticket of a request once it may run. At the end of the block, counts the ticket's outcome."""
        ticket = Ticket(stopped=self._stopping)
        self._tickets.add(ticket)
        self._idle.clear()
        self.counts.waiting += 1
        try:
            async with self._place(ticket, priority if self._by_priority else 0):
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
    async def _place(self, ticket: Ticket, priority: int) -> AsyncIterator[None]:
        """Waits for a free place and holds it during the block. If the engine stops, enters the block without a
        place."""
        places = None if ticket.stopped else self._places
        if places is not None:
            try:
                await ticket.wait(places.acquire(priority))
            except EngineStopped:
                places = None
        try:
            yield
        finally:
            if places is not None:
                places.release()
