"""The one back-off: doubling pauses between two limits."""

from hpc_router.backoff import pause_s


def test_pauses_grow_from_the_first_to_the_longest() -> None:
    assert [pause_s(step, first_s=0.5, max_s=3.0) for step in range(-2, 5)] == [0.0, 0.0, 0.5, 1.0, 2.0, 3.0, 3.0]


def test_the_factor_can_be_chosen() -> None:
    assert [pause_s(step, first_s=2.0, max_s=4.0, factor=1.5) for step in range(3)] == [2.0, 3.0, 4.0]


def test_many_failures_do_not_overflow() -> None:
    assert pause_s(10**6, first_s=1e-3, max_s=60.0) == 60.0


def test_a_first_pause_above_the_longest_is_cut() -> None:
    assert pause_s(0, first_s=10.0, max_s=5.0) == 5.0
