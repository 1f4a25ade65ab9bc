"""Soft clusters, for `method=measured` without an encoder.

Words alone do not determine the nearest cluster of a prompt with certainty, so the expected score of an expert is a
mean over the prompt's nearest clusters: sum of softmax(sharpness * value) * measured rate. The values, which say how
close a prompt is to each cluster, come from a ridge regression.

Candidates for the clusters are those of k-means and, if the rows name their domains, the domains. Held-out rows show
which clusters and which sharpness decide best: once a random fifth of the rows at a time, and once all rows of some
domains, because a router also gets prompts of unknown sources. Of the settings within one standard error of the best
one, the simplest is taken. The weight of a row is one over the root of the size of its domain, so that the largest data
set does not decide alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from hpc_router.routing.features import Doubles, Floats, Ids
from hpc_router.routing.quality import Quality
from hpc_router.routing.training.dataset import Row
from hpc_router.routing.training.encoder import ProgressCallback
from hpc_router.routing.training.feature_spaces import SvdSpace, lexical
from hpc_router.routing.training.kmeans import balanced_kmeans
from hpc_router.routing.training.quality import correctness, estimate_quality, mean_costs, smoothed_rates
from hpc_router.routing.training.ridge import RidgeSpace, held_out_predictions, random_folds
from hpc_router.routing.training.validation import counts_to_try, domain_folds, first_within_error, row_weights

SHARPNESS: Final = (2.0, 4.0, 8.0, 16.0, 32.0)
STRENGTH: Final = 0.3
NEAREST: Final = 4
COUNTS: Final = (8, 16, 32)
"""Numbers of k-means clusters that are tried if none is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftClusters:
    """The clusters that choose the best experts. `assignment`: cluster of each row. `held_out_score`: weighted mean
    score of the experts chosen for held-out rows, including those of held-out domains."""

    names: tuple[str, ...]
    assignment: Ids
    space: RidgeSpace
    quality: Quality
    sharpness: float
    held_out_score: float


def soft_clusters(
    rows: Sequence[Row], *, clusters: int | None, seed: int, weight: float, progress: ProgressCallback
) -> SoftClusters:
    """Returns clusters of the rows, with the measured quality of the experts in them. Raises ConfigError if the rows
    name different experts.

    `clusters`: number of k-means clusters; None: the best number of several, or the rows' domains. `weight`: how much
    correctness one unit of cost is worth.
    """
    base = lexical([row.text for row in rows], seed=seed)
    experts, correct = correctness(rows)
    cost = mean_costs(rows, experts)
    importance = row_weights(rows)
    splits = [random_folds(len(rows), seed=seed), *domain_folds(rows)]
    settings: list[tuple[tuple[str, ...], Ids, float]] = []
    gains: list[Doubles] = []
    candidates = list(_candidates(rows, base, clusters=clusters, seed=seed))
    for number, (names, assignment) in enumerate(candidates):
        progress("clusterings", number, len(candidates))
        membership = np.eye(len(names), dtype=np.float32)[assignment]
        by_sharpness = np.zeros((len(SHARPNESS), len(rows)))
        for fold in splits:
            values = held_out_predictions(base.rows, membership, importance, fold, strength=STRENGTH)
            rates = []
            for part in range(int(fold.max()) + 1):
                known = fold != part
                empty = np.bincount(assignment[known], minlength=len(names)) == 0
                values[np.ix_(~known, empty)] = -np.inf
                rates.append(
                    smoothed_rates(correct[known], assignment[known], base.vectors[known], clusters=len(names))
                )
            for s, sharpness in enumerate(SHARPNESS):
                gain = _held_out_gains(values, rates, fold, correct, sharpness=sharpness, penalty=weight * cost)
                by_sharpness[s] += gain / len(splits)
        settings += [(names, assignment, sharpness) for sharpness in SHARPNESS]
        gains += list(by_sharpness)
    progress("clusterings", len(candidates), len(candidates))
    chosen = first_within_error(gains, importance)
    names, assignment, sharpness = settings[chosen]
    return SoftClusters(
        names=names,
        assignment=assignment,
        space=RidgeSpace(
            vocabulary=base.vocabulary,
            idf=base.idf,
            rows=base.rows,
            vectors=np.eye(len(names), dtype=np.float32)[assignment],
            weight=importance,
            strength=STRENGTH,
        ),
        quality=estimate_quality(rows, assignment, base.vectors, clusters=len(names)),
        sharpness=sharpness,
        held_out_score=float(np.average(gains[chosen], weights=importance)),
    )


def expected_scores(values: Floats | Doubles, rates: Doubles, *, sharpness: float) -> Doubles:
    """Returns the expected score of each expert, prompts x experts, as `routing.classifier` computes it.

    `values`: prompts x clusters. `rates`: clusters x experts.
    """
    nearest = np.argsort(-values, axis=1, kind="stable")[:, :NEAREST]
    near = np.take_along_axis(values, nearest, axis=1).astype(np.float64)
    shares = np.exp(sharpness * (near - near[:, :1]))
    shares /= shares.sum(axis=1, keepdims=True)
    scores: Doubles = np.einsum("pn,pne->pe", shares, rates[nearest])
    return scores


def _candidates(
    rows: Sequence[Row], base: SvdSpace, *, clusters: int | None, seed: int
) -> Iterator[tuple[tuple[str, ...], Ids]]:
    """Yields candidate clusterings, each as the names of its clusters and the cluster of each row. The first one has
    the rows' domains as clusters, if `clusters` is None and every row has a domain. The others are k-means
    clusterings."""
    domains = sorted({row.domain for row in rows if row.domain is not None})
    if clusters is None and len(domains) >= 2 and all(row.domain is not None for row in rows):
        yield tuple(domains), np.array([domains.index(str(row.domain)) for row in rows])
    for count in counts_to_try(len(rows), COUNTS) if clusters is None else (clusters,):
        _, assignment = balanced_kmeans(base.vectors, clusters=count, seed=seed)
        yield tuple(f"cluster-{number}" for number in range(count)), assignment


def _held_out_gains(
    values: Floats, rates: Sequence[Doubles], fold: Ids, correct: Doubles, *, sharpness: float, penalty: Doubles
) -> Doubles:
    """Returns for each row its gain: the correctness of the expert that is chosen for it without the use of its own
    fold, minus the expert's `penalty`. `rates[f]`: the rates measured without the rows of fold f."""
    gains = np.zeros(len(fold))
    for number, rate in enumerate(rates):
        held_out = np.flatnonzero(fold == number)
        chosen = (expected_scores(values[held_out], rate, sharpness=sharpness) - penalty).argmax(axis=1)
        gains[held_out] = correct[held_out, chosen] - penalty[chosen]
    return gains
