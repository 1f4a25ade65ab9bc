"""Who may still come in, and when to come again. No I/O, no clock.

Three bounds, each on what all workers have together: requests in the router, requests of an expert on its replicas
(a replica has its own, its capacity), and requests that wait for one expert. Who is refused is told to come again when
those who wait now will have had their turn, at the pace at which the queue has moved of late.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from hpc_router.config.adapters import host_of
from hpc_router.config.schema import Deployment

WINDOW_S: Final = 30.0
"""What a queue did before that says nothing of now."""
PAUSE_S: Final = 1.0
"""A queue that was empty for no longer has not begun anew."""
MIN_WAIT_S: Final = 1.0
MAX_WAIT_S: Final = 600.0
UNKNOWN_S: Final = 2.0
"""Of a queue of which nobody has left yet."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """`waiting`: per expert. `in_flight`: of the experts that have a bound of their own beside their replicas'."""

    waiting: int
    in_flight: Mapping[str, int] = field(default_factory=dict)


def bounds_of(deployment: Deployment) -> QueueLimits:
    """Experts on one engine have one bound, on all that is in flight there together."""
    experts = deployment.experts
    bounds = {name: experts[host_of(experts, name)].max_in_flight for name in experts}
    return QueueLimits(deployment.router.max_waiting, {name: most for name, most in bounds.items() if most is not None})


def should_spill(*, margin: float, wait_s: float, per_s: float) -> bool:
    """Whether to wait so long costs more than the score that the next best expert is behind. `per_s`: what a second
    is worth."""
    return wait_s * per_s > margin


@dataclass(slots=True)
class DepartureRate:
    """How a queue moves: its departures, and since when they are counted."""

    _since: float = 0.0
    _left: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=256))

    def began(self, now: float) -> None:
        """Somebody waits where nobody did."""
        if not self._left or now - self._left[-1][0] > PAUSE_S:
            self._left.clear()
            self._since = now

    def left(self, now: float, count: int = 1) -> None:
        if len(self._left) == self._left.maxlen:
            self._since = self._left[0][0]
        self._left.append((now, count))

    def per_s(self, now: float) -> float | None:
        """None: nobody has left of late."""
        while self._left and self._left[0][0] < now - WINDOW_S:
            self._since = self._left.popleft()[0]
        count = sum(count for _, count in self._left)
        return count / max(now - max(self._since, now - WINDOW_S), 1e-3) if count else None

    def wait_s(self, waiting: int, now: float) -> float:
        """Until so many have left."""
        per_s = self.per_s(now)
        if per_s is None:
            expected_s = max(UNKNOWN_S, now - self._since) if waiting and self._since else UNKNOWN_S
        else:
            expected_s = waiting / per_s
        return min(max(expected_s, MIN_WAIT_S), MAX_WAIT_S)
