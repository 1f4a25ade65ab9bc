"""How long the upstream may stay silent.

The clock runs only while the upstream is waited for, so that a slow client does not make it look silent. A stream asks
for more time with every event, so that has to be cheap: a later deadline is only noted, and the timer, when it rings
too early, is set again. Cheaper still is to set `heard`, and then silence is noticed after one to two times the limit.
"""

import asyncio
import math
from collections.abc import Callable


class IdleTimer:
    """Calls `on_silence`, which its user sets, when the upstream has been silent for too long.

    It may serve one exchange after another (`begin`), and then needs a new timer for hardly any of them.
    """

    __slots__ = (
        "_deadline", "_limit_s", "_loop", "_most_s", "_rings_at", "_timer", "begun_at", "heard", "on_silence", "spent",
    )  # fmt: skip

    def __init__(self, on_silence: Callable[[], None]) -> None:
        self.on_silence = on_silence
        self.spent = False
        self.heard = False  # since the timer was set
        self.begun_at = 0.0  # on the loop's clock
        self._limit_s = math.inf
        self._loop = asyncio.get_running_loop()
        self._most_s = math.inf
        self._deadline: float | None = None  # None: nobody waits for the upstream
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = math.inf

    def begin(self, limit_s: float) -> None:
        """Wait in another exchange."""
        self.spent = self.heard = False
        self._most_s = math.inf
        self._limit_s = limit_s
        self.begun_at = now = self._loop.time()
        self._deadline = deadline = now + limit_s
        if deadline < self._rings_at:
            self._set(deadline)

    def wait(self, limit_s: float) -> None:
        """From now on, silence for `limit_s` seconds is too long."""
        self._limit_s = limit_s
        self._deadline = deadline = self._loop.time() + (limit_s if limit_s < self._most_s else self._most_s)
        if deadline < self._rings_at:
            self._set(deadline)

    def rest(self) -> None:
        self._deadline = None

    def end(self) -> None:
        """There will be no other exchange."""
        self._deadline = None
        self.on_silence = _nobody_listens
        if self._timer is not None:
            self._timer.cancel()

    def shorten(self, limit_s: float) -> None:
        """From now on no silence longer than this, whatever was asked for."""
        self._most_s = limit_s
        self.heard = False
        if self._deadline is not None and not self.spent:
            self.wait(limit_s)

    def _set(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at = deadline
        self._timer = self._loop.call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._timer, self._rings_at = None, math.inf
        if self._deadline is None:
            return
        if self.heard:
            self.heard = False
            self.wait(self._limit_s)
        elif self._deadline > self._loop.time():
            self._set(self._deadline)
        else:
            self.spent = True
            self.on_silence()


def _nobody_listens() -> None:
    """So that whoever did can be forgotten."""
