"""Rows -> an artefact: choose the space, find or name the clusters, fold, set the margin, measure.

*discovered*: balanced k-means over all prompts; rows that name an expert give it to the cluster where it is the
commonest. *exemplars*: a cluster per label, at the mean of its prompts, or where what sets them apart is known, there.
*measured*: discovered clusters, each for the expert whose measured correctness, less `weight` times its cost, is the
highest there. The margin's threshold comes from prompts that were held out: one in twenty of those decided rightly may
fall below it. The same rows, settings, versions and one BLAS thread give the same bytes.
"""

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hpc_router.config.parsing import bounded
from hpc_router.errors import ConfigError, suggest
from hpc_router.routing.artefact import NORM_SPACE, NORM_TERMS, Artefact
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.features import Floats, Ids
from hpc_router.routing.training import feature_spaces
from hpc_router.routing.training.dataset import Row, distinct, fingerprint, read_corpus, read_rows
from hpc_router.routing.training.encoder import Encoder, Progress
from hpc_router.routing.training.kmeans import balanced_centres, centres_of, discriminants
from hpc_router.routing.training.quality import Quality, measure

METHODS: Final = ("discovered", "exemplars", "measured")
FEATURES: Final = ("cbtm", "lexical", "distilled")
LOST_SHARE: Final = 0.05
COMMON_SHARE: Final = 0.1
"""A term that more of the prompts hold tells nothing."""
MIN_PER_CLUSTER: Final = 2
FOLDS: Final = 5
MANY: Final = 2000
_PACKAGES: Final = ("numpy", "scipy", "scikit-learn", "torch", "transformers", "tokenizers")


@dataclass
class TrainConfig:
    """What `launch.train_classifier` takes."""

    data: str = ""
    method: str = "discovered"
    features: str = "distilled"
    clusters: int = bounded(16, 1, 10**5)
    seed: int = bounded(0, 0, 2**32 - 1)
    encoder: str | None = None  # a folder or hub id; features=distilled needs one
    corpus: str | None = None  # further text for the student: JSON lines or a passage a line
    output: str = ""
    weight: float = bounded(0.0, 0, 1e9)  # measured: how many units of correctness a unit of cost is worth


def train(config: TrainConfig, *, progress: Progress) -> Artefact:
    """Raises ConfigError for settings and rows that cannot be used."""
    _check(config)
    path = Path(config.data)
    given = read_rows(path)
    rows, left_out = distinct(given, path=path, need_label=config.method == "exemplars")
    corpus = [] if config.corpus is None else read_corpus(Path(config.corpus))
    clusters = _clusters(config, rows)
    texts = [row.text for row in rows]
    space = _space(config, texts, corpus, progress)
    progress("clusters", 0, 1)
    names, held, centres = _grouped(config, rows, space, clusters)
    quality = measure(rows, held, space.vectors, clusters=len(names)) if config.method == "measured" else None
    experts = _experts(config, rows, held, names, quality)
    folded = _artefact(config, space, names, experts, centres, None)
    progress("clusters", 1, 1)
    asked, decided, margins = _held_out(config, space, texts, names, held, centres, progress)
    right = margins[decided == held[asked]]
    threshold = float(np.quantile(right, LOST_SHARE)) if right.size else 0.0
    mix = np.bincount(decided, minlength=len(names)) / len(asked)
    scores: dict[str, object] = {
        "held_out_agreement": float(np.mean(decided == held[asked])),
        "low_margin_share": float(np.mean(margins < threshold)),
        "cluster_share": {name: round(float(share), 6) for name, share in zip(names, mix, strict=True)},
    }
    training: dict[str, object] = {
        "data": {"sha256": fingerprint(rows), "rows": len(rows), "left_out": left_out, "corpus": len(corpus)},
        "settings": {k: v for k, v in asdict(config).items() if k not in ("data", "corpus", "output", "encoder")},
        "scores": scores,
        "packages": _packages(config),
    }
    if isinstance(space, feature_spaces.Student):
        training["encoder"] = space.encoder
    if quality is not None:
        training["quality"] = quality.to_json(names)
    return _finished(folded, threshold=threshold, training=training)


