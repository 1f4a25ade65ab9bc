"""Computes the latency that the router adds at a measurement point: the median with the router minus the median without
it. Pure.

The difference is computed for each expert alone, because experts can differ by more than the router adds. Then the mean
over the experts is computed, weighted by their shares of the requests through the router.
"""

from collections.abc import Mapping
from typing import Final, TypeVar

from hpc_router.bench.figures import Figures

K = TypeVar("K", str, tuple[str, str])
LATENCIES: Final = ("ttft_s", "tpot_s", "e2e_s")


def overhead(routed: Figures, direct: Figures) -> dict[str, dict[str, float]]:
    """Returns for each kind of latency, such as `ttft_s`: `added_s`, the seconds that the router adds, and `share`,
    which is `added_s` divided by the median with the router. `routed`, `direct`: the figures with and without the
    router. Leaves out a latency that no expert has in both."""
    return {name: added for name in LATENCIES if (added := _added(name, routed, direct)) is not None}


def _added(name: str, routed: Figures, direct: Figures) -> dict[str, float] | None:
    experts = [
        expert for expert in routed.medians if name in routed.medians[expert] and name in direct.medians.get(expert, {})
    ]
    weight = sum(routed.experts[expert] for expert in experts)
    if not weight:
        return None

    def mean(medians: Mapping[str, Mapping[str, float]]) -> float:
        return sum(routed.experts[expert] * medians[expert][name] for expert in experts) / weight

    with_router, without = mean(routed.medians), mean(direct.medians)
    return {"added_s": with_router - without, "share": (with_router - without) / with_router if with_router else 0.0}


def split_users(users: int, shares: Mapping[K, float]) -> dict[K, int]:
    """Returns `users` split into whole numbers in proportion to `shares` (largest remainder method). The sum of the
    numbers is `users`."""
    total = sum(shares.values())
    exact = {name: users * share / total for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name], str(name)))
    for name in by_remainder[: users - sum(counts.values())]:
        counts[name] += 1
    return {name: count for name, count in counts.items() if count}
