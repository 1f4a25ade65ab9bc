"""Idle timer of an exchange with an upstream server.

The timer runs only while data from the upstream is awaited, so that a slow client does not cause a timeout. Every event
of a stream restarts the timer. A restart must therefore be cheap: it only stores the new deadline, and a timer that
fires too early is scheduled again. Setting `activity` instead of a restart is even cheaper; the timeout then comes
after one to two times the limit.
"""

import asyncio
import math
from collections.abc import Callable


class IdleTimer:
    """Calls `on_timeout` when the upstream has sent nothing for longer than the limit.

    One object serves all exchanges of a connection (`begin`), and most of them reuse the scheduled timer. `expired`:
    whether the timeout has occurred in this exchange.
    """

    __slots__ = (
        "_deadline", "_fires_at", "_limit_s", "_loop", "_max_s", "_timer", "activity", "expired", "on_timeout",
        "started_at",
    )  # fmt: skip

    def __init__(self, on_timeout: Callable[[], None]) -> None:
        self.on_timeout = on_timeout
        self.expired = False
        self.activity = False  # data was received since the timer was scheduled
        self.started_at = 0.0  # start of the exchange on the event loop's clock
        self._limit_s = math.inf
        self._loop = asyncio.get_running_loop()
        self._max_s = math.inf
        self._deadline: float | None = None  # None while the timer is paused
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at = math.inf

    def begin(self, limit_s: float) -> None:
        """Starts the timer for another exchange. `limit_s`: seconds until the first deadline."""
        self.expired = self.activity = False
        self._max_s = math.inf
        self._limit_s = limit_s
        self.started_at = now = self._loop.time()
        self._deadline = deadline = now + limit_s
        if deadline < self._fires_at:
            self._schedule(deadline)

    def restart(self, limit_s: float) -> None:
        """Sets the deadline to `limit_s` seconds from now."""
        self._limit_s = limit_s
        self._deadline = deadline = self._loop.time() + (limit_s if limit_s < self._max_s else self._max_s)
        if deadline < self._fires_at:
            self._schedule(deadline)

    def pause(self) -> None:
        """Stops the timer until `restart` or `begin`."""
        self._deadline = None

    def end(self) -> None:
        """Cancels the timer for good, because the connection has no further exchange."""
        self._deadline = None
        self.on_timeout = _ignore
        if self._timer is not None:
            self._timer.cancel()

    def tighten(self, limit_s: float) -> None:
        """Sets the deadline to `limit_s` seconds from now. For the rest of the exchange, this is the longest limit."""
        self._max_s = limit_s
        self.activity = False
        if self._deadline is not None and not self.expired:
            self.restart(limit_s)

    def _schedule(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._fires_at = deadline
        self._timer = self._loop.call_at(deadline, self._fire)

    def _fire(self) -> None:
        self._timer, self._fires_at = None, math.inf
        if self._deadline is None:
            return
        if self.activity:
            self.activity = False
            self.restart(self._limit_s)
        elif self._deadline > self._loop.time():
            self._schedule(self._deadline)
        else:
            self.expired = True
            self.on_timeout()


def _ignore() -> None:
    """Does nothing. `end` sets it as `on_timeout`, so that the timer no longer refers to its owner."""
