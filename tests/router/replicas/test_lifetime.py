"""Requests go where they fit into the rest of a replica's walltime."""

import time
from dataclasses import replace
from random import Random

import pytest

from hpc_router.router.replicas.lifetime import HORIZON_S, SAMPLES, Lifetimes
from hpc_router.router.replicas.prefixes import PromptPrefix
from hpc_router.router.replicas.replica import Replica
from hpc_router.router.replicas.table import ReplicaTable
from tests.router.support import replica, table_of


def ending(name: str, left_s: float | None, *, capacity: int = 2) -> Replica:
    one = replica(name, capacity=capacity)
    one.renew(replace(one.record, expires_at=None if left_s is None else time.time() + left_s))
    return one


def picked(table: ReplicaTable, needed_s: float) -> str:
    table.lifetimes.refresh(table.all(), now=time.time())
    reservation = table.acquire(["math"], needed_s=lambda expert: needed_s)
    assert reservation is not None
    reservation.release()
    return reservation.replica.name


def test_the_expected_duration_is_max_tokens_times_the_measured_time_per_token() -> None:
    lifetimes = Lifetimes()
    assert lifetimes.expected_s("math", {"max_tokens": 100}) == 0
    for _ in range(SAMPLES):
        lifetimes.ended("math", 5.0, {"max_tokens": 100})
    lifetimes.ended("math", 60.0, {})
    assert lifetimes.expected_s("math", {"max_tokens": 1000}) == pytest.approx(50)
    for key in ("max_completion_tokens", "max_output_tokens"):
        assert lifetimes.expected_s("math", {key: 200}) == pytest.approx(10)
    assert lifetimes.expected_s("math", {}) == 5
    assert lifetimes.expected_s("code", {"max_tokens": 100}) == 0


@pytest.mark.parametrize("value", [None, 0, -1, True, "100", 1.5])
def test_a_max_tokens_that_is_no_count_falls_back_to_the_measured_duration(value: object) -> None:
    lifetimes = Lifetimes()
    for duration_s in (1.0,) * 19 + (30.0,):
        lifetimes.ended("math", duration_s, {"max_tokens": value})
    assert lifetimes.expected_s("math", {"max_tokens": value}) == 30


def test_a_long_request_goes_where_it_fits() -> None:
    table = table_of(ending("math-0.g1", 60), ending("math-1.g1", 600), ending("math-2.g1", None))
    table.random = Random(1)
    assert {picked(table, 100) for _ in range(50)} == {"math-1.g1", "math-2.g1"}
    assert {picked(table, 10) for _ in range(50)} == {"math-0.g1", "math-1.g1", "math-2.g1"}


def test_without_a_fitting_one_it_goes_to_the_longest_lived_with_room() -> None:
    table = table_of(ending("math-0.g1", 60), ending("math-1.g1", 600, capacity=1), ending("math-2.g1", 90))
    assert picked(table, 10_000) == "math-1.g1"
    full = table.get("math-1.g1")
    assert full is not None
    table.reserve(full, "math")
    assert picked(table, 10_000) == "math-2.g1"


def test_a_conversation_leaves_its_replica_only_if_it_does_not_fit() -> None:
    table = table_of(ending("math-0.g1", 60), ending("math-1.g1", 600))
    table.pin_bound = 1.1
    table.lifetimes.refresh(table.all(), now=time.time())
    for session in range(8):
        prefix = PromptPrefix((), (), 0, session)
        chosen = table.pick(["math"], prefix=lambda p=prefix: p, needed_s=lambda expert: 100.0)  # type: ignore[misc]
        assert chosen is not None
        assert chosen[0].name == "math-1.g1"


def test_far_from_any_end_nothing_is_asked() -> None:
    table = table_of(ending("math-0.g1", HORIZON_S + 60), ending("math-1.g1", None))
    table.lifetimes.refresh(table.all(), now=time.time())

    def unexpected(expert: str) -> float:
        raise AssertionError("no replica nears its end")

    assert table.acquire(["math"], needed_s=unexpected) is not None
