"""Figures that cannot be trusted are refused, with the reason; the same figures under good conditions are not."""

from dataclasses import replace

import pytest

from hpc_router.bench.config import ValidityLimits
from hpc_router.bench.figures import Figures, GoodputLimits, MeasurementPart, Observation, Window, figures
from hpc_router.bench.overhead import overhead
from hpc_router.bench.point import Split
from hpc_router.bench.validity import Conditions, doubts

GOOD = Conditions(users=4, cpu_share=0.3, wait_share=0.1, late_share=None, halves=(50, 50))


def found(answers: int = 100, failed: int = 0, *, window_s: float = 10.0, expert: str = "math") -> Figures:
    """Answers of 0.1 s, spread evenly over the window."""
    seen = [
        Observation(part=MeasurementPart.MEASURED, user=0, started_s=at, ended_s=at + 0.1, content_s=[at + 0.05],
                    expert=expert, error="http_503" if n < failed else None)
        for n, at in enumerate(window_s * n / (answers + failed) for n in range(answers + failed))
    ]  # fmt: skip
    return figures(seen, Window(0.0, window_s + 1.0))


def test_good_figures_stand() -> None:
    assert doubts(found(), GOOD, ValidityLimits()) == []


@pytest.mark.parametrize(
    ("figures_", "seen", "said"),
    [
        (found(97, failed=3), GOOD, "3.0% of the measured requests failed"),
        (found(), replace(GOOD, cpu_share=0.92), "load generator was the limit"),
        (found(), replace(GOOD, cpu_share=0.5, wait_share=0.45), "load generator was the limit"),
        (found(), replace(GOOD, late_share=0.2), "20% slower than their model"),
        (found(19), GOOD, "too short: 19 measured answers"),
        (found(), replace(GOOD, users=64), "1.6 answers per user"),
        (found(), replace(GOOD, users=None), ""),
        (found(30, window_s=0.15), replace(GOOD, users=None), ""),
        (found(), replace(GOOD, halves=(80, 20)), "no steady state"),
        (found(), replace(GOOD, halves=(56, 44)), ""),
    ],
)
def test_each_doubt(figures_: Figures, seen: Conditions, said: str) -> None:
    told = doubts(figures_, seen, ValidityLimits())
    assert (len(told), said in " ".join(told)) == (int(bool(said)), True)


def test_what_experts_of_one_replica_got_is_told_apart() -> None:
    """Each has its users, its prompts and its name there when the replica is asked without the router."""
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
    split = Split.of([*seen, replace(seen[0], error="http_503"), replace(seen[0], part=MeasurementPart.WARM_UP)])
    assert split.shares == {("base-0.g1", "law"): 0.25, ("base-0.g1", "math"): 0.75}
    assert split.questions == {("base-0.g1", "law"): [1], ("base-0.g1", "math"): [0, 2, 3]}


def test_an_open_loop_s_window_must_hold_answers() -> None:
    slow = [
        Observation(part=MeasurementPart.MEASURED, user=0, started_s=0.1, ended_s=9.0, content_s=[8.0], expert="math")
        for _ in range(30)
    ]
    told = doubts(figures(slow, Window(0.0, 10.0)), replace(GOOD, users=None, halves=(0, 30)), ValidityLimits())
    assert any("nine of ten answers took up to 8.9 s" in one for one in told)


def test_exactly_at_the_limit_is_within_it() -> None:
    assert doubts(found(99, failed=1), GOOD, ValidityLimits()) == []
    assert doubts(found(20), replace(GOOD, halves=(10, 10)), ValidityLimits()) == []


def test_good_answers() -> None:
    """Within every limit: a slow first token, or a slow end, is none."""
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
    told = figures(seen, Window(0.0, 10.0), GoodputLimits(ttft_s=0.5, tpot_s=0.2))
    assert told.good_share == 0.5
    assert told.goodput_per_s == pytest.approx(0.2)


def test_what_the_router_adds_is_taken_expert_by_expert() -> None:
    """A slow expert asked more often through the router is not the router's doing."""

    def of(*given: tuple[str, float]) -> Figures:
        return figures(
            [Observation(part=MeasurementPart.MEASURED, user=0, started_s=1.0, ended_s=2.0, content_s=[1.0 + ttft],
                         expert=expert)
             for expert, ttft in given],
            Window(0.0, 5.0),
        )  # fmt: skip

    through = of(("fast", 0.011), ("slow", 0.101), ("slow", 0.101), ("slow", 0.101))
    direct = of(("fast", 0.010), ("fast", 0.010), ("slow", 0.100))
    added = overhead(through, direct)
    assert added["ttft_s"]["added_s"] == pytest.approx(0.001)
    assert added["ttft_s"]["share"] == pytest.approx(0.001 / (0.25 * 0.011 + 0.75 * 0.101))
    assert overhead(through, of(("other", 1.0))) == {}
