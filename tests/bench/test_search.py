"""The search for the highest rate whose goodput target holds."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.bench.config import BenchConfig, read_config
from hpc_router.bench.figures import MeasurementPart, Observation, Window, figures
from hpc_router.bench.search import limit_text, most_in_flight, next_rate, target_holds
from hpc_router.errors import ConfigError


def searching(**values: Any) -> BenchConfig:
    return read_config({"rates": [1], "search": "goodput", **values})


def found(config: BenchConfig, limit: float) -> dict[float, bool]:
    """Returns all rates that the search measures on engines that hold the target up to `limit` requests per second."""
    measured: dict[float, bool] = {}
    while (rate := next_rate(measured, config)) is not None:
        assert rate not in measured
        measured[rate] = rate <= limit
    return measured


def test_rates_double_until_one_fails_and_then_close_in() -> None:
    measured = found(searching(search_step=1.2), 11.0)
    assert list(measured)[:5] == [1, 2, 4, 8, 16]
    assert list(measured)[5:] == [11.31, 9.512]
    assert limit_text(measured, searching()) == (
        "highest rate with 95% of the requests within bench.good: 9.512 per second (not at 11.31)"
    )


@given(limit=st.floats(0.01, 1e4), start=st.floats(0.01, 1e4), step=st.floats(1.01, 2))
def test_the_limit_is_found_within_the_step(limit: float, start: float, step: float) -> None:
    config = searching(rates=[start], search_step=step, search_points=1000)
    measured = found(config, limit)
    good = max(rate for rate, held in measured.items() if held)
    bad = min(rate for rate, held in measured.items() if not held)
    assert good <= limit < bad
    assert bad / good <= max(step, 1.001) * 1.0001


def test_the_number_of_points_is_limited() -> None:
    assert len(found(searching(search_points=3), 1e9)) == 3
    assert limit_text(found(searching(search_points=3), 1e9), searching()).endswith("(no higher rate was measured)")
    assert limit_text({1.0: False}, searching()) == "no measured rate has 95% of the requests within bench.good"


def test_requests_in_flight_follow_little_s_law() -> None:
    """16 tokens within 1 s + 16 x 0.1 s: at 5 per second 13 are in flight, and twice as many are too many."""
    assert most_in_flight(searching(max_tokens=16), 5) == 2 * 13 + 10
    assert most_in_flight(searching(good={"e2e_s": 4.0}), 5) == 2 * 20 + 10
    assert most_in_flight(searching(good={"ttft_s": None, "tpot_s": None}), 5) is None
    assert most_in_flight(searching(most_in_flight=7), 5) == 7
    assert most_in_flight(read_config({"rates": [1]}), 5) is None
    turns = {"chat": {"turns": {"mean": 3}, "tool_turns": {"mean": 1}, "output_tokens": {"mean": 16}}}
    assert most_in_flight(searching(classes=turns), 5) == 2 * 13 * 6 + 10


def observed(ttft_s: float) -> Observation:
    return Observation(
        part=MeasurementPart.MEASURED, user=0, started_s=1.0, ended_s=1.5 + ttft_s, content_s=[1.0 + ttft_s], tokens=1
    )


def test_the_target_holds_for_a_share_of_the_requests_and_never_when_over_saturated() -> None:
    config = searching(search_share=0.75)
    seen = [observed(0.1)] * 3 + [observed(5.0)]
    assert target_holds(figures(seen, Window(0, 10), config.good), config)
    assert not target_holds(figures([*seen, observed(5.0)], Window(0, 10), config.good), config)
    assert not target_holds(figures(seen, Window(0, 10), config.good, exceeded=True), config)
    assert not target_holds(figures([], Window(0, 10), config.good), config)


@pytest.mark.parametrize(
    ("values", "key"),
    [({"rates": None}, "bench.rates"), ({"rates": [1, 2]}, "bench.rates"), ({"repeats": 2}, "bench.repeats")],
)
def test_a_search_begins_with_one_rate(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        searching(**values)
    assert caught.value.key == key
