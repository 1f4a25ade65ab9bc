"""Retry budget: limits retries to a share of requests, so that an outage does not become a retry storm.

The budget is a share of the requests within a sliding window, plus a minimum rate for times with few requests. The
caller need not count retries after the loss of a replica, because each replica is lost only once. No I/O, no clock.
"""

from dataclasses import dataclass
from typing import Final

WINDOW_S: Final = 10.0
"""Length in seconds of each of the two intervals that make up the sliding window."""


@dataclass(slots=True)
class RetryBudget:
    """The number of retries in the current and the previous interval of `WINDOW_S` seconds, and their limit: `share`
    retries per request, and in addition `least_per_s` retries per second."""

    share: float
    least_per_s: float
    _started_at: float = 0.0
    _requests: tuple[int, int] = (0, 0)  # total at the start of each of the two intervals
    _retries: tuple[int, int] = (0, 0)  # retries in each of the two intervals

    def try_retry(self, now: float, *, requests: int) -> bool:
        """Returns whether the budget allows a retry, and counts the retry if so. `requests`: number of requests since
        the start of the worker."""
        self._advance(now, requests)
        allowed = self.share * (requests - self._requests[0]) + self.least_per_s * WINDOW_S
        if sum(self._retries) >= allowed:
            return False
        self._retries = self._retries[0], self._retries[1] + 1
        return True

    def _advance(self, now: float, requests: int) -> None:
        elapsed_s = now - self._started_at
        if elapsed_s < WINDOW_S:
            return
        if elapsed_s < 2 * WINDOW_S:
            self._requests, self._retries = (self._requests[1], requests), (self._retries[1], 0)
        else:  # the number of recent requests is unknown
            self._requests, self._retries = (requests, requests), (0, 0)
        self._started_at = now
