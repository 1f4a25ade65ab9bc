"""The probability that a decision is right, from its score and margin. Also measures how good such probabilities are.

The classifier's own values are no probabilities: with a margin of 0.2, one artefact may be certain and another may
guess. So a logistic function of margin and score is fitted to held-out decisions. In it, a higher margin or score never
lowers the probability.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from hpc_router.routing.features import Doubles, Mask

MIN_DECISIONS: Final = 10
"""Minimum number of held-out decisions for a calibration."""
ECE_BINS: Final = 10
_PRIOR: Final = 1.0
"""Strength of the prior that pulls the slopes to 0, in decisions."""
_STEPS: Final = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The probability that a decision is right: 1 / (1 + exp(-(bias + by_margin * margin + by_score * score)))."""

    bias: float
    by_margin: float
    by_score: float

    def log_odds(self, margin: float, score: float) -> float:
        return self.bias + self.by_margin * margin + self.by_score * score

    def probability(self, margin: float, score: float) -> float:
        return 1 / (1 + math.exp(-max(-700.0, min(700.0, self.log_odds(margin, score)))))


def calibrate(margins: Doubles, scores: Doubles, right: Mask, *, weight: Doubles | None = None) -> Calibration | None:
    """Fits a calibration to decisions; returns None if there are too few. `margins`, `scores`, `right`: margin and
    score of each decision, and whether it is right. `weight`: weight of each decision; None: equal weights."""
    if len(right) < MIN_DECISIONS:
        return None
    weights = np.ones(len(right)) if weight is None else weight * (len(right) / weight.sum())
    # Targets as in Platt scaling: with few decisions, even all right ones are no proof of certainty.
    positive, negative = float(weights[right].sum()), float(weights[~right].sum())
    target = np.where(right, (positive + 1) / (positive + 2), 1 / (negative + 2))
    for used in ((0, 1), (0,), (1,)):
        columns = np.column_stack([margins, scores])[:, used]
        scale = np.where(columns.std(axis=0) > 0, columns.std(axis=0), 1.0)
        slopes, bias = _logistic(columns / scale, target, weights)
        slopes = slopes / scale
        if (slopes >= 0).all():
            by = dict(zip(used, slopes.tolist(), strict=True))
            return Calibration(bias=bias, by_margin=by.get(0, 0.0), by_score=by.get(1, 0.0))
    return Calibration(bias=math.log((positive + 1) / (negative + 1)), by_margin=0.0, by_score=0.0)


def _logistic(columns: Doubles, target: Doubles, weights: Doubles) -> tuple[Doubles, float]:
    """Returns slopes and bias of a logistic regression, by Newton's method. A prior pulls the slopes to 0."""
    rows = np.column_stack([columns, np.ones(len(target))])
    prior = np.diag([_PRIOR] * columns.shape[1] + [1e-9])
    values = np.zeros(rows.shape[1])
    for _ in range(_STEPS):
        probability = 1 / (1 + np.exp(-np.clip(rows @ values, -30, 30)))
        gradient = rows.T @ (weights * (target - probability)) - prior @ values
        curvature = rows.T @ (rows * (weights * np.maximum(probability * (1 - probability), 1e-6))[:, None]) + prior
        step = np.linalg.solve(curvature, gradient)
        values = values + step
        if np.abs(step).max() < 1e-8:
            break
    return values[:-1], float(values[-1])


def expected_calibration_error(probabilities: Sequence[float], right: Sequence[bool]) -> float:
    """Returns the expected calibration error: the distance between the mean probability and the share of right
    decisions in each bin of equal width, averaged with the number of decisions as weight."""
    stated, correct = np.array(probabilities), np.array(right, np.float64)
    bins = np.minimum((stated * ECE_BINS).astype(np.intp), ECE_BINS - 1)
    gaps = np.bincount(bins, weights=stated - correct, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(stated))


def auroc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """Returns the probability that a random value of `higher` exceeds a random one of `lower`; a tie counts half."""
    values = np.concatenate([np.array(higher, np.float64), np.array(lower, np.float64)])
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    wins = ranks[: len(higher)].sum() - len(higher) * (len(higher) + 1) / 2
    return float(wins / (len(higher) * len(lower)))
