"""How many requests are being served, and when the last of them has ended: what a drain waits for."""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol


class Cells(Protocol):
    """Where one process counts for others to see."""

    def __getitem__(self, at: int, /) -> int: ...
    def __setitem__(self, at: int, value: int, /) -> None: ...


class InFlight:
    """`with in_flight:` around each request. Counted in a cell of `cells`, the other processes' in those of `peers`.
    `closing`: no connection is to bring another one."""

    __slots__ = ("_at", "_cells", "_idle", "_peers", "closing", "count")

    def __init__(self, cells: Cells | None = None, peers: Sequence[Cells] = (), at: int = 0) -> None:
        self.count = 0
        self.closing = False
        self._cells: Cells = [0] if cells is None else cells
        self._peers = peers
        self._at = at
        self._idle: asyncio.Event | None = None  # while somebody waits

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
        """With those that the other processes of the same service serve now."""
        count = self.count
        for row in self._peers:
            count += row[self._at]
        return count

    async def idle(self) -> None:
        """Until no request is in flight."""
        while self.count:
            self._idle = self._idle or asyncio.Event()
            self._idle.clear()
            await self._idle.wait()
