"""Decides whether the figures of a measurement point are valid, and gives the reasons if they are not. Pure
functions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from hpc_router.bench.config import ValidityLimits
from hpc_router.bench.figures import Figures

STEADY_SIGMAS: Final = 4.0
STEADY_SHARE: Final = 0.25
"""Maximum relative difference between the window's two halves for a steady load. A larger difference counts only if it
also exceeds STEADY_SIGMAS standard deviations of a Poisson process."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """The circumstances of a measurement.

    `cpu_share`: share of one core that the busiest load generator used. `wait_share`: share of the time for which it
    waited for a core. `late_share`: share of their computing time by which simulated engines were late; None if no
    engine is simulated. `halves`: number of responses that ended in the first and in the second half of the window.
    """

    users: int | None
    cpu_share: float
    wait_share: float
    late_share: float | None
    halves: tuple[int, int]


def invalid_reasons(figures: Figures, conditions: Conditions, limits: ValidityLimits) -> Iterator[str]:
    """Yields the reasons why the figures are invalid; no reasons if they are valid."""
    if figures.exceeded:
        yield "over-saturated: more requests were in flight than engines that keep up would have, and the load ended"
        return
    failed = figures.failed / figures.requests if figures.requests else 0.0
    if failed > limits.error_share:
        yield f"{failed:.1%} of the measured requests failed (at most {limits.error_share:.1%})"
    cpu, wait = conditions.cpu_share, conditions.wait_share
    if cpu + wait >= limits.load_share:
        yield (
            f"the load generator was the bottleneck: it used {cpu:.0%} of a core and waited for one {wait:.0%} of the "
            f"time (together below {limits.load_share:.0%})"
        )
    if conditions.late_share is not None and conditions.late_share > limits.late_share:
        yield (
            f"the simulated engines ran {conditions.late_share:.0%} slower than their model (at most "
            f"{limits.late_share:.0%}): raise roofline.slowdown or use more cores"
        )
    yield from _too_short(figures, conditions, limits)
    first, second = conditions.halves
    difference = abs(first - second)
    if difference > STEADY_SIGMAS * (first + second) ** 0.5 and difference > STEADY_SHARE * (first + second) / 2:
        yield f"no steady state: {first} responses in the first half of the window, {second} in the second"


def _too_short(figures: Figures, conditions: Conditions, limits: ValidityLimits) -> Iterator[str]:
    """Yields a reason if the window has too few responses, or is too short compared with the response time."""
    if figures.succeeded < limits.answers:
        yield f"the window is too short: {figures.succeeded} measured responses (at least {limits.answers})"
    elif conditions.users is not None:
        rounds = figures.requests_per_s * figures.window_s / conditions.users
        if rounds < limits.rounds:
            yield f"the window is too short: {rounds:.1f} responses per user ended in it (at least {limits.rounds:g})"
    elif figures.e2e_s is not None and figures.window_s < limits.rounds * figures.e2e_s.p90:
        yield (
            f"the window is too short: {figures.window_s:.3g} s, but the 90th percentile of the response time is "
            f"{figures.e2e_s.p90:.3g} s (at least {limits.rounds:g} times that)"
        )
