"""The run time of every artefact: tokenise, gather rows, sum, divide by a length. Numpy only, no state, no I/O.

Score: the cosine between the prompt's TF-IDF row and a cluster. Margin: the distance to the best cluster of *another
expert*, because clusters of one expert do not compete. Experts come from the artefact's table; one that is not in
this deployment counts as none. It measures and never decides what a small margin means: that is the policy's.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_router.routing.artefact import Artefact
from hpc_router.routing.features import Floats, Ids, Vocabulary


@dataclass(frozen=True, slots=True)
class Classification:
    """`known_terms` counts the telling ones; at 0 the rest says nothing about the prompt.

    `margin` is None where all clusters lead to one expert. `runner_up` is the expert of the other cluster.
    """

    cluster: str
    expert: str | None
    score: float
    margin: float | None
    runner_up: str | None
    known_terms: int


@dataclass(frozen=True, slots=True)
class Term:
    """`weight`: what the term adds to the margin. All terms of a prompt add up to it."""

    term: str
    weight: float


class Classifier:
    def __init__(self, artefact: Artefact, *, experts: Collection[str] | None = None) -> None:
        """`experts`: those of this deployment (default: all the artefact names)."""
        self.artefact = artefact
        self.experts = tuple(
            name if experts is None or name in experts else None for name in artefact.experts
        )  # by cluster
        self._vocabulary = Vocabulary(artefact.terms, features=artefact.features)
        self._weights = np.ascontiguousarray(artefact.weights)  # a gather of rows copies any other layout whole
        self._idf: Floats = artefact.idf
        self._telling: Floats = artefact.telling.astype(np.float32)
        # rivals[c, d] is 0 where clusters c and d lead to different experts, and -inf where they do not compete.
        same = np.array([[a == b for b in self.experts] for a in self.experts])
        self._rivals = np.where(same, np.float32(-np.inf), np.float32(0))

    @property
    def version(self) -> str:
        return self.artefact.version

    @property
    def margin_threshold(self) -> float:
        return self.artefact.margin_threshold

    def classify(self, text: str) -> Classification:
        ids, frequencies = self._vocabulary.row(text)
        scores, length = self._score(ids, frequencies)
        best, rival = self._best_two(scores)
        score = float(scores[best]) / length
        return Classification(
            cluster=self.artefact.clusters[best],
            expert=self.experts[best],
            score=max(-1.0, min(1.0, score)),
            margin=None if rival is None else score - float(scores[rival]) / length,
            runner_up=None if rival is None else self.experts[rival],
            known_terms=int(np.add.reduce(self._telling.take(ids))),
        )

    def explain(self, text: str, *, limit: int = 10) -> tuple[Term, ...]:
        """The terms that decided between the chosen cluster and the runner-up, the heaviest first."""
        ids, frequencies = self._vocabulary.row(text)
        scores, length = self._score(ids, frequencies)
        best, rival = self._best_two(scores)
        advantage = self._weights[ids, best]
        if rival is not None:
            advantage = advantage - self._weights[ids, rival]
        shares = frequencies * advantage / length
        order = np.argsort(-np.abs(shares), kind="stable")[:limit]
        terms = self._vocabulary.terms
        return tuple(Term(terms[ids[i]], float(shares[i])) for i in order if shares[i] != 0)

    def _score(self, ids: Ids, frequencies: Floats) -> tuple[Floats, float]:
        """The row's length (1 for a row of nothing), and its cosines with all clusters times that length."""
        row = frequencies * self._idf.take(ids)
        return frequencies @ self._weights.take(ids, axis=0), math.sqrt(row @ row) or 1.0

    def _best_two(self, scores: NDArray[np.float32]) -> tuple[int, int | None]:
        """The best cluster and the best one of another expert; ties go to the first."""
        best = int(scores.argmax())
        others = scores + self._rivals[best]
        rival = int(others.argmax())
        return best, None if others[rival] == -np.inf else rival
