"""What the router adds: medians through it less medians straight at the replicas, of one point. Pure.

Both are taken expert by expert, as experts may differ more than the router adds, and weighted with the shares that the
experts had through the router.
"""

from collections.abc import Mapping
from typing import Final, TypeVar

from hpc_router.bench.figures import Figures

K = TypeVar("K", str, tuple[str, str])
WHAT: Final = ("ttft_s", "tpot_s", "e2e_s")


def overhead(through: Figures, direct: Figures) -> dict[str, dict[str, float]]:
    """Per latency: `added_s`, and `share` of the latency through the router; absent where either has none."""
    return {name: found for name in WHAT if (found := _of(name, through, direct)) is not None}


def _of(name: str, through: Figures, direct: Figures) -> dict[str, float] | None:
    both = [
        expert
        for expert in through.medians
        if name in through.medians[expert] and name in direct.medians.get(expert, {})
    ]
    weight = sum(through.experts[expert] for expert in both)
    if not weight:
        return None

    def mean(medians: Mapping[str, Mapping[str, float]]) -> float:
        return sum(through.experts[expert] * medians[expert][name] for expert in both) / weight

    with_router, without = mean(through.medians), mean(direct.medians)
    return {"added_s": with_router - without, "share": (with_router - without) / with_router if with_router else 0.0}


def split(users: int, shares: Mapping[K, float]) -> dict[K, int]:
    """So many users over what has these shares: whole numbers that add up, the largest remainders rounded up."""
    whole = sum(shares.values())
    exact = {name: users * share / whole for name, share in shares.items()}
    given = {name: int(value) for name, value in exact.items()}
    left = sorted(exact, key=lambda name: (given[name] - exact[name], str(name)))
    for name in left[: users - sum(given.values())]:
        given[name] += 1
    return {name: count for name, count in given.items() if count}
