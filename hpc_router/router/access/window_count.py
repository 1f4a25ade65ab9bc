"""The counts of one user's token that the workers of a router share without a lock: requests in flight, and requests
and generated tokens of the present minute.

Each worker has cells of its own, which only it writes; a count is the sum over all workers. The cell of a count per
minute holds the number of a minute (the window) and the count within it, so a cell of an earlier minute counts as 0 and
need not be cleared. A worker first adds to its own cells and then reads those of the others; so of two workers that add
at the same time, at least one sees the other's addition. If a sum exceeds its limit, the worker takes its addition
back. When several workers compete for the last place, at most one gets it: a limit is never exceeded, but sometimes all
are refused.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Final

from hpc_router.relay.in_flight import Cells
from hpc_router.state.user_tokens import TokenLimits

WINDOW_S: Final = 60
"""Length of a window in seconds."""
TOKEN_CELLS: Final = 3
"""Number of cells of a token. They are side by side, so that a request needs few lines of the CPU's cache for them."""
_REQUESTS: Final = 1
_TOKENS: Final = 2
_SHIFT: Final = 40
MAX_COUNT: Final = 2**_SHIFT - 1
"""Maximum of a count, far above every limit."""


class Limit(StrEnum):
    """The limits of a token, by the names that errors and `hpc-router token create --limit` use."""

    CONCURRENCY = "concurrency"
    TOKENS = "tokens"
    REQUESTS = "requests"


def window_at(now: float) -> int:
    """Returns the number of the window (minute) at `now`, in seconds of the monotonic clock, which all processes of a
    node share."""
    return int(now // WINDOW_S)


def left_s(now: float) -> float:
    """Returns the seconds until the window at `now` ends."""
    return WINDOW_S - now % WINDOW_S


class LimitCounts:
    """The counts of one token, as one worker sees them. `cells`: the worker's cells, of which this object alone writes
    the `TOKEN_CELLS` from index `at` on; `peers`: those of the other workers. `in_flight`: number of
    this worker's requests in flight. `window`: number of the minute in which requests are counted. `ended`: number of
    requests that have ended; the caller may reset it."""

    __slots__ = (
        "_at", "_cells", "_ends_at", "_max_in_flight", "_max_requests", "_max_tokens", "_peers", "_requests", "_tokens",
        "ended", "in_flight", "window",
    )  # fmt: skip

    def __init__(self, cells: Cells, peers: Sequence[Cells], at: int) -> None:
        self._cells, self._peers, self._at = cells, peers, at
        self.in_flight = self._requests = self._tokens = self.ended = 0
        self.window, self._ends_at = -1, 0
        self.limit(TokenLimits())

    def limit(self, limits: TokenLimits) -> None:
        """Applies `limits` to requests that begin later."""
        self._max_in_flight = MAX_COUNT if limits.concurrency is None else limits.concurrency
        self._max_requests = MAX_COUNT if limits.requests is None else limits.requests
        self._max_tokens = MAX_COUNT if limits.tokens is None else limits.tokens

    def begin(self, now: float, reserved: int | None) -> Limit | None:
        """Counts a request that reserves `reserved` generated tokens, in the window at `now` or, if another worker has
        already counted in a later one, in that. `reserved` is None for a request without generated tokens, to which
        their limit does not apply. Returns the limit that the request would exceed, in which case nothing is counted;
        None if it was counted."""
        if now >= self._ends_at:
            self._begin_window(window_at(now))
        in_flight, requests, tokens = self.in_flight + 1, self._requests + 1, self._tokens
        if in_flight > self._max_in_flight:
            return Limit.CONCURRENCY
        if reserved is not None:
            tokens += reserved
            if tokens > self._max_tokens:
                return Limit.TOKENS
        if requests > self._max_requests:
            return Limit.REQUESTS
        cells, at = self._cells, self._at
        first = self.window << _SHIFT
        cells[at] = in_flight
        cells[at + _REQUESTS] = first + requests
        cells[at + _TOKENS] = first + tokens
        if self._peers:
            max_tokens = MAX_COUNT if reserved is None else self._max_tokens
            reached = self._of_all(in_flight, requests, tokens, max_tokens)
            if reached is not None:
                cells[at + _TOKENS] = first + self._tokens
                cells[at + _REQUESTS] = first + self._requests
                cells[at] = self.in_flight  # last, so that meanwhile others are refused for the shortest time
                if isinstance(reached, Limit):
                    return reached
                self._begin_window(reached)
                return self.begin(now, reserved)
        self.in_flight, self._requests, self._tokens = in_flight, requests, tokens
        return None

    def end(self, window: int, difference: int, now: float) -> None:
        """Counts a request as ended, and adds `difference` to the number of generated tokens that it has reserved in
        `window`. If a later window has begun, a positive difference is added to that one, and a negative one has no
        effect, because the reservation has expired with its own window."""
        cells, at = self._cells, self._at
        cells[at] = self.in_flight = self.in_flight - 1
        self.ended += 1
        if difference:
            if now >= self._ends_at:
                self._begin_window(window_at(now))
            if difference > 0 or window == self.window:
                self._tokens = tokens = min(max(self._tokens + difference, 0), MAX_COUNT)
                cells[at + _TOKENS] = (self.window << _SHIFT) + tokens

    def _of_all(self, in_flight: int, requests: int, tokens: int, max_tokens: int) -> Limit | int | None:
        """Adds the counts of the other workers to these of this worker. Returns the limit that a sum exceeds; the
        number of a later window if another worker counts in that; else None."""
        at, window = self._at, self.window
        first, end = window << _SHIFT, window + 1 << _SHIFT
        for peer in self._peers:
            in_flight += peer[at]
            more_requests, more_tokens = peer[at + _REQUESTS], peer[at + _TOKENS]
            if more_requests >= end or more_tokens >= end:
                return max(more_requests, more_tokens) >> _SHIFT
            if more_requests > first:
                requests += more_requests - first
            if more_tokens > first:
                tokens += more_tokens - first
        if in_flight > self._max_in_flight:
            return Limit.CONCURRENCY
        if tokens > max_tokens:
            return Limit.TOKENS
        return Limit.REQUESTS if requests > self._max_requests else None

    def _begin_window(self, window: int) -> None:
        """Counts in `window` from now on. What the cells already have of it stays, because another process with the
        same cells may have written that before it ended."""
        at = self._at
        requests, tokens = self._cells[at + _REQUESTS], self._cells[at + _TOKENS]
        self.window = window = max(window, requests >> _SHIFT, tokens >> _SHIFT)
        self._ends_at = (window + 1) * WINDOW_S
        self._requests = requests & MAX_COUNT if requests >> _SHIFT == window else 0
        self._tokens = tokens & MAX_COUNT if tokens >> _SHIFT == window else 0
