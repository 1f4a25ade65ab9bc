"""The run time of every artefact: tokenise, sum, divide by a length. No state, no I/O.

Score: the cosine between the prompt and a cluster (of a student of an encoder: what it expects of the encoder, less
what is usual).
Margin: the distance to the best cluster of *another expert*, because clusters of one expert do not compete. Experts
come from the artefact's table; one that is not in this deployment counts as none. It measures and never decides what a
small margin means: that is the policy's. One table holds all that is summed (see `sums`), and what follows is done on
a list: calls into numpy, beside a relay, would cost more than they do.
"""

import math
from collections.abc import Collection
from typing import Final, NamedTuple

import numpy as np

from hpc_router.routing.artefact import NORM_SPACE, Artefact
from hpc_router.routing.term_sums import TermSums

_LOWEST: Final = -math.inf


class Classification(NamedTuple):
    """`known_terms` counts the telling ones; at 0 the rest says nothing about the prompt.

    `margin` is None where all clusters lead to one expert. `runner_up` is the expert of the other cluster.
    """

    cluster: str
    expert: str | None
    score: float
    margin: float | None
    runner_up: str | None
    known_terms: int


class Term(NamedTuple):
    """`weight`: what the term adds to the margin. All terms of a prompt add up to it."""

    term: str
    weight: float


class Classifier:
    def __init__(
        self, artefact: Artefact, *, experts: Collection[str] | None = None, margin_threshold: float | None = None
    ) -> None:
        """`experts`: those of this deployment (default: all the artefact names); the threshold: the artefact's."""
        self.artefact = artefact
        self.margin_threshold = artefact.margin_threshold if margin_threshold is None else margin_threshold
        self.experts = tuple(
            name if experts is None or name in experts else None for name in artefact.experts
        )  # by cluster
        self._clusters = len(artefact.clusters)
        self._in_space = artefact.norm == NORM_SPACE  # there a length may come out close to zero
        order = np.argsort(artefact.idf, kind="stable")  # the commonest terms first
        # Columns: a cluster each, then what adds up to the squared length, then the telling terms, then the space.
        columns = [artefact.weights, np.square(artefact.idf)[:, None], artefact.telling[:, None], artefact.space]
        self._sums = TermSums(
            [artefact.terms[row] for row in order],
            np.hstack(columns)[order],
            features=artefact.features,
            fine=self._in_space,
        )
        self._offsets: list[float] | None = artefact.offsets.tolist() if artefact.offsets.any() else None
        # By cluster: those that lead to the same expert, itself included.
        self._own = [[d for d, b in enumerate(self.experts) if a == b] for a in self.experts]

    @property
    def version(self) -> str:
        return self.artefact.version

    def classify(self, text: str) -> Classification:
        values, length, known = self._values(text)
        best, top, rival, second = self._best_and_rival(values)
        if self._offsets is not None:  # values are per unit of length already, and a centre's length is not 1
            offset = self._offsets[best]
            score = (top - offset) / (math.sqrt(-2 * offset) or 1.0)
            margin = top - second
        else:
            score, margin = top / length, (top - second) / length
        return Classification(
            self.artefact.clusters[best],
            self.experts[best],
            max(-1.0, min(1.0, score)),
            None if second == _LOWEST else margin,
            None if second == _LOWEST else self.experts[rival],
            known,
        )

    def scores(self, text: str) -> list[float]:
        """Of every cluster: what `classify` compares."""
        values, length, _ = self._values(text)
        return values if self._offsets is not None else [value / length for value in values]

    def explain(self, text: str, *, limit: int = 10) -> tuple[Term, ...]:
        """The terms that decided between the chosen cluster and the runner-up, the heaviest first."""
        values, length, _ = self._values(text)
        best, _, rival, second = self._best_and_rival(values)
        found = []
        for term, adds in self._sums.by_term(text).items():
            weight = (adds[best] - (0.0 if second == _LOWEST else adds[rival])) / length
            if weight:
                found.append(Term(term, weight))
        return tuple(sorted(found, key=lambda term: -abs(term.weight))[:limit])

    def _values(self, text: str) -> tuple[list[float], float, int]:
        """A value for each cluster, the length they are still to be divided by, and the number of telling terms."""
        sums = self._sums.of(text)
        clusters = self._clusters
        values = sums[:clusters]
        length = (math.hypot(*sums[clusters + 2 :]) if self._in_space else math.sqrt(sums[clusters])) or 1.0
        if self._offsets is not None:
            values = [value / length + offset for value, offset in zip(values, self._offsets, strict=True)]
        return values, length, int(sums[clusters + 1])

    def _best_and_rival(self, values: list[float]) -> tuple[int, float, int, float]:
        """The best cluster and its value, and the same of the best of another expert. Spoils the list."""
        top = max(values)
        best = values.index(top)  # ties go to the first
        for cluster in self._own[best]:
            values[cluster] = _LOWEST
        second = max(values)
        return best, top, values.index(second), second
