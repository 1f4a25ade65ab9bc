"""Trains an artefact from exemplars, about 20 prompts per expert: one centroid of TF-IDF rows per expert.

The settings are those of the best results in tests with exemplars of one source and prompts of others: single terms
with five-character prefixes (20 prompts rarely repeat a pair of words), folded digits, and idf = ln((n + 1) / df),
which nearly removes a word that occurs in every exemplar. The margin threshold comes from cross-validation over the
exemplars. A term is discriminative if it has a letter and occurs in the exemplars of at most half of the experts,
rounded up: digits and punctuation alone say nothing of a topic. The training uses neither randomness nor BLAS, so the
same prompts give the same bits. A generalist fallback expert needs no exemplars and is not part of the artefact.
"""

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hpc_router.errors import ConfigError
from hpc_router.routing.artefact import Artefact, PartDecision
from hpc_router.routing.confidence import calibrate
from hpc_router.routing.features import Doubles, Features, Ids, Mask, TermCounts, counts_of, vocabulary_of

FALSE_REJECTION_RATE: Final = 0.05
"""Maximum share of correctly classified held-out prompts whose margin is below the threshold."""
CLEAR_MARGINS: Final = 2.0
"""A part of a prompt is clear if its margin is at least this multiple of the margin threshold..."""
QUESTION_TERMS: Final = 3
MESSAGE_TERMS: Final = 4
"""...and if it has at least this number of discriminative terms. The three numbers were chosen on prompts that had been
held out of a training file, with rules, pastes, quotations and phrases such as "Can you explain this?" around them."""
MAX_FOLDS: Final = 200
"""Maximum number of folds of the cross-validation. With fewer exemplars, each exemplar is one fold."""


def train(exemplars: Mapping[str, Sequence[str]], *, features: Features | None = None) -> Artefact:
    """Trains an artefact with one cluster per expert, named after the expert. Raises ConfigError if the exemplars are
    not usable (see `usable_exemplars`)."""
    features = features or Features()
    usable = usable_exemplars(exemplars, features=features)
    names = tuple(usable)
    texts = [text for name in names for text in usable[name]]
    label = np.repeat(np.arange(len(names)), [len(usable[name]) for name in names])
    vocabulary = vocabulary_of(texts, features=features)
    counts = counts_of(texts, vocabulary=vocabulary)
    idf = _idf(counts, prompts=len(texts))
    centroids = _centroids(counts, idf, label=label, clusters=len(names))
    predicted, margins, scores = _cross_validated(counts, label=label, clusters=len(names))
    threshold = margin_threshold(margins[predicted == label])
    fingerprint = hashlib.sha256(json.dumps(usable, sort_keys=True).encode()).hexdigest()
    return Artefact(
        features=features,
        method="exemplars",
        clusters=names,
        experts=names,
        margin_threshold=threshold,
        parts=part_decision(threshold),
        terms=vocabulary.terms,
        weights=np.ascontiguousarray((centroids * idf).T, np.float32),
        idf=idf.astype(np.float32),
        calibration=calibrate(margins, scores, predicted == label),
        discriminative=_discriminative(vocabulary.terms, counts, label=label, clusters=len(names)),
        training={
            "data": {"sha256": fingerprint, "prompts": {name: len(usable[name]) for name in names}},
            "settings": {"lost_share": FALSE_REJECTION_RATE, "folds": min(len(texts), MAX_FOLDS)},
            "scores": {
                "left_out_accuracy": float(np.mean(predicted == label)),
                "low_margin_share": float(np.mean(margins < threshold)),
                "cluster_share": {name: float(np.mean(predicted == c)) for c, name in enumerate(names)},
            },
            "packages": {"numpy": np.__version__, "python": platform.python_version()},
        },
    )


def margin_threshold(margins: Doubles) -> float:
    """Returns the margin threshold below which at most the share `FALSE_REJECTION_RATE` of `margins` lies, the margins
    of correctly classified held-out prompts; 0 if there are none."""
    return float(np.quantile(margins, FALSE_REJECTION_RATE)) if margins.size else 0.0


def part_decision(threshold: float) -> PartDecision | None:
    """Returns when a part of a prompt decides alone. `threshold`: the margin threshold that held-out prompts of the
    training gave. None if it is not positive, because then it separates nothing."""
    if threshold <= 0:
        return None
    return PartDecision(
        clear_margin=CLEAR_MARGINS * threshold, question_terms=QUESTION_TERMS, message_terms=MESSAGE_TERMS
    )


