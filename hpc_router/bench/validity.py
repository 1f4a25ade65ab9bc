"""Whether a point's figures can be trusted: each reason against it in words, none where it stands. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from hpc_router.bench.config import ValidityLimits
from hpc_router.bench.figures import Figures

UNSTEADY: Final = 4.0
"""Standard deviations between the two halves of the window, from which on it is no chance."""
UNEVEN: Final = 0.25
"""And by at least so much of their mean."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """Under which a point was measured. Shares of a core: of the busiest load generator. `late_share`: of their time
    by which simulated engines lagged behind their model, None where there are none. `halves`: answers that ended in the
    first and in the second half of the window."""

    users: int | None
    cpu_share: float
    wait_share: float
    late_share: float | None
    halves: tuple[int, int]


def doubts(found: Figures, seen: Conditions, trust: ValidityLimits) -> list[str]:
    return list(_doubts(found, seen, trust))


def _doubts(found: Figures, seen: Conditions, trust: ValidityLimits) -> Iterator[str]:
    failed = found.failed / found.requests if found.requests else 0.0
    if failed > trust.error_share:
        yield f"{failed:.1%} of the measured requests failed (at most {trust.error_share:.1%})"
    busy = seen.cpu_share + seen.wait_share
    if busy >= trust.load_share:
        used = f"it used {seen.cpu_share:.0%} of a core and waited for one {seen.wait_share:.0%} of the time"
        yield f"the load generator was the limit: {used} (together below {trust.load_share:.0%})"
    if seen.late_share is not None and seen.late_share > trust.late_share:
        yield (
            f"the simulated engines ran {seen.late_share:.0%} slower than their model says (at most "
            f"{trust.late_share:.0%}): slow their time down (roofline.slowdown) or take more cores"
        )
    yield from _too_short(found, seen, trust)
    first, second = seen.halves
    apart = abs(first - second)
    if apart > UNSTEADY * (first + second) ** 0.5 and apart > UNEVEN * (first + second) / 2:
        yield f"no steady state: {first} answers in the window's first half, {second} in its second"


def _too_short(found: Figures, seen: Conditions, trust: ValidityLimits) -> Iterator[str]:
    if found.succeeded < trust.answers:
        yield f"the window is too short: {found.succeeded} measured answers (at least {trust.answers})"
        return
    if seen.users is not None:
        rounds = found.requests_per_s * found.window_s / seen.users
        if rounds < trust.rounds:
            told = f"{rounds:.1f} answers per user ended in it (at least {trust.rounds:g})"
            yield f"the window is too short: {told}"
    elif found.e2e_s is not None and found.window_s < trust.rounds * found.e2e_s.p90:
        told = f"{found.window_s:.3g} s, and nine of ten answers took up to {found.e2e_s.p90:.3g} s"
        yield f"the window is too short: {told} (at least {trust.rounds:g} times that)"
