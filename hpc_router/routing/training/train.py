"""Trains an artefact from prompts: feature space, clusters, weights of terms, margin threshold, quality.

Method *discovered*: balanced k-means over all prompts; a cluster gets the expert that its rows name most often.
*exemplars*: one cluster per label, in the direction of the mean of its prompts, or for `distilled` features in the
direction that separates it from the other labels. *measured*: discovered clusters; each gets the expert with the
highest correctness minus `weight` times its cost. The margin threshold comes from held-out prompts. The same rows,
settings, package versions and one BLAS thread give the same bytes.
"""

import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from hpc_router.config.parsing import bounded, check_values
from hpc_router.errors import ConfigError
from hpc_router.routing.artefact import NORM_SPACE, NORM_TERMS, Artefact
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.evaluation import majority
from hpc_router.routing.exemplars import margin_threshold
from hpc_router.routing.features import Doubles, Floats, Ids, Mask
from hpc_router.routing.training import feature_spaces
from hpc_router.routing.training.dataset import Row, deduplicated, fingerprint, read_corpus, read_rows
from hpc_router.routing.training.encoder import Encoder, ProgressCallback
from hpc_router.routing.training.feature_spaces import FeatureSpace
from hpc_router.routing.training.kmeans import balanced_kmeans, centroids_of, discriminant_directions
from hpc_router.routing.training.quality import Quality, estimate_quality
from hpc_router.routing.training.student import Student, distilled

TrainMethod = Literal["discovered", "exemplars", "measured"]
FeatureKind = Literal["cbtm", "lexical", "distilled"]
MAX_DISCRIMINATIVE_SHARE: Final = 0.1
"""Maximum share of the prompts in which a discriminative term occurs."""
MIN_PER_CLUSTER: Final = 2
FOLDS: Final = 5
ONE_FOLD_FROM: Final = 2000
"""Number of prompts from which one held-out fold is large enough to set the threshold."""
_PACKAGES: Final = ("numpy", "scipy", "scikit-learn", "torch", "transformers", "tokenizers")


@dataclass
class TrainConfig:
    """The settings of `launch.train_classifier`."""

    data: str = ""
    method: TrainMethod = "discovered"
    features: FeatureKind = "distilled"
    clusters: int = bounded(16, 1, 10**5)
    seed: int = bounded(0, 0, 2**32 - 1)
    encoder: str | None = None  # folder or hub id; required by features=distilled
    corpus: str | None = None  # further text for the student: JSON lines, or one passage per line
    output: str = ""
    weight: float = bounded(0.0, 0, 1e9)  # method=measured: how much correctness one unit of cost is worth


def train(config: TrainConfig, *, progress: ProgressCallback) -> Artefact:
    """Trains an artefact. Raises ConfigError for invalid settings or unusable rows."""
    _check_settings(config)
    path = Path(config.data)
    rows, left_out = deduplicated(read_rows(path), path=path, need_label=config.method == "exemplars")
    corpus = [] if config.corpus is None else read_corpus(Path(config.corpus))
    clusters = _cluster_count(config, rows)
    texts = [row.text for row in rows]
    space = _feature_space(config, texts, corpus, progress)
    progress("clusters", 0, 1)
    names, assignment, directions = _clustered(config, rows, space, clusters)
    measured = config.method == "measured"
    quality = estimate_quality(rows, assignment, space.vectors, clusters=len(names)) if measured else None
    experts = _experts(config, rows, assignment, names, quality)
    artefact = _artefact(config, space, names, experts, directions)
    progress("clusters", 1, 1)
    tested, predicted, margins = _cross_validated(config, space, texts, names, assignment, directions, progress)
    correct = predicted == assignment[tested]
    threshold = margin_threshold(margins[correct])
    shares = np.bincount(predicted, minlength=len(names)) / len(tested)
    scores: dict[str, object] = {
        "held_out_agreement": float(np.mean(correct)),
        "low_margin_share": float(np.mean(margins < threshold)),
        "cluster_share": {name: round(float(share), 6) for name, share in zip(names, shares, strict=True)},
    }
    training: dict[str, object] = {
        "data": {"sha256": fingerprint(rows), "rows": len(rows), "left_out": left_out, "corpus": len(corpus)},
        "settings": {k: v for k, v in asdict(config).items() if k not in ("data", "corpus", "output", "encoder")},
        "scores": scores,
        "packages": _packages(config),
    }
    if isinstance(space, Student):
        training["encoder"] = space.encoder
    if quality is not None:
        training["quality"] = quality.to_json(names)
    discriminative = _discriminative(artefact.terms, artefact.idf)
    return replace(artefact, margin_threshold=threshold, discriminative=discriminative, training=training)


