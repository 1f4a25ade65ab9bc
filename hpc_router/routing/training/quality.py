"""Estimates how often each expert is correct in each cluster.

A difference between experts in a cluster of a hundred prompts is mostly chance. The rate of a cluster is therefore
smoothed in two ways: over the other clusters, with a kernel on the cosine of the centroids, and towards the mean over
all prompts, which counts like `PRIOR_PROMPTS` prompts.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from hpc_router.errors import ConfigError
from hpc_router.routing.features import Doubles, Floats, Ids
from hpc_router.routing.quality import Quality
from hpc_router.routing.training.dataset import Row

PRIOR_PROMPTS: Final = 30.0
KERNEL_SHARPNESS: Final = 12.0
"""s in the kernel exp(s (cosine - 1)), which smooths rates over clusters."""


def estimate_quality(rows: Sequence[Row], assignment: Ids, vectors: Floats, *, clusters: int) -> Quality:
    """Estimates the quality from rows, their clusters and their vectors (rows x dimensions). Raises ConfigError if the
    rows name different experts."""
    experts, correct = correctness(rows)
    rate = smoothed_rates(correct, assignment, vectors, clusters=clusters)
    return Quality(experts=experts, rate=rate, cost=mean_costs(rows, experts))


def mean_costs(rows: Sequence[Row], experts: Sequence[str]) -> Doubles:
    """Returns the mean cost of each expert; a missing cost counts as 0."""
    costs: Doubles = np.array([[row.cost.get(name, 0.0) for name in experts] for row in rows]).mean(axis=0)
    return costs


def correctness(rows: Sequence[Row]) -> tuple[tuple[str, ...], Doubles]:
    """Returns the experts, and a matrix rows x experts that says how correct each expert's answer is. Raises
    ConfigError if the rows name different experts."""
    experts = tuple(sorted(rows[0].correct))
    for row in rows:
        if tuple(sorted(row.correct)) != experts:
            raise ConfigError(
                f'line {row.line}: "correct" names {", ".join(sorted(row.correct))}; '
                f"the first row names {', '.join(experts)}, and all rows must name the same experts"
            )
    return experts, np.array([[row.correct[name] for name in experts] for row in rows])


def smoothed_rates(correct: Doubles, assignment: Ids, vectors: Floats, *, clusters: int) -> Doubles:
    """Returns the smoothed rate of correct answers: clusters x experts. `correct`: rows x experts; `assignment`,
    `vectors`: cluster and vector of each row."""
    counts = np.bincount(assignment, minlength=clusters).astype(np.float64)
    sums = np.zeros((clusters, correct.shape[1]))
    np.add.at(sums, assignment, correct)
    centroids = np.zeros((clusters, vectors.shape[1]))
    np.add.at(centroids, assignment, vectors)
    centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
    kernel = np.exp(KERNEL_SHARPNESS * (centroids @ centroids.T - 1))
    prior = PRIOR_PROMPTS * correct.mean(axis=0)
    rates: Doubles = (kernel @ sums + prior) / ((kernel @ counts)[:, None] + PRIOR_PROMPTS)
    return rates
