"""Counts per minute that several workers share without a lock."""

from collections import defaultdict
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from hpc_router.router.access.window_count import WINDOW_S, left_s, settle, try_add, window_at

AT = 3


class SteppedCells(defaultdict[int, int]):
    """Cells that run one step of another worker at chosen accesses, so that workers interleave at any of them."""

    def __init__(self, between: Callable[[], None]) -> None:
        super().__init__(int)
        self._between = between

    def __getitem__(self, at: int) -> int:
        self._between()
        return super().__getitem__(at)

    def __setitem__(self, at: int, value: int) -> None:
        super().__setitem__(at, value)
        self._between()


def test_a_window_is_a_minute() -> None:
    assert window_at(59.9) == 0
    assert window_at(60.0) == 1
    assert left_s(60.0) == WINDOW_S
    assert left_s(119.0) == 1.0


def test_the_limit_itself_is_admitted_and_one_more_is_not() -> None:
    mine, other = defaultdict[int, int](int), defaultdict[int, int](int)
    assert try_add(mine, (other,), AT, 7, 2, 5) == 7
    assert try_add(other, (mine,), AT, 7, 3, 5) == 7
    assert try_add(mine, (other,), AT, 7, 1, 5) is None
    assert try_add(mine, (other,), AT, 8, 5, 5) == 8, "the next window starts at 0"


def test_a_refused_amount_is_taken_back() -> None:
    mine, other = defaultdict[int, int](int), defaultdict[int, int](int)
    assert try_add(other, (mine,), AT, 7, 4, 5) == 7
    assert try_add(mine, (other,), AT, 7, 2, 5) is None
    assert try_add(mine, (other,), AT, 7, 1, 5) == 7


def test_a_worker_whose_clock_was_read_before_the_turn_of_the_minute_counts_in_the_new_one() -> None:
    """Another worker is in the new window already, and its count of the old one is gone."""
    mine, other = defaultdict[int, int](int), defaultdict[int, int](int)
    assert try_add(other, (mine,), AT, 7, 5, 5) == 7
    assert try_add(other, (mine,), AT, 8, 5, 5) == 8
    assert try_add(mine, (other,), AT, 7, 1, 5) is None
    assert try_add(mine, (other,), AT, 7, 1, 6) == 8


def test_a_reservation_is_settled_in_its_window_only() -> None:
    cells = defaultdict[int, int](int)
    assert try_add(cells, (), AT, 7, 10, 10) == 7
    settle(cells, AT, 7, 7, -4)
    assert try_add(cells, (), AT, 7, 5, 10) is None
    assert try_add(cells, (), AT, 7, 4, 10) == 7
    settle(cells, AT, 7, 8, -4)
    assert try_add(cells, (), AT, 8, 10, 10) == 8, "nothing is given back that the new window has not lent"
    settle(cells, AT, 7, 9, 3)
    assert try_add(cells, (), AT, 9, 8, 10) is None
    assert try_add(cells, (), AT, 9, 7, 10) == 9, "what was generated beyond the reservation counts when it is known"


@given(
    additions=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=14),
    limit=st.integers(1, 20),
    data=st.data(),
)
def test_the_limit_is_never_exceeded_however_workers_interleave(
    additions: list[tuple[int, int]], limit: int, data: st.DataObject
) -> None:
    """At any access to a cell, another worker may run an addition of its own."""
    left, admitted, busy = list(additions), [0], set[int]()

    def between() -> None:
        interleaves: bool = data.draw(st.booleans())
        if left and interleaves:
            run_next()

    rows = [SteppedCells(between) for _ in range(4)]

    def run_next() -> None:
        worker, amount = left.pop()
        if worker in busy:  # a worker does one thing at a time
            return
        busy.add(worker)
        peers = [row for row in rows if row is not rows[worker]]
        if try_add(rows[worker], peers, AT, 7, amount, limit) is not None:
            admitted[0] += amount
        busy.discard(worker)
        assert admitted[0] <= limit

    while left:
        run_next()
    assert admitted[0] <= limit
