"""Admission limits, and the Retry-After of a rejected request. No I/O, no clock.

Three counts are limited, each summed over all workers: requests in the router, requests in flight on an expert's
replicas (each replica also has its own capacity), and requests that wait for one expert. Retry-After is the queue
length divided by the recent departure rate.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from hpc_router.config.adapters import host_of
from hpc_router.config.schema import Deployment
from hpc_router.router.replicas.fair_order import CLASSES

RATE_WINDOW_S: Final = 30.0
"""Length in seconds of the sliding window over which the departure rate is measured."""
MAX_EMPTY_S: Final = 1.0
"""Maximum time in seconds that a queue may be empty without losing its measured departure rate."""
MIN_WAIT_S: Final = 1.0
"""Minimum of the expected wait in seconds."""
MAX_WAIT_S: Final = 600.0
"""Maximum of the expected wait in seconds."""
DEFAULT_WAIT_S: Final = 2.0
"""Expected wait in seconds for a queue that has had no departure yet."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """The limits of requests per expert.

    `waiting`: maximum number of requests that wait for one expert. `in_flight`: by expert, the maximum number of
    requests in flight; an expert that is not in it is limited by the capacity of its replicas only. `classes`: for each
    class of requests, the maximum number in flight per expert; None without a limit. `weights`: for each class, its
    share of the places relative to the other classes.
    """

    waiting: int
    in_flight: Mapping[str, int] = field(default_factory=dict)
    classes: tuple[int | None, ...] = (None,) * len(CLASSES)
    weights: tuple[float, ...] = (1.0,) * len(CLASSES)
    limits_classes: bool = field(init=False)
    limits_experts: bool = field(init=False)

    def __post_init__(self) -> None:
        limits_classes = any(limit is not None for limit in self.classes)
        object.__setattr__(self, "limits_classes", limits_classes)
        object.__setattr__(self, "limits_experts", limits_classes or bool(self.in_flight))


def queue_limits(deployment: Deployment) -> QueueLimits:
    """Returns the configured limits. An adapter shares its host's `max_in_flight`, because they have one engine."""
    experts = deployment.experts
    limits = {name: experts[host_of(experts, name)].max_in_flight for name in experts}
    classes = [getattr(deployment.router.classes, of.label) for of in CLASSES]
    return QueueLimits(
        deployment.router.max_waiting,
        {name: limit for name, limit in limits.items() if limit is not None},
        tuple(each.max_in_flight for each in classes),
        tuple(each.weight for each in classes),
    )


def should_spill(*, margin: float, wait_s: float, per_s: float) -> bool:
    """Returns whether a request should go to the next best expert, because the wait for the best one costs more than
    the lower score. `margin`: by how much the next best expert's score is lower. `wait_s`: expected wait in seconds.
    `per_s`: loss of score that one second of waiting is worth."""
    return wait_s * per_s > margin


@dataclass(slots=True)
class DepartureRate:
    """Measures the rate, in requests per second, at which requests leave a queue because they got a replica. It covers
    the last `RATE_WINDOW_S`."""

    _since: float = 0.0
    _departures: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=256))

    def began(self, now: float) -> None:
        """Records that a request has joined an empty queue. If the last departure is more than `MAX_EMPTY_S` ago,
        forgets all departures."""
        if not self._departures or now - self._departures[-1][0] > MAX_EMPTY_S:
            self._departures.clear()
            self._since = now

    def left(self, now: float, count: int = 1) -> None:
        """Records that `count` requests left the queue at the time `now`, because they got a replica."""
        if len(self._departures) == self._departures.maxlen:
            self._since = self._departures[0][0]
        self._departures.append((now, count))

    def per_s(self, now: float) -> float | None:
        """Returns the departures per second; None if there was none within the window."""
        while self._departures and self._departures[0][0] < now - RATE_WINDOW_S:
            self._since = self._departures.popleft()[0]
        count = sum(count for _, count in self._departures)
        return count / max(now - max(self._since, now - RATE_WINDOW_S), 1e-3) if count else None

    def wait_s(self, waiting: int, now: float) -> float:
        """Returns the expected time in seconds until `waiting` requests have left the queue, between `MIN_WAIT_S` and
        `MAX_WAIT_S`."""
        per_s = self.per_s(now)
        if per_s is None:
            expected_s = max(DEFAULT_WAIT_S, now - self._since) if waiting and self._since else DEFAULT_WAIT_S
        else:
            expected_s = waiting / per_s
        return min(max(expected_s, MIN_WAIT_S), MAX_WAIT_S)
