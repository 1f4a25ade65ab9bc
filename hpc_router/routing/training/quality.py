"""Estimates how often each expert is correct in each cluster, and computes the table of experts from it.

A difference between experts in a cluster of a hundred prompts is mostly chance. The rate of a cluster is therefore
smoothed in two ways: over the other clusters, with a kernel on the cosine of the centroids, and towards the mean over
all prompts, which counts like `PRIOR_PROMPTS` prompts. The table gives each cluster the expert with the highest rate,
minus its cost times a given weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from hpc_router.errors import ConfigError
from hpc_router.routing.features import Doubles, Floats, Ids
from hpc_router.routing.training.dataset import Row

PRIOR_PROMPTS: Final = 30.0
KERNEL_SHARPNESS: Final = 12.0
"""s in the kernel exp(s (cosine - 1)), which smooths rates over clusters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """The estimated quality. `rate[c, e]`: share of correct answers of expert e in cluster c. `cost[e]`: mean cost of
    expert e."""

    experts: tuple[str, ...]
    rate: Doubles
    cost: Doubles

    def table(self, *, weight: float) -> tuple[str, ...]:
        """Returns for each cluster the expert with the highest rate - weight * cost."""
        best = (self.rate - weight * self.cost).argmax(axis=1)
        return tuple(self.experts[e] for e in best)

    def to_json(self, clusters: Sequence[str]) -> dict[str, object]:
        rates = zip(clusters, self.rate, strict=True)
        return {
            "experts": list(self.experts),
            "cost": [round(float(c), 6) for c in self.cost],
            "rate": {cluster: [round(float(r), 6) for r in row] for cluster, row in rates},
        }


def stored_quality(training: Mapping[str, Any], clusters: Sequence[str]) -> Quality | None:
    """Returns the quality in an artefact's training record; None unless it was trained with method=measured."""
    stored = training.get("quality")
    if not isinstance(stored, dict):
        return None
    return Quality(
        experts=tuple(stored["experts"]),
        rate=np.array([stored["rate"][cluster] for cluster in clusters], np.float64),
        cost=np.array(stored["cost"], np.float64),
    )


def estimate_quality(rows: Sequence[Row], assignment: Ids, vectors: Floats, *, clusters: int) -> Quality:
    """Estimates the quality from rows, their clusters and their vectors (rows x dimensions).

    A missing cost of an expert counts as 0. Raises ConfigError if the rows name different experts.
    """
    experts = tuple(sorted(rows[0].correct))
    for row in rows:
        if tuple(sorted(row.correct)) != experts:
            raise ConfigError(
                f'line {row.line}: "correct" names {", ".join(sorted(row.correct))}; '
                f"the first row names {', '.join(experts)}, and all rows must name the same experts"
            )
    correct = np.array([[row.correct[name] for name in experts] for row in rows])
    cost = np.array([[row.cost.get(name, 0.0) for name in experts] for row in rows]).mean(axis=0)
    counts = np.bincount(assignment, minlength=clusters).astype(np.float64)
    sums = np.zeros((clusters, len(experts)))
    np.add.at(sums, assignment, correct)
    centroids = np.zeros((clusters, vectors.shape[1]))
    np.add.at(centroids, assignment, vectors)
    centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
    kernel = np.exp(KERNEL_SHARPNESS * (centroids @ centroids.T - 1))
    rate = (kernel @ sums + PRIOR_PROMPTS * correct.mean(axis=0)) / ((kernel @ counts)[:, None] + PRIOR_PROMPTS)
    return Quality(experts=experts, rate=rate, cost=cost)
