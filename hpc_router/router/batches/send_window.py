"""How many requests of a batch are in flight at once: as many as the router takes without refusing. Pure.

The number doubles with each round of responses until the router first refuses a request (a limit of the user's token,
a full queue, no ready replica). From then on a refusal halves it, at most once per `HOLD_S`, and each round of
responses adds one.
"""

from typing import Final

FIRST: Final = 8
"""Number of requests in flight at the start."""
HOLD_S: Final = 1.0


class SendWindow:
    """The number of requests that may be in flight, from 1 to `maximum`."""

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._size = float(min(FIRST, maximum))
        self._refused_at: float | None = None

    @property
    def size(self) -> int:
        return int(self._size)

    def answered(self) -> None:
        """A request has got its result."""
        step = 1.0 if self._refused_at is None else 1.0 / self._size
        self._size = min(float(self._maximum), self._size + step)

    def refused(self, now: float) -> None:
        """A request must be sent again. `now`: monotonic seconds."""
        if self._refused_at is None or now - self._refused_at >= HOLD_S:
            self._refused_at = now
            self._size = max(1.0, self._size / 2)