def _check_settings(config: TrainConfig) -> None:
    for key in ("data", "output"):
        if not getattr(config, key):
            raise ConfigError(f"{key}=... is missing; data and output are required", key=key)
    check_values(config, at="")
    if config.features == "distilled" and not config.encoder:
        raise ConfigError(
            "features=distilled needs encoder=PATH, a sentence encoder that transformers can load", key="encoder"
        )
    if config.clusters < 2 and config.method != "exemplars":
        raise ConfigError(f"clusters={config.clusters}: a classifier needs 2 or more", key="clusters")


def _cluster_count(config: TrainConfig, rows: Sequence[Row]) -> int:
    if config.method == "exemplars":
        labels = {row.label for row in rows}
        if len(labels) < 2:
            raise ConfigError(
                f"{config.data}: a classifier needs prompts of at least two experts; this file has "
                f"{'only ' + repr(next(iter(labels))) if labels else 'none'}",
                key="data",
            )
        return len(labels)
    if len(rows) < MIN_PER_CLUSTER * config.clusters:
        raise ConfigError(
            f"{config.data}: {len(rows)} different prompts are too few for clusters={config.clusters}; give "
            f"{MIN_PER_CLUSTER * config.clusters} or more prompts, or fewer clusters",
            key="clusters",
        )
    if config.method == "measured":
        unmeasured = next((row for row in rows if not row.correct), None)
        if unmeasured is not None:
            raise ConfigError(
                f'{config.data}:{unmeasured.line}: no "correct"; method=measured needs {{"expert": true}} in each row',
                key="data",
            )
    return config.clusters


def _feature_space(
    config: TrainConfig, texts: Sequence[str], corpus: Sequence[str], progress: ProgressCallback
) -> FeatureSpace:
    if config.features == "distilled":
        encoder = Encoder(str(config.encoder))
        return distilled(texts, corpus=corpus, encoder=encoder, seed=config.seed, progress=progress)
    try:
        fit = feature_spaces.cbtm if config.features == "cbtm" else feature_spaces.lexical
        return fit(texts, seed=config.seed)
    except ImportError as error:
        raise ConfigError(f"features={config.features} needs {error.name}: pip install 'hpc-router[train]'") from error
    except ValueError as error:  # raised by scikit-learn if the texts consist of stop words
        raise ConfigError(f"{config.data}: these prompts have no usable terms: {error}", key="data") from error


def _clustered(
    config: TrainConfig, rows: Sequence[Row], space: FeatureSpace, clusters: int
) -> tuple[tuple[str, ...], Ids, Floats]:
    """Returns the names of the clusters, the cluster of each row, and the direction of each cluster in the space."""
    if config.method == "exemplars":
        names = tuple(sorted({str(row.label) for row in rows}))
        assignment = np.array([names.index(str(row.label)) for row in rows])
        if isinstance(space, Student):
            space.labels = assignment
        used = np.ones(len(rows), np.bool_)
        return names, assignment, _directions(config, space, assignment, used, clusters=clusters)
    centroids, assignment = balanced_kmeans(
        space.vectors, clusters=clusters, seed=config.seed, spherical=space.spherical
    )
    return tuple(f"cluster-{number}" for number in range(clusters)), assignment, centroids


def _directions(config: TrainConfig, space: FeatureSpace, assignment: Ids, used: Mask, *, clusters: int) -> Floats:
    """Returns the direction of each cluster, computed from the prompts in the mask `used`.

    With exemplars and a student, these are the directions that separate the labels, because an encoder's vectors
    contain more than the domain.
    """
    vectors, assignment = space.vectors[used], assignment[used]
    if config.method == "exemplars" and isinstance(space, Student):
        return discriminant_directions(vectors, assignment, clusters=clusters)
    return centroids_of(vectors, assignment, clusters=clusters, spherical=space.spherical)


