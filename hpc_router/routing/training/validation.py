"""Chooses settings for `method=measured`: those with which the best experts are chosen for held-out rows."""

from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np

from hpc_router.routing.features import Doubles, Floats, Ids
from hpc_router.routing.training.dataset import Row
from hpc_router.routing.training.kmeans import balanced_kmeans
from hpc_router.routing.training.quality import correctness, mean_costs, smoothed_rates
from hpc_router.routing.training.ridge import FOLDS, random_folds

COUNTS: Final = (8, 16, 32, 64)
MIN_DOMAINS: Final = 3
"""Minimum number of domains of which some are held out."""
MIN_PER_CLUSTER: Final = 20
"""Minimum mean number of rows in a cluster, for the numbers of clusters that are tried."""


def counts_to_try(rows: int, counts: Sequence[int] = COUNTS) -> tuple[int, ...]:
    """Returns the numbers of clusters that are tried for `rows` rows, in ascending order."""
    return tuple(count for count in counts if count * MIN_PER_CLUSTER <= rows) or (2,)


def domain_folds(rows: Sequence[Row]) -> list[Ids]:
    """Returns a list with one item, the fold of each row, in which all rows of a domain have the same fold. The list is
    empty if there are fewer than three domains or a row has none."""
    domains = sorted({str(row.domain) for row in rows})
    if len(domains) < MIN_DOMAINS or any(row.domain is None for row in rows):
        return []
    return [np.array([domains.index(str(row.domain)) % FOLDS for row in rows])]


def measured_cluster_count(rows: Sequence[Row], vectors: Floats, *, weight: float, seed: int) -> int:
    """Returns the number of clusters of `vectors` (rows x dimensions) that chooses the best experts for held-out rows.

    `weight`: how much correctness one unit of cost is worth.
    """
    experts, correct = correctness(rows)
    penalty = weight * mean_costs(rows, experts)
    fold = random_folds(len(rows), seed=seed)
    counts, gains = counts_to_try(len(rows)), []
    for count in counts:
        _, assignment = balanced_kmeans(vectors, clusters=count, seed=seed)
        gain = np.zeros(len(rows))
        for number in range(FOLDS):
            known, held_out = fold != number, np.flatnonzero(fold == number)
            rates = smoothed_rates(correct[known], assignment[known], vectors[known], clusters=count)
            chosen = (rates - penalty).argmax(axis=1)[assignment[held_out]]
            gain[held_out] = correct[held_out, chosen] - penalty[chosen]
        gains.append(gain)
    return counts[first_within_error(gains, row_weights(rows))]


def row_weights(rows: Sequence[Row]) -> Doubles:
    """Returns a weight for each row: one over the root of the number of rows of its domain, scaled to mean 1. Rows
    without a domain count as one domain."""
    sizes = Counter(row.domain for row in rows)
    weight = np.array([sizes[row.domain] ** -0.5 for row in rows])
    scaled: Doubles = weight / weight.mean()
    return scaled


def first_within_error(gains: Sequence[Doubles], weight: Doubles) -> int:
    """Returns the number of the first setting whose weighted mean gain is at most one standard error below the best
    mean.

    `gains`: for each setting, the gain of each row; simple settings come first, so that chance does not choose a
    complex one. The standard error is that of the mean difference, row by row, to the gains of the best setting.
    """
    means = [float(np.average(gain, weights=weight)) for gain in gains]
    best = int(np.argmax(means))

    def within(setting: int) -> bool:
        difference = gains[best] - gains[setting]
        error = np.sqrt(np.square(weight * (difference - difference.mean())).sum()) / weight.sum()
        return means[best] - means[setting] <= float(error)

    return next(filter(within, range(len(gains))))
