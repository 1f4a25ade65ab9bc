"""The clock of a prediction: a heap of events, each a function that is called at its time."""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Calendar:
    """Calls functions in the order of their times. `now_s`: the present time in seconds, from 0."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, at_s: float, call: Callable[..., None], *arguments: Any) -> None:
        """Calls the function at the time `at_s`. Calls at the same time happen in the order of these lines."""
        self._count += 1
        heappush(self._events, (at_s, self._count, call, arguments))

    def run(self, until_s: float) -> None:
        """Handles all events up to `until_s`."""
        events = self._events
        while events and events[0][0] <= until_s:
            self.now_s, _, call, arguments = heappop(events)
            call(*arguments)
        self.now_s = until_s
