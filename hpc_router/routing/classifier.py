"""Classifies a prompt with an artefact: splits the prompt into terms, adds their table rows, and divides by a length.

The score of a cluster is the cosine between prompt and cluster. With `distilled` features, the score is the cosine that
the sentence encoder is predicted to give, minus the mean for that kind of text. The margin of a prompt is the
difference between the score of its best cluster and that of the best cluster of another expert. An expert that is not
in the deployment counts as no expert.

With topics (`artefact`), which are the domain of no expert, score and margin are relative to the nearest topic: it is
subtracted from the score, and it counts like the best cluster of another expert for the margin. So both are negative if
the prompt is nearer to a topic than to any cluster.

With soft clusters (`artefact.SoftDecision`), the score of an expert is its expected quality, the mean of its measured
rates in the prompt's nearest clusters, and the margin is the difference to the next expert of the deployment.

A long message or a conversation has parts: its question, its latest turns. A part decides alone if it is clear by
itself (`artefact.PartDecision`); otherwise the whole text decides.

The classifier only measures; the policy decides what follows from a small margin. The classifier has no state and does
no I/O. After the sum (`term_sums`) it uses Python lists, because numpy calls cost more on the request path.
"""

import copy
import math
from collections.abc import Collection
from operator import mul
from typing import Final, NamedTuple, Self

import numpy as np

from hpc_router.errors import ConfigError
from hpc_router.routing.artefact import NORM_SPACE, Artefact, PartDecision
from hpc_router.routing.prompt_text import Prompt
from hpc_router.routing.quality import Quality
from hpc_router.routing.question import MIN_CHARS, has_parts, split_message
from hpc_router.routing.soft_scores import SoftScores
from hpc_router.routing.term_sums import TermSums

_EXCLUDED: Final = -math.inf
_new_tuple: Final = tuple.__new__  # written in C, while a named tuple's own constructor is Python code


class Classification(NamedTuple):
    """The best cluster of a prompt, and its margin to the best cluster of another expert or the nearest topic.

    `known_terms`: number of the prompt's discriminative terms; if it is 0, the other fields say nothing about the
    prompt. `margin` and `runner_up`, the other expert, are None if all clusters belong to one expert; with topics there
    is always a margin.
    """

    cluster: str
    expert: str | None
    score: float
    margin: float | None
    runner_up: str | None
    known_terms: int


class Term(NamedTuple):
    """A term of a prompt, and by how much it raises the margin (`weight`). All weights add up to the margin."""

    term: str
    weight: float


class Reading(NamedTuple):
    """The part of a prompt that decides, and its classification. `text`: what is classified. `part`: `all`, `question`,
    or with a conversation `message -1` (the latest message; -2 is the one before it) or `message -1, question`."""

    classification: Classification
    text: str
    part: str


