"""From measured correctness to the table cluster -> expert.

What one expert gains over another in a cluster of a hundred prompts is mostly chance, so each cluster's rate leans on
those of the clusters near it and on the whole: a kernel over the cosines of their centres, with a prior worth
`PRIOR` prompts. The table for a weight of cost then takes the best of each cluster.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hpc_router.errors import ConfigError
from hpc_router.routing.features import Floats, Ids
from hpc_router.routing.training.dataset import Row

PRIOR: Final = 30.0
SHARPNESS: Final = 12.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """`rate[c, e]`: the expected correctness of expert e in cluster c; `cost[e]`: its mean cost."""

    experts: tuple[str, ...]
    rate: NDArray[np.float64]
    cost: NDArray[np.float64]

    def table(self, *, weight: float) -> tuple[str, ...]:
        best = (self.rate - weight * self.cost).argmax(axis=1)
        return tuple(self.experts[e] for e in best)

    def to_json(self, names: Sequence[str]) -> dict[str, object]:
        return {
            "experts": list(self.experts),
            "cost": [round(float(c), 6) for c in self.cost],
            "rate": {name: [round(float(r), 6) for r in rates] for name, rates in zip(names, self.rate, strict=True)},
        }


def quality_of(training: Mapping[str, Any], clusters: Sequence[str]) -> Quality | None:
    """What an artefact was measured to be worth, if it was."""
    stored = training.get("quality")
    if not isinstance(stored, dict):
        return None
    return Quality(
        experts=tuple(stored["experts"]),
        rate=np.array([stored["rate"][name] for name in clusters], np.float64),
        cost=np.array(stored["cost"], np.float64),
    )


def measure(rows: Sequence[Row], held: Ids, vectors: Floats, *, clusters: int) -> Quality:
    """Without any cost in the rows every expert's is 0. Raises ConfigError where rows name different experts."""
    experts = tuple(sorted(rows[0].correct))
    for row in rows:
        if tuple(sorted(row.correct)) != experts:
            raise ConfigError(
                f'line {row.line}: "correct" names {", ".join(sorted(row.correct))}; '
                f"the first row names {', '.join(experts)}"
            )
    right = np.array([[row.correct[name] for name in experts] for row in rows])
    cost = np.array([[row.cost.get(name, 0.0) for name in experts] for row in rows]).mean(axis=0)
    counts = np.bincount(held, minlength=clusters).astype(np.float64)
    sums = np.zeros((clusters, len(experts)))
    np.add.at(sums, held, right)
    centres = np.zeros((clusters, vectors.shape[1]))
    np.add.at(centres, held, vectors)
    centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    near = np.exp(SHARPNESS * (centres @ centres.T - 1))
    rate = (near @ sums + PRIOR * right.mean(axis=0)) / ((near @ counts)[:, None] + PRIOR)
    return Quality(experts=experts, rate=rate, cost=cost)