def usable_exemplars(exemplars: Mapping[str, Sequence[str]], *, features: Features) -> dict[str, list[str]]:
    """Returns the prompts for the training, by expert in sorted order. Leaves out duplicates and prompts without a
    term.

    Raises ConfigError, with expert and position, for a value that is not text, a prompt that two experts have, an
    expert without a usable prompt, or fewer than two experts.
    """
    usable: dict[str, list[str]] = {}
    seen: dict[str, tuple[str, int]] = {}
    for name in sorted(exemplars):
        prompts = exemplars[name]
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise ConfigError(f"exemplars of expert '{name}' must be a list of prompts")
        usable[name] = []
        for position, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise ConfigError(
                    f"exemplar {position} of expert '{name}' is of type {type(prompt).__name__}; it must be text "
                    "(in YAML, quote a prompt that contains ': ' or is a number)"
                )
            terms = features.terms(prompt)
            if not terms:
                continue
            first = seen.setdefault(" ".join(terms), (name, position))
            if first[0] != name:
                raise ConfigError(
                    f"exemplar {position} of expert '{name}' has the same terms as exemplar {first[1]} of expert "
                    f"'{first[0]}'; a prompt can be an exemplar of one expert only"
                )
            if first == (name, position):
                usable[name].append(prompt)
        if not usable[name]:
            raise ConfigError(
                f"expert '{name}' has no usable exemplar; give it about 20 prompts of its domain, "
                "or remove its exemplars and make it the fallback (policy.fallback)"
            )
    if len(usable) < 2:
        raise ConfigError(
            f"a classifier needs exemplars for at least two experts, not {len(usable)}; "
            "with fewer use policy=model_field or policy=round_robin"
        )
    return usable


def _without_texts(counts: TermCounts, removed: Mask) -> TermCounts:
    """Returns the counts without the entries of the texts in the mask `removed`. Their rows stay, empty, so that the
    row numbers do not change."""
    kept = ~removed[counts.text]
    return replace(counts, text=counts.text[kept], term=counts.term[kept], count=counts.count[kept])


def _idf(counts: TermCounts, *, prompts: int) -> Doubles:
    """Returns ln((prompts + 1) / df) for each term, where df is the number of texts that contain it; 0 for a term
    without entries. `prompts`: number of texts with entries."""
    df = np.bincount(counts.term, minlength=counts.terms)
    idf: Doubles = np.where(df > 0, np.log((prompts + 1) / np.maximum(df, 1)), 0.0)
    return idf


def _unit_rows(counts: TermCounts, idf: Doubles) -> Doubles:
    """Returns the TF-IDF value of each entry, divided by the length of its row."""
    weighted = counts.count * idf[counts.term]
    # A prefix counts twice if two words of a prompt have it, as in the classifier.
    length = np.sqrt(np.bincount(counts.text, weights=weighted * idf[counts.term], minlength=counts.texts))
    unit: Doubles = weighted / np.where(length > 0, length, 1.0)[counts.text]
    return unit


def _centroids(counts: TermCounts, idf: Doubles, *, label: Ids, clusters: int) -> Doubles:
    """Returns a matrix clusters x terms: the sum of each cluster's unit rows, scaled to length one."""
    cell = label[counts.text] * counts.terms + counts.term
    sums = np.bincount(cell, weights=_unit_rows(counts, idf), minlength=clusters * counts.terms)
    sums = sums.reshape(clusters, counts.terms)
    length = np.sqrt(np.square(sums).sum(axis=1, keepdims=True))
    centroids: Doubles = sums / np.where(length > 0, length, 1.0)
    return centroids


def _cross_validated(counts: TermCounts, *, label: Ids, clusters: int) -> tuple[Ids, Doubles, Doubles]:
    """Returns predicted cluster, margin and score of each prompt, from a training without the prompt's fold."""
    folds = min(counts.texts, MAX_FOLDS)
    fold = np.arange(counts.texts) % folds
    scores = np.zeros((counts.texts, clusters))
    for number in range(folds):
        held_out = fold == number
        training, test = _without_texts(counts, held_out), _without_texts(counts, ~held_out)
        idf = _idf(training, prompts=int(np.count_nonzero(~held_out)))
        centroids = _centroids(training, idf, label=label, clusters=clusters)
        unit = _unit_rows(test, idf)
        for c in range(clusters):
            cosine = np.bincount(test.text, weights=unit * centroids[c][test.term], minlength=counts.texts)
            scores[held_out, c] = cosine[held_out]
    ranked = np.sort(scores, axis=1)
    return scores.argmax(axis=1), ranked[:, -1] - ranked[:, -2], ranked[:, -1]


def _discriminative(terms: Sequence[str], counts: TermCounts, *, label: Ids, clusters: int) -> NDArray[np.uint8]:
    pairs = set(zip(label[counts.text].tolist(), counts.term.tolist(), strict=True))
    clusters_with = Counter(term for _, term in pairs)
    most = (clusters + 1) // 2
    return np.array(
        [clusters_with[n] <= most and any(map(str.isalpha, term)) for n, term in enumerate(terms)], np.uint8
    )
