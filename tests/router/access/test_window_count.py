"""The counts of a token that several workers share without a lock."""

from collections import defaultdict
from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from hpc_router.relay.in_flight import Cells
from hpc_router.router.access.window_count import WINDOW_S, Limit, LimitCounts, left_s, window_at
from hpc_router.state.user_tokens import TokenLimits

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


def workers(limits: TokenLimits, count: int = 2) -> list[LimitCounts]:
    rows = [defaultdict[int, int](int) for _ in range(count)]
    return [counts(row, rows, limits) for row in rows]


def counts(row: Cells, rows: Sequence[Cells], limits: TokenLimits) -> LimitCounts:
    made = LimitCounts(row, [other for other in rows if other is not row], AT)
    made.limit(limits)
    return made


def test_a_window_is_a_minute() -> None:
    assert window_at(59.9) == 0
    assert window_at(60.0) == 1
    assert left_s(60.0) == WINDOW_S
    assert left_s(119.0) == 1.0
    mine, _ = workers(TokenLimits(requests=1))
    assert mine.begin(60.0, 0) is None
    assert mine.begin(119.9, 0) is Limit.REQUESTS
    assert mine.begin(120.0, 0) is None


def test_the_limit_itself_is_admitted_and_one_more_is_not() -> None:
    mine, other = workers(TokenLimits(tokens=5))
    assert mine.begin(420.0, 2) is None
    assert other.begin(420.0, 3) is None
    assert mine.begin(420.0, 1) is Limit.TOKENS
    assert mine.begin(480.0, 5) is None, "the next window starts at 0"


def test_a_refused_amount_is_taken_back() -> None:
    mine, other = workers(TokenLimits(tokens=5, requests=2, concurrency=2))
    assert other.begin(420.0, 4) is None
    assert mine.begin(420.0, 2) is Limit.TOKENS
    assert mine.begin(420.0, 1) is None
    assert other.begin(420.0, 0) is Limit.CONCURRENCY
    other.end(7, 0, 420.0)
    assert mine.begin(420.0, 0) is Limit.REQUESTS


def test_a_worker_whose_clock_was_read_before_the_turn_of_the_minute_counts_in_the_new_one() -> None:
    """Another worker is in the new window already, and its count of the old one is gone."""
    mine, other = workers(TokenLimits(tokens=6))
    assert other.begin(479.9, 5) is None
    assert other.begin(480.0, 5) is None
    assert mine.begin(479.9, 2) is Limit.TOKENS
    assert mine.begin(479.9, 1) is None
    assert mine.window == 8
    assert other.begin(480.0, 1) is Limit.TOKENS


def test_a_reservation_is_settled_in_its_window_only() -> None:
    (mine,) = workers(TokenLimits(tokens=10), 1)
    assert mine.begin(420.0, 10) is None
    mine.end(7, -4, 430.0)
    assert mine.begin(430.0, 5) is Limit.TOKENS
    assert mine.begin(430.0, 4) is None
    mine.end(7, -4, 480.0)
    assert mine.begin(480.0, 10) is None, "nothing is given back that the new window has not lent"
    mine.end(7, 3, 540.0)
    assert mine.begin(540.0, 8) is Limit.TOKENS
    assert mine.begin(540.0, 7) is None, "what was generated beyond the reservation counts when it is known"


def test_a_process_that_takes_over_the_cells_of_another_counts_on() -> None:
    row = defaultdict[int, int](int)
    before, after = (counts(row, [row], TokenLimits(tokens=10, requests=2)) for _ in range(2))
    assert before.begin(420.0, 6) is None
    assert after.begin(430.0, 5) is Limit.TOKENS
    assert after.begin(430.0, 4) is None
    assert after.begin(430.0, 0) is Limit.REQUESTS


def test_an_amount_beyond_the_size_of_a_cell() -> None:
    (mine,) = workers(TokenLimits(tokens=10), 1)
    assert mine.begin(420.0, 10**40) is Limit.TOKENS
    assert mine.begin(420.0, 1) is None
    mine.end(7, 10**40, 420.0)
    assert mine.begin(420.0, 0) is Limit.TOKENS
    assert mine.begin(480.0, 10) is None


@given(
    requests=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=14),
    limits=st.builds(
        TokenLimits, requests=st.integers(1, 12), tokens=st.integers(1, 20), concurrency=st.integers(1, 12)
    ),
    data=st.data(),
)
def test_the_limit_is_never_exceeded_however_workers_interleave(
    requests: list[tuple[int, int]], limits: TokenLimits, data: st.DataObject
) -> None:
    """At any access to a cell, another worker may begin a request of its own."""
    left, admitted, busy = list(requests), list[int](), set[int]()

    def between() -> None:
        interleaves: bool = data.draw(st.booleans())
        if left and interleaves:
            run_next()

    rows = [SteppedCells(between) for _ in range(4)]
    all_counts = [counts(row, rows, limits) for row in rows]

    def run_next() -> None:
        worker, amount = left.pop()
        if worker in busy:  # a worker does one thing at a time
            return
        busy.add(worker)
        if all_counts[worker].begin(420.0, amount) is None:
            admitted.append(amount)
        busy.discard(worker)
        assert limits.tokens is not None
        assert limits.requests is not None
        assert limits.concurrency is not None
        assert sum(admitted) <= limits.tokens
        assert len(admitted) <= min(limits.requests, limits.concurrency)

    while left:
        run_next()
