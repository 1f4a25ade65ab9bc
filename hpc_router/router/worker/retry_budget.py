"""How many failed attempts may be made up for elsewhere, so that trouble is not multiplied. No I/O, no clock.

A share of the requests within a window, plus a minimum for when there are few. An attempt whose replica was lost by it
need not be counted: that ends by itself, because each replica is lost once.
"""

from dataclasses import dataclass
from typing import Final

WINDOW_S: Final = 10.0


@dataclass(slots=True)
class RetryBudget:
    """`share` of the requests, `least_per_s` in any case. Two windows are looked at, the last one and the present."""

    share: float
    least_per_s: float
    _began: float = 0.0
    _requests: tuple[int, int] = (0, 0)  # how many there had been when each of the two windows began
    _retries: tuple[int, int] = (0, 0)  # within each

    def take(self, now: float, *, requests: int) -> bool:
        """One more. `requests`: all there ever were."""
        self._turn(now, requests)
        allowed = self.share * (requests - self._requests[0]) + self.least_per_s * WINDOW_S
        if sum(self._retries) >= allowed:
            return False
        self._retries = self._retries[0], self._retries[1] + 1
        return True

    def _turn(self, now: float, requests: int) -> None:
        elapsed_s = now - self._began
        if elapsed_s < WINDOW_S:
            return
        if elapsed_s < 2 * WINDOW_S:
            self._requests, self._retries = (self._requests[1], requests), (self._retries[1], 0)
        else:  # nobody knows how many there were of late
            self._requests, self._retries = (requests, requests), (0, 0)
        self._began = now
