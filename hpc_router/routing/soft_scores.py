"""Chooses an expert by its expected quality in the nearest clusters of a prompt (soft clusters)."""

import copy
import math
from collections.abc import Collection, Sequence
from typing import Final, NamedTuple, Self

from hpc_router.routing.artefact import SoftDecision
from hpc_router.routing.quality import Quality

_EXCLUDED: Final = -math.inf
_new_tuple: Final = tuple.__new__  # written in C, while a named tuple's own constructor is Python code


class SoftChoice(NamedTuple):
    """The expert chosen for a prompt. `cluster`: number of the nearest cluster. `score`: expected quality of `expert`,
    minus what its cost is worth. `margin` and `runner_up` are None if no other expert can be chosen."""

    cluster: int
    expert: str | None
    score: float
    margin: float | None
    runner_up: str | None


class SoftScores:
    """Computes the expected quality of the experts that a deployment has. `experts`: their names; None: all experts of
    the artefact."""

    def __init__(
        self, quality: Quality, soft: SoftDecision, *, experts: Collection[str] | None, cost_weight: float | None
    ) -> None:
        weight = soft.cost_weight if cost_weight is None else cost_weight
        columns = [e for e, name in enumerate(quality.experts) if experts is None or name in experts]
        self.experts = tuple(quality.experts[e] for e in columns)
        # The shares of the clusters add up to one, so that costs may be subtracted here.
        self._rates: list[list[float]] = (quality.rate - weight * quality.cost)[:, columns].tolist()
        self._sharpness = soft.sharpness
        self._further = range(min(soft.nearest, len(self._rates)) - 1)

    def limited_to(self, experts: Collection[str]) -> Self:
        """Returns a copy that knows only these experts."""
        limited, columns = copy.copy(self), [e for e, name in enumerate(self.experts) if name in experts]
        limited.experts = tuple(self.experts[e] for e in columns)
        limited._rates = [[rates[e] for e in columns] for rates in self._rates]
        return limited

    def choose(self, values: list[float], length: float) -> SoftChoice:
        """Returns the best expert for a prompt. `values`: the prompt's value for each cluster, which this call
        overwrites. `length`: the prompt's length, by which the values are divided."""
        rates, factor = self._rates, self._sharpness / length
        top = max(values)
        cluster = nearest = values.index(top)
        scores, total = rates[nearest], 1.0
        for _ in self._further:
            values[nearest] = _EXCLUDED
            value = max(values)
            nearest = values.index(value)
            share = math.exp(factor * (value - top))
            scores = [score + share * rate for score, rate in zip(scores, rates[nearest])]  # noqa: B905
            total += share
        if len(scores) < 2:
            expert = self.experts[0] if scores else None
            return SoftChoice(cluster, expert, scores[0] / total if scores else 0.0, None, None)
        best_score = max(scores)
        best = scores.index(best_score)
        others = [*scores]
        others[best] = _EXCLUDED
        second_score = max(others)
        experts = self.experts
        return _new_tuple(
            SoftChoice,
            (
                cluster,
                experts[best],
                best_score / total,
                (best_score - second_score) / total,
                experts[others.index(second_score)],
            ),
        )

    def expected(self, values: Sequence[float], length: float) -> dict[str, float]:
        """Returns the expected quality of each expert for a prompt with these values of the clusters and this
        length."""
        shares = self._shares(values, length)
        return {
            name: sum(share * self._rates[cluster][e] for cluster, share in shares.items())
            for e, name in enumerate(self.experts)
        }

    def gradient(self, values: Sequence[float], length: float) -> dict[int, float]:
        """Returns, by nearest cluster, the derivative of the margin with respect to (value of the cluster / `length`).
        Without a runner-up, it is the derivative of the score."""
        choice, shares = self.choose(list(values), length), self._shares(values, length)
        if choice.expert is None:
            return {}
        signs = {self.experts.index(choice.expert): 1.0}
        if choice.runner_up is not None:
            signs[self.experts.index(choice.runner_up)] = -1.0
        lead = {c: sum(sign * self._rates[c][e] for e, sign in signs.items()) for c in shares}
        mean = sum(share * lead[c] for c, share in shares.items())
        return {c: self._sharpness * share * (lead[c] - mean) for c, share in shares.items()}

    def _shares(self, values: Sequence[float], length: float) -> dict[int, float]:
        nearest = sorted(range(len(values)), key=lambda c: -values[c])[: len(self._further) + 1]
        weights = [math.exp(self._sharpness / length * (values[c] - values[nearest[0]])) for c in nearest]
        return {c: weight / sum(weights) for c, weight in zip(nearest, weights, strict=True)}