def _experts(
    config: TrainConfig, rows: Sequence[Row], assignment: Ids, names: tuple[str, ...], quality: Quality | None
) -> tuple[str | None, ...]:
    """Returns the expert of each cluster; None for a discovered cluster whose rows name no expert."""
    if config.method == "exemplars":
        return names
    if quality is not None:
        return quality.table(weight=config.weight)
    named = [(names[c], row.expert) for row, c in zip(rows, assignment, strict=True) if row.expert]
    experts = majority([cluster for cluster, _ in named], [expert for _, expert in named])
    return tuple(experts.get(name) for name in names)


def _artefact(
    config: TrainConfig,
    space: FeatureSpace,
    names: tuple[str, ...],
    experts: tuple[str | None, ...],
    directions: Floats,
    *,
    held_out: Mask | None = None,
) -> Artefact:
    """Returns an artefact in which all terms are discriminative. Its margin threshold is 0 and is set later."""
    offsets = np.zeros(len(names), np.float32) if space.spherical else -0.5 * np.square(directions).sum(axis=1)
    dimensions = space.dimensions
    return Artefact(
        features=space.vocabulary.features,
        method=f"{config.method}-{config.features}",
        clusters=names,
        experts=experts,
        margin_threshold=0.0,
        terms=space.vocabulary.terms,
        weights=space.fold(directions, held_out=held_out),
        idf=space.idf.astype(np.float32),
        discriminative=np.ones(len(space.vocabulary), np.uint8),
        offsets=offsets.astype(np.float32),
        space=np.zeros((len(space.vocabulary), 0), np.float32) if dimensions is None else dimensions,
        norm=NORM_TERMS if dimensions is None else NORM_SPACE,
    )


def _discriminative(terms: Sequence[str], idf: Floats) -> NDArray[np.uint8]:
    """Returns 1 for words and prefixes that occur in few prompts; 0 for others and for symbols, digits and letters."""
    rare = idf >= 1 - np.log(MAX_DISCRIMINATIVE_SHARE)
    words = np.array([len(t.strip("*")) > 1 and any(map(str.isalpha, t)) for t in terms], np.bool_)
    discriminative: NDArray[np.uint8] = (words & rare).astype(np.uint8)
    return discriminative


def _cross_validated(
    config: TrainConfig,
    space: FeatureSpace,
    texts: Sequence[str],
    names: tuple[str, ...],
    assignment: Ids,
    directions: Floats,
    progress: ProgressCallback,
) -> tuple[Ids, Ids, Doubles]:
    """Returns the row numbers of held-out prompts, their predicted clusters, and their margins (lead over the best
    other cluster).

    Each fold is classified by a training without it. A cluster whose prompts are all held out keeps its direction.
    """
    tested_folds = FOLDS if len(texts) < ONE_FOLD_FROM else 1
    fold = np.random.default_rng([config.seed, 1]).permutation(len(texts)) % FOLDS
    predicted, margins = np.zeros(len(texts), np.intp), np.zeros(len(texts))
    for number in range(tested_folds):
        progress("held out", number, tested_folds)
        held_out = fold == number
        known = np.isin(np.arange(len(names)), assignment[~held_out])
        fold_directions = _directions(config, space, assignment, ~held_out, clusters=len(names))
        fold_directions = np.where(known[:, None], fold_directions, directions)
        classifier = Classifier(_artefact(config, space, names, names, fold_directions, held_out=held_out))
        for i in np.flatnonzero(held_out).tolist():
            values = classifier.scores(texts[i])
            best, second = sorted(values, reverse=True)[:2]
            predicted[i], margins[i] = values.index(best), best - second
    progress("held out", tested_folds, tested_folds)
    tested = np.flatnonzero(fold < tested_folds)
    return tested, predicted[tested], margins[tested]


def _packages(config: TrainConfig) -> dict[str, str]:
    names = _PACKAGES if config.features == "distilled" else _PACKAGES[:3]
    versions = {"python": platform.python_version()}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
