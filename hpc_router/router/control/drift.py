"""Drift: how much the present prompts differ from those that the classifier was trained on. No I/O.

The shares of the clusters are compared by total variation distance, from 0 (equal shares) to 1 (no cluster in common).
Only decisions of the current artefact count.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client.core import GaugeMetricFamily, Metric

from hpc_router.routing.policy import RouteReason

Counted = Iterable[tuple[tuple[str, ...], int]]
"""The number of decisions by (artefact, cluster, reason)."""
_UNCERTAIN: Final = (RouteReason.LOW_MARGIN.value, RouteReason.OUT_OF_DOMAIN.value)
"""Reasons that count as a low margin. `policy.min_confidence` decides which of them occurs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """The measured drift. `cluster_distance`, `trained_low_margin_share`: None if the artefact's record of its training
    lacks the value that they need."""

    decisions: int
    cluster_distance: float | None
    low_margin_share: float
    trained_low_margin_share: float | None

    def to_json(self) -> dict[str, Any]:
        return {
            "decisions": self.decisions,
            "cluster_distance": None if self.cluster_distance is None else round(self.cluster_distance, 4),
            "low_margin_share": round(self.low_margin_share, 4),
            "trained_low_margin_share": self.trained_low_margin_share,
        }

    def gauges(self) -> Iterator[Metric]:
        if self.cluster_distance is not None:
            text = "Distance between the cluster shares of prompts and of the training: 0 equal, 1 disjoint."
            yield GaugeMetricFamily("hpc_router_drift_cluster_distance", text, self.cluster_distance)
        text = "Share of the decisions with a margin below the threshold."
        yield GaugeMetricFamily("hpc_router_drift_low_margin_share", text, self.low_margin_share)
        if self.trained_low_margin_share is not None:
            text = "Share of the decisions with a margin below the threshold, in training."
            yield GaugeMetricFamily("hpc_router_drift_trained_low_margin_share", text, self.trained_low_margin_share)


def drift(counted: Counted, *, artefact: str, training: Mapping[str, Any]) -> Drift | None:
    """Returns how far the decisions of `artefact` differ from its training; None if it has made none. `counted`: number
    of decisions by artefact, cluster and reason; `training`: the artefact's record of its training."""
    clusters: dict[str, int] = {}
    low = total = 0
    for (version, cluster, reason), count in counted:
        if version == artefact:
            total += count
            clusters[cluster] = clusters.get(cluster, 0) + count
            low += count if reason in _UNCERTAIN else 0
    if not total:
        return None
    scores = training.get("scores", {})
    trained = scores.get("cluster_share")
    share = scores.get("low_margin_share")
    return Drift(
        decisions=total,
        cluster_distance=None if not trained else _distance(clusters, total, trained),
        low_margin_share=low / total,
        trained_low_margin_share=share,
    )


def _distance(counts: Mapping[str, int], total: int, trained: Mapping[str, float]) -> float:
    """Returns the total variation distance between the shares in `trained` and those in `counts`, whose sum is
    `total`."""
    names = counts.keys() | trained.keys()
    return 0.5 * sum(abs(counts.get(name, 0) / total - trained.get(name, 0.0)) for name in names)
