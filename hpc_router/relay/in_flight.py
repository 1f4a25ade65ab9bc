"""How many requests are being served, and when the last of them has ended: what a drain waits for."""

import asyncio
from types import TracebackType


class InFlight:
    """`with in_flight:` around each request. `others`: how many the other processes of the same service serve."""

    __slots__ = ("_idle", "count", "others")

    def __init__(self) -> None:
        self.count = 0
        self.others = 0
        self._idle: asyncio.Event | None = None  # while somebody waits

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self) -> None:
        self.count -= 1
        if not self.count and self._idle is not None:
            self._idle.set()

    async def idle(self) -> None:
        """Until no request is in flight."""
        while self.count:
            self._idle = self._idle or asyncio.Event()
            self._idle.clear()
            await self._idle.wait()