def _check(config: TrainConfig) -> None:
    for key in ("data", "output"):
        if not getattr(config, key):
            raise ConfigError(f"{key}=... is missing (a training needs: data, output)", key=key)
    for key, valid in (("method", METHODS), ("features", FEATURES)):
        value = getattr(config, key)
        if value not in valid:
            raise ConfigError(f"{key}={value}: unknown{suggest(value, valid)}", key=key)
    if config.features == "distilled" and not config.encoder:
        raise ConfigError(
            "features=distilled needs encoder=PATH, a sentence encoder that transformers loads", key="encoder"
        )
    if config.clusters < 2 and config.method != "exemplars":
        raise ConfigError(f"clusters={config.clusters}: a classifier needs two or more", key="clusters")
    if config.seed < 0:
        raise ConfigError(f"seed={config.seed}: valid: 0 or more", key="seed")


def _clusters(config: TrainConfig, rows: Sequence[Row]) -> int:
    if config.method == "exemplars":
        labels = {row.label for row in rows}
        if len(labels) < 2:
            raise ConfigError(
                f"{config.data}: a classifier needs prompts of at least two experts; these are "
                f"{'all of ' + repr(next(iter(labels))) if labels else 'none'}",
                key="data",
            )
        return len(labels)
    if len(rows) < MIN_PER_CLUSTER * config.clusters:
        raise ConfigError(
            f"{config.data}: {len(rows)} different prompts are too few for clusters={config.clusters}; give "
            f"{MIN_PER_CLUSTER * config.clusters} or more, or fewer clusters",
            key="clusters",
        )
    if config.method == "measured":
        without = next((row for row in rows if not row.correct), None)
        if without is not None:
            raise ConfigError(
                f'{config.data}:{without.line}: no "correct"; method=measured needs it in each row: {{"expert": true}}',
                key="data",
            )
    return config.clusters


def _space(
    config: TrainConfig, texts: Sequence[str], corpus: Sequence[str], progress: Progress
) -> feature_spaces.Space:
    if config.features == "distilled":
        encoder = Encoder(str(config.encoder))
        return feature_spaces.distilled(texts, corpus=corpus, encoder=encoder, seed=config.seed, progress=progress)
    try:
        make = feature_spaces.cbtm if config.features == "cbtm" else feature_spaces.lexical
        return make(texts, seed=config.seed)
    except ImportError as error:
        raise ConfigError(f"features={config.features} needs {error.name}: pip install 'hpc-router[train]'") from error
    except ValueError as error:  # scikit-learn's word for texts of stop words alone
        raise ConfigError(f"{config.data}: nothing can be learnt from these prompts: {error}", key="data") from error


def _grouped(
    config: TrainConfig, rows: Sequence[Row], space: feature_spaces.Space, clusters: int
) -> tuple[tuple[str, ...], Ids, Floats]:
    if config.method == "exemplars":
        names = tuple(sorted({str(row.label) for row in rows}))
        held = np.array([names.index(str(row.label)) for row in rows])
        if isinstance(space, feature_spaces.Student):
            space.labels = held
        return names, held, _named_centres(space, held, np.ones(len(rows), np.bool_), clusters=clusters)
    centres, held = balanced_centres(space.vectors, clusters=clusters, seed=config.seed, spherical=space.spherical)
    return tuple(f"cluster-{number}" for number in range(clusters)), held, centres


def _named_centres(space: feature_spaces.Space, held: Ids, kept: NDArray[np.bool_], *, clusters: int) -> Floats:
    """Where those of a label lie; for a student, what sets them apart: the encoder knows more than it need be told."""
    if isinstance(space, feature_spaces.Student):
        return discriminants(space.vectors[kept], held[kept], clusters=clusters)
    return centres_of(space.vectors[kept], held[kept], clusters=clusters, spherical=space.spherical)


