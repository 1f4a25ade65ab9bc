"""Counts per minute that the workers of a router share without a lock.

Each worker has one cell per count, which only it writes; the count is the sum over all workers. A cell holds the number
of a minute (the window) and the count within it, so a cell of an earlier minute counts as 0 and need not be cleared. A
worker first adds to its own cell and then reads those of the others; so of two workers that add at the same time, at
least one sees the other's addition. If the sum exceeds the limit, the worker takes its addition back. When several
workers compete for the last place, at most one gets it: the limit is never exceeded, but sometimes all are refused.
"""

from collections.abc import Sequence
from typing import Final

from hpc_router.relay.in_flight import Cells

WINDOW_S: Final = 60
"""Length of a window in seconds."""
_SHIFT: Final = 40
MAX_COUNT: Final = 2**_SHIFT - 1
"""Maximum of a count, far above every limit."""


def window_at(now: float) -> int:
    """Returns the number of the window (minute) at `now`, in seconds of the monotonic clock, which all processes of a
    node share."""
    return int(now // WINDOW_S)


def left_s(now: float) -> float:
    """Returns the seconds until the window at `now` ends."""
    return WINDOW_S - now % WINDOW_S


def try_add(cells: Cells, peers: Sequence[Cells], at: int, window: int, amount: int, limit: int) -> int | None:
    """Adds `amount` to this worker's cell with the index `at` if the sum over all workers stays within `limit`.
    `window`: the present window. Returns the window to which the amount was added, which is a later one if another
    worker has already counted in that; None if nothing was added."""
    while True:
        cell = cells[at]
        own = cell & MAX_COUNT if cell >> _SHIFT == window else 0
        if amount > limit - own:
            return None
        cells[at] = window << _SHIFT | own + amount
        total = own + amount
        for peer in peers:
            cell = peer[at]
            of = cell >> _SHIFT
            if of == window:
                total += cell & MAX_COUNT
            elif of > window:
                break
        else:
            if total <= limit:
                return window
            cells[at] = window << _SHIFT | own
            return None
        window = of


def settle(cells: Cells, at: int, added_in: int, window: int, difference: int) -> None:
    """Corrects an amount that `try_add` has added in the window `added_in`: adds `difference`. `window`: the present
    window. If it is a later one, a positive difference is added to it, and a negative one has no effect, because the
    amount has expired with its own window."""
    cell = cells[at]
    of, count = cell >> _SHIFT, cell & MAX_COUNT
    if of < window:
        of, count = window, 0
    if difference < 0 and of != added_in:
        return
    count += difference
    cells[at] = of << _SHIFT | (count if 0 <= count <= MAX_COUNT else MAX_COUNT if count > 0 else 0)