class Classifier:
    """A classifier for one deployment. `experts`: the expert of each cluster; None if the deployment lacks it."""

    def __init__(
        self,
        artefact: Artefact,
        *,
        experts: Collection[str] | None = None,
        margin_threshold: float | None = None,
        cost_weight: float | None = None,
    ) -> None:
        """Prepares the tables of an artefact.

        `experts`: the experts of this deployment; None: all experts of the artefact. `margin_threshold`: None: the
        threshold of the artefact. `cost_weight`: how much quality one unit of cost is worth; None: as in the training.
        Raises ConfigError if a cost weight is given and the artefact has no measured quality.
        """
        self.artefact = artefact
        self.margin_threshold = artefact.margin_threshold if margin_threshold is None else margin_threshold
        table = artefact.experts if cost_weight is None else _quality_of(artefact).table(weight=cost_weight)
        self.experts = tuple(name if experts is None or name in experts else None for name in table)
        self._excluded: tuple[int, ...] = ()  # clusters that are never chosen
        self._clusters = len(artefact.clusters)
        self._columns = self._clusters + len(artefact.topics)
        self._in_space = artefact.norm == NORM_SPACE
        self._parts = artefact.parts
        by_frequency = np.argsort(artefact.idf, kind="stable")
        # Columns: the clusters, the topics, the squared length, the number of discriminative terms, the dimensions of
        # the space.
        columns = [artefact.weights, np.square(artefact.idf)[:, None], artefact.discriminative[:, None], artefact.space]
        self._terms = TermSums(
            [artefact.terms[row] for row in by_frequency],
            np.hstack(columns)[by_frequency],
            features=artefact.features,
            wide_lanes=self._in_space,  # a length in the space can be close to zero
            same_step=self._columns,
        )
        # Lengths are in units of the first step, as the values of the clusters and topics are.
        steps = self._terms.steps
        self._step = steps[0]
        self._square_step, self._known_step = steps[self._columns] / self._step**2, steps[self._columns + 1]
        self._space_steps = [step / self._step for step in steps[self._columns + 2 :]]
        self._offsets: list[float] | None = artefact.offsets.tolist() if artefact.offsets.any() else None
        self._soft: SoftScores | None = None
        if artefact.soft is not None and artefact.quality is not None:
            self._soft = SoftScores(artefact.quality, artefact.soft, experts=experts, cost_weight=cost_weight)
        # For each cluster: all clusters of the same expert.
        self._same_expert = [[d for d, b in enumerate(self.experts) if a == b] for a in self.experts]

    @property
    def choices(self) -> frozenset[str]:
        """The experts that `classify` can choose."""
        names = self.experts if self._soft is None else self._soft.experts
        return frozenset(name for name in names if name is not None)

    def limited_to(self, experts: Collection[str]) -> Self:
        """Returns a classifier that chooses only among these experts, of which at least one must be one of `choices`.
        It shares the tables with this one."""
        limited = copy.copy(self)
        limited.experts = tuple(name if name in experts else None for name in self.experts)
        if self._soft is not None:
            limited._soft = self._soft.limited_to(experts)
        else:
            others = (c for c, name in enumerate(self.experts) if name is not None and name not in experts)
            limited._excluded = tuple(others)
        return limited

    @property
    def version(self) -> str:
        return self.artefact.version

    def classify(self, prompt: Prompt) -> Classification:
        """Returns the best cluster of the prompt, with its expert, score and margin."""
        if type(prompt) is str and (len(prompt) < MIN_CHARS or self._parts is None or not has_parts(prompt)):
            return self._classify(prompt)  # the usual case, without a look at parts
        return self.read(prompt).classification

    def read(self, prompt: Prompt) -> Reading:
        """Returns the part of the prompt that decides, and its classification.

        Of a conversation this is the latest message that is clear, so that its expert changes only with a clear change
        of the topic; of a message its question, if that is clear. If nothing is clear, or if the artefact does not say
        what is clear, it is the whole text.
        """
        parts = self._parts
        if isinstance(prompt, str):
            return (
                Reading(self._classify(prompt), prompt, "all") if parts is None else self._read_message(prompt, parts)
            )
        if parts is not None:
            for back, turn in enumerate(reversed(prompt.turns), 1):
                found = self._read_message(turn, parts)
                if _is_clear(found.classification, parts, terms=parts.message_terms):
                    part = f"message -{back}"
                    return found._replace(part=part if found.part == "all" else f"{part}, {found.part}")
        return Reading(self._classify(prompt.text), prompt.text, "all")

    def _read_message(self, message: str, parts: PartDecision) -> Reading:
        text, question = split_message(message)
        if question is not None:
            found = self._classify(question)
            if _is_clear(found, parts, terms=parts.question_terms):
                return _new_tuple(Reading, (found, question, "question"))
        return _new_tuple(Reading, (self._classify(text), text, "all"))

    def _classify(self, text: str) -> Classification:
        values, length, known, topic = self._values(text)
        if self._soft is not None:
            cluster, expert, score, margin, runner_up = self._soft.choose(values, length)
            return _new_tuple(
                Classification, (self.artefact.clusters[cluster], expert, score, margin, runner_up, known)
            )
        top = max(values)
        best = values.index(top)  # the first one wins a tie
        for cluster in self._same_expert[best]:
            values[cluster] = _EXCLUDED
        second = max(values)
        alone = second == _EXCLUDED
        if topic is not None:
            score = (top - topic) / length
            margin = score if topic > second else (top - second) / length
        elif self._offsets is None:
            score, margin = top / length, (top - second) / length
        else:  # the values are already divided by the length, and centroids do not have length one
            offset = self._offsets[best]
            score = (top - offset) / (math.sqrt(-2 * offset) or 1.0)
            margin = top - second
        return _new_tuple(
            Classification,
            (
                self.artefact.clusters[best],
                self.experts[best],
                score if -1.0 <= score <= 1.0 else math.copysign(1.0, score),
                None if alone and topic is None else margin,
                None if alone else self.experts[values.index(second)],
                known,
            ),
        )

    def scores(self, text: str) -> list[float]:
        """Returns the score of every cluster, including its offset; relative to the nearest topic if there are any."""
        values, length, _, topic = self._values(text)
        return values if self._offsets is not None else [(value - (topic or 0.0)) / length for value in values]

    def expected_quality(self, text: str) -> dict[str, float]:
        """Returns the expected quality of each expert for the text; empty if the artefact has no measured quality."""
        quality = self.artefact.quality
        if quality is None:
            return {}
        values, length, _, _ = self._values(text)
        if self._soft is not None:
            return self._soft.expected(values, length)
        rates = quality.rate[values.index(max(values))].tolist()
        return dict(zip(quality.experts, rates, strict=True))

    def explain(self, prompt: Prompt, *, limit: int = 10) -> tuple[Term, ...]:
        """Returns the terms that contributed most to the margin, the largest absolute weight first, at most `limit`.
        They are terms of the part that decides (`read`).

        With soft clusters, the weight of a term is its effect on the margin in linear approximation.
        """
        text = self.read(prompt).text
        values, length, _, topic = self._values(text)
        unit = length * self._step
        if self._soft is not None:
            gradient = self._soft.gradient(values, length)
            effects = (
                Term(term, sum(slope * columns[c] for c, slope in gradient.items()) / unit)
                for term, columns in self._terms.by_term(text).items()
            )
            return tuple(sorted((t for t in effects if t.weight), key=lambda term: -abs(term.weight))[:limit])
        best = values.index(max(values))
        for cluster in self._same_expert[best]:
            values[cluster] = _EXCLUDED
        second = max(values)
        other = None if second == _EXCLUDED else values.index(second)
        if topic is not None and topic > second:
            other = self._clusters + self._topic_values(text).index(topic)
        terms = []
        for term, columns in self._terms.by_term(text).items():
            weight = (columns[best] - (0.0 if other is None else columns[other])) / unit
            if weight:
                terms.append(Term(term, weight))
        return tuple(sorted(terms, key=lambda term: -abs(term.weight))[:limit])

    def nearest_topic(self, prompt: Prompt) -> str | None:
        """Returns the topic that is nearer to the prompt than any cluster is, if there is one."""
        text = self.read(prompt).text
        values, _, _, topic = self._values(text)
        if topic is None or topic <= max(values):
            return None
        return self.artefact.topics[self._topic_values(text).index(topic)]

    def _topic_values(self, text: str) -> tuple[int, ...]:
        return self._terms.lanes(text)[self._clusters : self._columns]

    def _values(self, text: str) -> tuple[list[float], float, int, float | None]:
        """Returns the clusters' values for the text, its length (see `artefact`), its number of discriminative terms,
        and the value of the nearest topic; None without topics. All values and the length are in units of the step of
        the clusters' columns, which no quotient shows.

        The values are divided by the length only if the artefact has offsets.
        """
        lanes = self._terms.lanes(text)
        clusters, columns = self._clusters, self._columns
        values: list[float] = [*lanes[:clusters]]
        if self._in_space:
            length = math.hypot(*map(mul, lanes[columns + 2 :], self._space_steps)) or 1.0
        else:
            length = math.sqrt(lanes[columns] * self._square_step) or 1.0
        if self._offsets is not None:
            values = [value / length + offset for value, offset in zip(values, self._offsets, strict=True)]
        for cluster in self._excluded:
            values[cluster] = _EXCLUDED
        topic = max(lanes[clusters:columns]) if columns > clusters else None
        return values, length, int(lanes[columns + 1] * self._known_step), topic


def _is_clear(found: Classification, parts: PartDecision, *, terms: int) -> bool:
    margin = found.margin
    return margin is not None and margin >= parts.clear_margin and found.known_terms >= terms


def _quality_of(artefact: Artefact) -> Quality:
    if artefact.quality is None:
        raise ConfigError(
            f"policy.cost_weight: the artefact {artefact.version} has no measured quality; train it with "
            "method=measured, or leave the key out",
            key="policy.cost_weight",
        )
    return artefact.quality
