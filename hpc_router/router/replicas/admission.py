"""Admission limits, and the Retry-After of a refused request. No I/O, no clock.

Three limits, each over all workers: requests in the router, requests in flight on an expert's replicas (each replica
also has its capacity), and requests that wait for one expert. Retry-After is the queue length divided by the recent
departure rate.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from hpc_router.config.adapters import host_of
from hpc_router.config.schema import Deployment

RATE_WINDOW_S: Final = 30.0
"""Sliding window of the departure rate, in seconds."""
MAX_EMPTY_S: Final = 1.0
"""A queue that was empty for no longer keeps its departure rate."""
MIN_WAIT_S: Final = 1.0
MAX_WAIT_S: Final = 600.0
DEFAULT_WAIT_S: Final = 2.0
"""Expected wait in a queue that has had no departure yet."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """`waiting`: per expert. `in_flight`: by expert, for those with a limit beside their replicas' capacity."""

    waiting: int
    in_flight: Mapping[str, int] = field(default_factory=dict)


def queue_limits(deployment: Deployment) -> QueueLimits:
    """Experts that share one engine share its limit."""
    experts = deployment.experts
    limits = {name: experts[host_of(experts, name)].max_in_flight for name in experts}
    return QueueLimits(
        deployment.router.max_waiting, {name: limit for name, limit in limits.items() if limit is not None}
    )


def should_spill(*, margin: float, wait_s: float, per_s: float) -> bool:
    """Whether waiting costs more than the next best expert's lower score. `per_s`: score lost per second of waiting."""
    return wait_s * per_s > margin


@dataclass(slots=True)
class DepartureRate:
    """How many requests per second leave a queue for a replica, over the last `RATE_WINDOW_S`."""

    _since: float = 0.0
    _departures: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=256))

    def began(self, now: float) -> None:
        """The queue is not empty any more."""
        if not self._departures or now - self._departures[-1][0] > MAX_EMPTY_S:
            self._departures.clear()
            self._since = now

    def left(self, now: float, count: int = 1) -> None:
        if len(self._departures) == self._departures.maxlen:
            self._since = self._departures[0][0]
        self._departures.append((now, count))

    def per_s(self, now: float) -> float | None:
        """None without a departure in the window."""
        while self._departures and self._departures[0][0] < now - RATE_WINDOW_S:
            self._since = self._departures.popleft()[0]
        count = sum(count for _, count in self._departures)
        return count / max(now - max(self._since, now - RATE_WINDOW_S), 1e-3) if count else None

    def wait_s(self, waiting: int, now: float) -> float:
        """Expected time until `waiting` requests have left, between `MIN_WAIT_S` and `MAX_WAIT_S`."""
        per_s = self.per_s(now)
        if per_s is None:
            expected_s = max(DEFAULT_WAIT_S, now - self._since) if waiting and self._since else DEFAULT_WAIT_S
        else:
            expected_s = waiting / per_s
        return min(max(expected_s, MIN_WAIT_S), MAX_WAIT_S)
