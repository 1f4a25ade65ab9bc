"""When to come again, from how a queue has moved."""

import pytest

from hpc_router.router.replicas.admission import DEFAULT_WAIT_S, MAX_EMPTY_S, MAX_WAIT_S, RATE_WINDOW_S, DepartureRate


def moving(*left_at: float, began: float = 100.0) -> DepartureRate:
    pace = DepartureRate()
    pace.began(began)
    for at in left_at:
        pace.left(at)
    return pace


def test_the_wait_is_the_length_over_the_pace() -> None:
    pace = moving(*(100.0 + n / 10 for n in range(1, 101)))
    assert pace.per_s(110.0) == pytest.approx(10.0)
    assert pace.wait_s(50, 110.0) == pytest.approx(5.0)


def test_a_queue_that_stands_still_is_told_to_be_slower_and_slower() -> None:
    pace = moving(101.0)
    assert pace.wait_s(10, 102.0) < pace.wait_s(10, 120.0) < pace.wait_s(10, 129.0)
    assert pace.per_s(101.0 + RATE_WINDOW_S + 1) is None


def test_before_anybody_has_left_nothing_is_known_but_how_long_that_has_taken() -> None:
    pace = moving()
    assert pace.wait_s(5, 100.0) == DEFAULT_WAIT_S
    assert pace.wait_s(5, 120.0) == 20.0
    assert DepartureRate().wait_s(0, 1e6) == DEFAULT_WAIT_S


def test_it_is_never_less_than_a_second_nor_more_than_ten_minutes() -> None:
    pace = moving(*(100.0 + n / 1000 for n in range(100)))
    assert pace.wait_s(1, 100.1) == 1.0
    assert moving(101.0).wait_s(10_000, 125.0) == MAX_WAIT_S


def test_a_new_queue_begins_anew_unless_the_last_one_has_just_ended() -> None:
    pace = moving(100.5)
    pace.began(100.5 + MAX_EMPTY_S)
    assert pace.per_s(102.0) == pytest.approx(0.5)
    pace.began(200.0)
    assert pace.per_s(201.0) is None


def test_only_the_last_departures_are_kept_and_their_pace_is_right() -> None:
    pace = moving(*(100.0 + n / 100 for n in range(1, 1001)))
    assert pace.per_s(110.0) == pytest.approx(100.0, rel=0.02)
