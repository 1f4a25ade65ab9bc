"""The measured quality of experts by cluster, as the training stores it in an artefact."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpc_router.routing.features import Doubles


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Measured quality. `rate[c, e]`: share of correct answers of expert e in cluster c. `cost[e]`: mean cost of expert
    e."""

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
    """Returns the quality in an artefact's record of its training; None if that was not done with method=measured."""
    stored = training.get("quality")
    if not isinstance(stored, dict):
        return None
    return Quality(
        experts=tuple(stored["experts"]),
        rate=np.array([stored["rate"][cluster] for cluster in clusters], np.float64),
        cost=np.array(stored["cost"], np.float64),
    )
