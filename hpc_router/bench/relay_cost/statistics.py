"""Median, minimum and maximum over several rounds. A ratio is computed within each round."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from hpc_router.bench.relay_cost.rounds import RelayRounds


@dataclass(frozen=True, slots=True)
class RoundSpread:
    """The median, minimum and maximum of a figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self | None:
        """Returns the spread of the finite values; None if there are none."""
        known = [value for value in values if math.isfinite(value)]
        return cls(statistics.median(known), min(known), max(known)) if known else None


def spread(measured: RelayRounds, name: str) -> RoundSpread | None:
    return RoundSpread.of(one.figures[name] for one in measured.rounds.values() if name in one.figures)


def across(many: Sequence[tuple[RelayRounds | None, str]], combine: Callable[..., float]) -> RoundSpread | None:
    """Returns the spread over the rounds of a value computed from several figures. `many`: the figures, each as a
    relay's rounds (None: the relay was not measured) and the figure's name. `combine` computes the value from the
    figures of one round. Rounds that lack a figure are left out; None if none remains."""
    values = []
    for number in _rounds(many):
        found = [measured.rounds[number].figures.get(name) for measured, name in many if measured is not None]
        if len(found) == len(many) and None not in found:
            values.append(combine(*found))
    return RoundSpread.of(values)


def ratio(above: float, below: float) -> float:
    return above / below if below > 0 else math.nan


def slope_per_million(points: Sequence[tuple[int, float]]) -> float:
    """Returns the least-squares slope of pairs (requests, MiB), in MiB per million requests. Leaves out the first pair,
    because the first requests also load code and fill caches."""
    used = list(points[1:]) if len(points) > 2 else list(points)
    if len(used) < 2:
        return math.nan
    return statistics.linear_regression([x / 1e6 for x, _ in used], [y for _, y in used]).slope


def _rounds(many: Sequence[tuple[RelayRounds | None, str]]) -> list[int]:
    known = [set(measured.rounds) for measured, _ in many if measured is not None]
    return sorted(set.intersection(*known)) if known else []
