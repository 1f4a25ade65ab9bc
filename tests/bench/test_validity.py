"""Invalid figures are reported with a reason; the same figures under good conditions are valid."""

from dataclasses import replace

import pytest

from hpc_router.bench.config import GoodputLimits, ValidityLimits
from hpc_router.bench.figures import Figures, MeasurementPart, Observation, Window, figures
from hpc_router.bench.overhead import overhead
from hpc_router.bench.point import RoutedShares
from hpc_router.bench.validity import Conditions, invalid_reasons


def list_reasons(figures_: Figures, conditions: Conditions, limits: ValidityLimits) -> list[str]:
    return list(invalid_reasons(figures_, conditions, limits))


GOOD = Conditions(users=4, cpu_share=0.3, wait_share=0.1, late_share=None, halves=(50, 50))


def found(answers: int = 100, failed: int = 0, *, window_s: float = 10.0, expert: str = "math") -> Figures:
    """Returns the figures of responses of 0.1 s, spread evenly over the window."""
    total = answers + failed
    seen = [
        Observation(
            part=MeasurementPart.MEASURED,
            user=0,
            started_s=at,
            ended_s=at + 0.1,
            content_s=[at + 0.05],
            expert=expert,
            error="http_503" if n < failed else None,
        )
        for n, at in enumerate(window_s * n / total for n in range(total))
    ]
    return figures(seen, Window(0.0, window_s + 1.0))


def test_good_figures_are_valid() -> None:
    assert list_reasons(found(), GOOD, ValidityLimits()) == []


@pytest.mark.parametrize(
    ("figures_", "conditions", "reason"),
    [
        (found(97, failed=3), GOOD, "3.0% of the measured requests failed"),
        (found(), replace(GOOD, cpu_share=0.92), "load generator was the bottleneck"),
        (found(), replace(GOOD, cpu_share=0.5, wait_share=0.45), "load generator was the bottleneck"),
        (found(), replace(GOOD, late_share=0.2), "20% slower than their model"),
        (found(19), GOOD, "too short: 19 measured responses"),
        (found(), replace(GOOD, users=64), "1.6 responses per user"),
        (found(), replace(GOOD, users=None), ""),
        (found(30, window_s=0.15), replace(GOOD, users=None), ""),
        (found(), replace(GOOD, halves=(80, 20)), "no steady state"),
        (found(), replace(GOOD, halves=(56, 44)), ""),
    ],
)
def test_each_reason(figures_: Figures, conditions: Conditions, reason: str) -> None:
    found = list_reasons(figures_, conditions, ValidityLimits())
    assert (len(found), reason in " ".join(found)) == (int(bool(reason)), True)


def test_shares_are_per_expert_of_a_replica() -> None:
    """The direct measurement of a replica needs users, prompts and model name of each of its experts."""
    seen = [
        Observation(
            part=MeasurementPart.MEASURED,
            user=0,
            started_s=0.0,
            ended_s=1.0,
            expert=expert,
            replica="base-0.g1",
            question=number,
        )
        for number, expert in enumerate(("math", "law", "math", "math"))
    ]
    routed = RoutedShares.of(
        [*seen, replace(seen[0], error="http_503"), replace(seen[0], part=MeasurementPart.WARM_UP)]
    )
    assert routed.shares == {("base-0.g1", "law"): 0.25, ("base-0.g1", "math"): 0.75}
    assert routed.bodies == {("base-0.g1", "law"): [1], ("base-0.g1", "math"): [0, 2, 3]}


def test_the_window_of_an_open_loop_must_be_longer_than_its_responses() -> None:
    slow = [
        Observation(part=MeasurementPart.MEASURED, user=0, started_s=0.1, ended_s=9.0, content_s=[8.0], expert="math")
        for _ in range(30)
    ]
    reasons = list_reasons(
        figures(slow, Window(0.0, 10.0)), replace(GOOD, users=None, halves=(0, 30)), ValidityLimits()
    )
    assert any("90th percentile of the response time is 8.9 s" in one for one in reasons)


def test_a_value_at_the_limit_is_valid() -> None:
    assert list_reasons(found(99, failed=1), GOOD, ValidityLimits()) == []
    assert list_reasons(found(20), replace(GOOD, halves=(10, 10)), ValidityLimits()) == []


def test_goodput() -> None:
    """A response with a slow first token, or with a slow end, does not count."""
    seen = [
        Observation(
            part=MeasurementPart.MEASURED,
            user=0,
            started_s=at,
            ended_s=at + e2e,
            content_s=[at + ttft, at + e2e],
            tokens=2,
        )
        for at, ttft, e2e in ((1.0, 0.1, 0.2), (2.0, 0.6, 0.7), (3.0, 0.1, 2.0), (4.0, 0.5, 0.6))
    ]
    result = figures(seen, Window(0.0, 10.0), GoodputLimits(ttft_s=0.5, tpot_s=0.2))
    assert result.good_share == 0.5
    assert result.goodput_per_s == pytest.approx(0.2)


def test_the_overhead_is_computed_per_expert() -> None:
    """A larger share of a slow expert among the routed requests does not count as overhead of the router."""

    def of(*responses: tuple[str, float]) -> Figures:
        seen = [
            Observation(
                part=MeasurementPart.MEASURED,
                user=0,
                started_s=1.0,
                ended_s=2.0,
                content_s=[1.0 + ttft],
                expert=expert,
            )
            for expert, ttft in responses
        ]
        return figures(seen, Window(0.0, 5.0))

    routed = of(("fast", 0.011), ("slow", 0.101), ("slow", 0.101), ("slow", 0.101))
    direct = of(("fast", 0.010), ("fast", 0.010), ("slow", 0.100))
    added = overhead(routed, direct)
    assert added["ttft_s"]["added_s"] == pytest.approx(0.001)
    assert added["ttft_s"]["share"] == pytest.approx(0.001 / (0.25 * 0.011 + 0.75 * 0.101))
    assert overhead(routed, of(("other", 1.0))) == {}
