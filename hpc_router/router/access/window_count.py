"""Counts per minute that the workers of a router share without a lock.

Each worker has one cell per count, which only it writes; the count is the sum over all workers. A cell holds the number
of its minute and the count within that minute, so that a cell of an earlier minute counts as 0 and is never cleared. A
worker first adds and then reads the cells of the others, which takes the interpreter far longer than a store takes to
become visible. Of several workers that take the last place at once, all but one or all see a sum above the limit and
take their addition back: the limit is never exceeded, and at worst both of two are refused where one fitted.
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
    """Returns the number of the window at `now` (seconds of the monotonic clock, which all processes of a node
    share)."""
    return int(now // WINDOW_S)


def left_s(now: float) -> float:
    """Returns the seconds until the window at `now` ends."""
    return WINDOW_S - now % WINDOW_S


def try_add(cells: Cells, peers: Sequence[Cells], at: int, window: int, amount: int, limit: int) -> int | None:
    """Adds `amount` to this worker's cell `at` if the sum over all workers stays within `limit`. Returns the window in
    which it was added; None if it was not. That is a later window if another worker is in it already."""
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
    """Corrects what was added in the window `added_in` by `difference`. `window`: the present one. In a later window,
    only more is added: what was added too much has expired with its window."""
    cell = cells[at]
    of = max(window, cell >> _SHIFT)
    if difference < 0 and of != added_in:
        return
    count = difference + (cell & MAX_COUNT if cell >> _SHIFT == of else 0)
    cells[at] = of << _SHIFT | (0 if count < 0 else count if count <= MAX_COUNT else MAX_COUNT)
