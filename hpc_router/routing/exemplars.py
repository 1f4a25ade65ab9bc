"""Training from exemplars: about 20 prompts per expert -> one centroid of TF-IDF rows per expert -> an artefact.

Choices, each the best or as good as the best of what was measured with exemplars drawn from one source and scored on
others: single terms with five-letter prefixes (20 prompts repeat few pairs of words), digits folded, and idf =
ln((n + 1) / df), which all but silences a word that every exemplar has. The margin threshold comes from the exemplars:
each in turn is left out, decided by the rest, and one in twenty of those decided rightly may fall below it. A term is
telling if at most half of the experts' exemplars (rounded up) hold it. Numpy, no randomness, no BLAS: the same bits
from the same prompts. A generalist fallback needs no exemplars and is simply not named here.
"""

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hpc_router.errors import ConfigError
from hpc_router.routing.artefact import Artefact
from hpc_router.routing.features import Features, Ids, TermCounts, counts_of, vocabulary_of

LOST_SHARE = 0.05  # of held-out exemplars decided rightly, how many may be sent to the fallback all the same
MAX_FOLDS = 200  # leave-one-out up to here, then this many folds

Doubles = NDArray[np.float64]


def train(exemplars: Mapping[str, Sequence[str]], *, features: Features | None = None) -> Artefact:
    """One cluster per expert, named after it. Prompts an expert lists twice count once."""
    features = features or Features()
    usable = check(exemplars, features=features)
    names = tuple(usable)
    texts = [text for name in names for text in usable[name]]
    label = np.repeat(np.arange(len(names)), [len(usable[name]) for name in names])
    vocabulary = vocabulary_of(texts, features=features)
    rows = counts_of(texts, vocabulary=vocabulary)
    idf = _idf(rows, prompts=len(texts))
    centroids = _centroids(rows, idf, label=label, clusters=len(names))
    decided, margins = _left_out(rows, label=label, clusters=len(names))
    right = margins[decided == label]
    threshold = float(np.quantile(right, LOST_SHARE)) if right.size else 0.0
    return Artefact(
        features=features,
        method="exemplars",
        clusters=names,
        experts=names,
        margin_threshold=threshold,
        terms=vocabulary.terms,
        weights=np.ascontiguousarray((centroids * idf).T, np.float32),
        idf=idf.astype(np.float32),
        telling=_telling(rows, label=label, clusters=len(names)),
        training={
            "data": {"sha256": _fingerprint(usable), "prompts": {name: len(usable[name]) for name in names}},
            "settings": {"lost_share": LOST_SHARE, "folds": min(len(texts), MAX_FOLDS)},
            "scores": {
                "left_out_accuracy": float(np.mean(decided == label)),
                "low_margin_share": float(np.mean(margins < threshold)),
                "cluster_share": {name: float(np.mean(decided == c)) for c, name in enumerate(names)},
            },
            "packages": {"numpy": np.__version__, "python": platform.python_version()},
        },
    )


def check(exemplars: Mapping[str, Sequence[str]], *, features: Features) -> dict[str, list[str]]:
    """The prompts to train on, by expert in sorted order, or a ConfigError that names expert and position."""
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
                    "(in YAML, quote a prompt that holds ': ' or is a number)"
                )
            terms = features.terms(prompt)
            if not terms:
                continue
            first = seen.setdefault(" ".join(terms), (name, position))
            if first[0] != name:
                raise ConfigError(
                    f"exemplar {position} of expert '{name}' reads like exemplar {first[1]} of expert '{first[0]}'; "
                    "a prompt can be an example for one expert only"
                )
            if first == (name, position):
                usable[name].append(prompt)
        if not usable[name]:
            raise ConfigError(
                f"expert '{name}' has no usable exemplar; give it about 20 prompts of its domain, "
                "or none at all and make it the fallback (policy.fallback)"
            )
    if len(usable) < 2:
        raise ConfigError(
            f"a classifier needs exemplars for at least two experts, not {len(usable)}; "
            "with fewer use policy=model_field or policy=round_robin"
        )
    return usable


def _without(rows: TermCounts, texts: NDArray[np.bool_]) -> TermCounts:
    """The same numbering, those texts without entries."""
    kept = ~texts[rows.text]
    return replace(rows, text=rows.text[kept], term=rows.term[kept], count=rows.count[kept])


def _idf(rows: TermCounts, *, prompts: int) -> Doubles:
    """Per term, from the `prompts` that have entries; 0 for a term that none of them has."""
    holders = np.bincount(rows.term, minlength=rows.terms)
    idf: Doubles = np.where(holders > 0, np.log((prompts + 1) / np.maximum(holders, 1)), 0.0)
    return idf


def _unit(rows: TermCounts, idf: Doubles) -> Doubles:
    """Entries times idf, each prompt's row by its length (a row of nothing stays nothing)."""
    weighted = rows.count * idf[rows.term]
    # A beginning that two of a prompt's words share counts for each of them, as it does at run time.
    length = np.sqrt(np.bincount(rows.text, weights=weighted * idf[rows.term], minlength=rows.texts))
    unit: Doubles = weighted / np.where(length > 0, length, 1.0)[rows.text]
    return unit


def _centroids(rows: TermCounts, idf: Doubles, *, label: Ids, clusters: int) -> Doubles:
    """clusters x terms: the sum of each cluster's unit rows, at length one."""
    cell = label[rows.text] * rows.terms + rows.term
    sums = np.bincount(cell, weights=_unit(rows, idf), minlength=clusters * rows.terms).reshape(clusters, rows.terms)
    length = np.sqrt(np.square(sums).sum(axis=1, keepdims=True))
    centroids: Doubles = sums / np.where(length > 0, length, 1.0)
    return centroids


def _left_out(rows: TermCounts, *, label: Ids, clusters: int) -> tuple[Ids, Doubles]:
    """Each prompt's cluster and margin as decided by a training on the others."""
    folds = min(rows.texts, MAX_FOLDS)
    fold = np.arange(rows.texts) % folds
    scores = np.zeros((rows.texts, clusters))
    for number in range(folds):
        held = fold == number
        rest, out = _without(rows, held), _without(rows, ~held)
        idf = _idf(rest, prompts=int(np.count_nonzero(~held)))
        centroids = _centroids(rest, idf, label=label, clusters=clusters)
        unit = _unit(out, idf)
        for c in range(clusters):
            scores[held, c] = np.bincount(out.text, weights=unit * centroids[c][out.term], minlength=rows.texts)[held]
    ranked = np.sort(scores, axis=1)
    return scores.argmax(axis=1), ranked[:, -1] - ranked[:, -2]


def _telling(rows: TermCounts, *, label: Ids, clusters: int) -> NDArray[np.uint8]:
    pairs = Counter(term for _, term in set(zip(label[rows.text].tolist(), rows.term.tolist(), strict=True)))
    return np.array([pairs[term] <= (clusters + 1) // 2 for term in range(rows.terms)], np.uint8)


def _fingerprint(exemplars: Mapping[str, Sequence[str]]) -> str:
    return hashlib.sha256(json.dumps(exemplars, sort_keys=True).encode()).hexdigest()
