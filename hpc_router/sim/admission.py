"""Who computes and who waits: places for `capacity` requests at once, first come first served beyond it.

One context manager holds a request from arrival to end and files how it ended, so that whatever happens (a client
that leaves, a fault, an error) the gauges return to zero. When the engine stops, `Stopped` is raised where a request
waits for its next token, and one that waits for a place gets none. Knows no HTTP.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from hpc_router.sim.metrics import Outcome, RequestCounts, RequestPhase


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's place. An end that nobody explains is an error."""

    phase: RequestPhase = RequestPhase.QUEUED
    outcome: Outcome = Outcome.ERROR
    stopped: bool = False
    _task: asyncio.Task[object] | None = field(default_factory=asyncio.current_task)
    _waits: bool = False

    async def wait(self, awaitable: Awaitable[object]) -> None:
        """Raises Stopped when the engine stops meanwhile."""
        self._waits = True
        try:
            await awaitable
        except asyncio.CancelledError:
            if not self.stopped or self._task is None or self._task.uncancel():
                raise  # its client has left as well
        finally:
            self._waits = False
        if self.stopped:
            raise Stopped

    def stop(self) -> None:
        self.stopped = True
        if self._waits and self._task is not None:
            self._task.cancel()


class Stopped(Exception):
    """The engine stops: the answer ends here."""


class Scheduler:
    def __init__(self, *, capacity: int | None) -> None:
        self.counts = RequestCounts()
        self._places = asyncio.Semaphore(capacity) if capacity is not None else None
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._tickets: set[Ticket] = set()

    def refuse(self) -> None:
        """From now on a request is stopped where it arrives."""
        self._stopping = True

    def stop(self) -> None:
        """End what runs or waits."""
        self.refuse()
        for ticket in tuple(self._tickets):
            ticket.stop()

    async def idle(self) -> None:
        """Wait until nothing runs or waits."""
        await self._idle.wait()

    @asynccontextmanager
    async def admit(self, *, prompt_tokens: int) -> AsyncIterator[Ticket]:
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
        except Stopped:
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
        """None is needed by a request that is stopped before it runs."""
        places = None if ticket.stopped else self._places
        if places is not None:
            try:
                await ticket.wait(places.acquire())
            except Stopped:
                places = None
        try:
            yield
        finally:
            if places is not None:
                places.release()
