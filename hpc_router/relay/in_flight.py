"""Counts the requests that are being served, over all processes of a service. A drain waits until the count is 0."""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol


class Cells(Protocol):
    """An array of counters that other processes can read."""

    def __getitem__(self, at: int, /) -> int: ...
    def __setitem__(self, at: int, value: int, /) -> None: ...


class InFlight:
    """The number of requests that this process serves; use `with in_flight:` around each request.

    The count is written to `cells[at]`, where the other processes of the service read it; `peers` are their arrays,
    with their counts at the same index. `closing`: whether each connection is closed after its current response.
    """

    __slots__ = ("_at", "_cells", "_idle", "_peers", "closing", "count")

    def __init__(self, cells: Cells | None = None, peers: Sequence[Cells] = (), at: int = 0) -> None:
        self.count = 0
        self.closing = False
        self._cells: Cells = [0] if cells is None else cells
        self._peers = peers
        self._at = at
        self._idle: asyncio.Event | None = None  # only while `idle` is awaited

    def __enter__(self) -> None:
        self.enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()

    def enter(self) -> None:
        self.count += 1
        self._cells[self._at] = self.count

    def leave(self) -> None:
        self.count -= 1
        self._cells[self._at] = self.count
        if not self.count and self._idle is not None:
            self._idle.set()

    @property
    def total(self) -> int:
        """The number of requests that all processes of the service are serving."""
        count = self.count
        for row in self._peers:
            count += row[self._at]
        return count

    async def idle(self) -> None:
        """Waits until no request is in flight."""
        while self.count:
            self._idle = self._idle or asyncio.Event()
            self._idle.clear()
            await self._idle.wait()