def _experts(
    config: TrainConfig, rows: Sequence[Row], held: Ids, names: tuple[str, ...], quality: Quality | None
) -> tuple[str | None, ...]:
    if config.method == "exemplars":
        return names
    if quality is not None:
        return quality.table(weight=config.weight)
    found: list[str | None] = []
    for cluster in range(len(names)):
        named = Counter(row.expert for row, c in zip(rows, held, strict=True) if c == cluster and row.expert)
        found.append(min(named, key=lambda name: (-named[name], name)) if named else None)
    return tuple(found)


def _artefact(
    config: TrainConfig,
    space: feature_spaces.Space,
    names: tuple[str, ...],
    experts: tuple[str | None, ...],
    centres: Floats,
    without: NDArray[np.bool_] | None,
) -> Artefact:
    offsets = np.zeros(len(names), np.float32) if space.spherical else -0.5 * np.square(centres).sum(axis=1)
    dimensions = space.dimensions
    return Artefact(
        features=space.vocabulary.features,
        method=f"{config.method}-{config.features}",
        clusters=names,
        experts=experts,
        margin_threshold=0.0,
        terms=space.vocabulary.terms,
        weights=space.fold(centres, without=without),
        idf=space.idf.astype(np.float32),
        telling=np.ones(len(space.vocabulary), np.uint8),
        offsets=offsets.astype(np.float32),
        space=np.zeros((len(space.vocabulary), 0), np.float32) if dimensions is None else dimensions,
        norm=NORM_TERMS if dimensions is None else NORM_SPACE,
    )


def _finished(artefact: Artefact, *, threshold: float, training: dict[str, object]) -> Artefact:
    telling = _telling(artefact.terms, artefact.idf)
    return replace(artefact, margin_threshold=threshold, telling=telling, training=training)


def _telling(terms: Sequence[str], idf: Floats) -> NDArray[np.uint8]:
    """Words and beginnings that few prompts hold. Symbols, digits and single letters are in texts of any language."""
    rare = idf >= 1 - np.log(COMMON_SHARE)
    wordy = np.array([len(t.strip("*")) > 1 and any(map(str.isalpha, t)) for t in terms], np.bool_)
    telling: NDArray[np.uint8] = (wordy & rare).astype(np.uint8)
    return telling


def _held_out(
    config: TrainConfig,
    space: feature_spaces.Space,
    texts: Sequence[str],
    names: tuple[str, ...],
    held: Ids,
    centres: Floats,
    progress: Progress,
) -> tuple[Ids, Ids, NDArray[np.float64]]:
    """Prompts, their clusters and margins between clusters, decided by a training without them.

    All prompts, a fifth at a time; of many, one fifth says enough.
    """
    folds = FOLDS
    asked = folds if len(texts) < MANY else 1
    fold = np.random.default_rng([config.seed, 1]).permutation(len(texts)) % folds
    decided, margins = np.zeros(len(texts), np.intp), np.zeros(len(texts))
    for number in range(asked):
        progress("held out", number, asked)
        out = fold == number
        known = np.isin(np.arange(len(names)), held[~out])
        if config.method == "exemplars":
            rest = _named_centres(space, held, ~out, clusters=len(names))
        else:
            rest = centres_of(space.vectors[~out], held[~out], clusters=len(names), spherical=space.spherical)
        made = _artefact(config, space, names, names, np.where(known[:, None], rest, centres), out)
        classifier = Classifier(made)
        for i in np.flatnonzero(out).tolist():
            values = classifier.scores(texts[i])
            best, second = sorted(values, reverse=True)[:2]
            decided[i], margins[i] = values.index(best), best - second
    progress("held out", asked, asked)
    those = np.flatnonzero(fold < asked)
    return those, decided[those], margins[those]


def _packages(config: TrainConfig) -> dict[str, str]:
    names = _PACKAGES if config.features == "distilled" else _PACKAGES[:3]
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
