"""Retry-After, from the departure rate of a queue."""

import pytest

from hpc_router.router.replicas.admission import DEFAULT_WAIT_S, MAX_EMPTY_S, MAX_WAIT_S, RATE_WINDOW_S, DepartureRate


def rate_of(*left_at: float, began: float = 100.0) -> DepartureRate:
    rate = DepartureRate()
    rate.began(began)
    for at in left_at:
        rate.left(at)
    return rate


def test_the_wait_is_the_length_divided_by_the_departure_rate() -> None:
    rate = rate_of(*(100.0 + n / 10 for n in range(1, 101)))
    assert rate.per_s(110.0) == pytest.approx(10.0)
    assert rate.wait_s(50, 110.0) == pytest.approx(5.0)


def test_the_wait_grows_while_a_queue_has_no_departures() -> None:
    rate = rate_of(101.0)
    assert rate.wait_s(10, 102.0) < rate.wait_s(10, 120.0) < rate.wait_s(10, 129.0)
    assert rate.per_s(101.0 + RATE_WINDOW_S + 1) is None


def test_without_a_departure_the_wait_is_the_time_since_the_queue_began() -> None:
    rate = rate_of()
    assert rate.wait_s(5, 100.0) == DEFAULT_WAIT_S
    assert rate.wait_s(5, 120.0) == 20.0
    assert DepartureRate().wait_s(0, 1e6) == DEFAULT_WAIT_S


def test_the_wait_is_between_one_second_and_ten_minutes() -> None:
    rate = rate_of(*(100.0 + n / 1000 for n in range(100)))
    assert rate.wait_s(1, 100.1) == 1.0
    assert rate_of(101.0).wait_s(10_000, 125.0) == MAX_WAIT_S


def test_a_queue_keeps_its_rate_only_if_it_was_empty_for_a_moment() -> None:
    rate = rate_of(100.5)
    rate.began(100.5 + MAX_EMPTY_S)
    assert rate.per_s(102.0) == pytest.approx(0.5)
    rate.began(200.0)
    assert rate.per_s(201.0) is None


def test_the_rate_is_right_after_more_departures_than_are_kept() -> None:
    rate = rate_of(*(100.0 + n / 100 for n in range(1, 1001)))
    assert rate.per_s(110.0) == pytest.approx(100.0, rel=0.02)
