"""Artefacts from files of prompts: the same bytes each time, the unfolded pipelines' values, errors in words."""

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
from hpc_router.routing.training import feature_spaces
from hpc_router.routing.training.kmeans import MAX_OF_SHARE, balanced_centres, discriminants
from hpc_router.routing.training.train import TrainConfig, train
from tests.routing.training.encoders import WordSums
from tests.routing.training.samples import SHARED, WORDS, prompts, written

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
STUDENT = feature_spaces.distilled(
    TEXTS,
    corpus=["zeppelin over the harbour"],
    encoder=WordSums(["zeppelin", "anchor", "sauce"]),
    seed=0,
    progress=lambda *_: None,
)


def quiet(what: str, done: int, total: int) -> None:
    pass


def trained(tmp_path: Path, **options: object) -> Classifier:
    data = written(tmp_path / "data.jsonl", prompts())
    config = TrainConfig(**{"data": str(data), "output": str(tmp_path / "a"), "clusters": 3, **options})  # type: ignore[arg-type]
    made = train(config, progress=quiet)
    made.write(tmp_path / "a")
    again = train(config, progress=quiet)
    assert (made.version, made.tables) == (again.version, again.tables)
    return Classifier(read(tmp_path / "a"))


@pytest.mark.parametrize("features", ["lexical", "cbtm"])
def test_discovered_clusters_are_the_domains(tmp_path: Path, features: str) -> None:
    classifier = trained(tmp_path, features=features)
    for domain, words in WORDS.items():
        found = {classifier.classify(f"{a} {b}").cluster for a in words for b in words if a != b}
        assert len(found) == 1, domain
    assert classifier.experts == (None, None, None)
    assert classifier.margin_threshold > 0
    assert classifier.classify("Πού; 12 + 3 = ?").known_terms == 0


@pytest.mark.parametrize("features", ["lexical", "cbtm"])
def test_exemplars_name_the_clusters(tmp_path: Path, features: str) -> None:
    classifier = trained(tmp_path, features=features, method="exemplars")
    assert classifier.experts == tuple(sorted(WORDS))
    assert classifier.classify("a comet near the moon").expert == "astronomy"


def test_measured_clusters_go_to_whom_they_are_worth_it(tmp_path: Path) -> None:
    rows = prompts()
    for row in rows:
        row["correct"] = {"big": True, "small": row["domain"] != "sailing"}
        row["cost"] = {"big": 1.0, "small": 0.0}
    data = written(tmp_path / "m.jsonl", rows)
    options = TrainConfig(data=str(data), output="x", features="lexical", method="measured", clusters=3, weight=0.2)
    classifier = Classifier(train(options, progress=quiet))
    assert classifier.classify("mast and rudder in the harbour").expert == "big"
    assert classifier.classify("butter in the oven").expert == "small"


@settings(deadline=None)
@given(ANY)
def test_the_run_time_is_the_published_pipeline(text: str) -> None:
    """c-BTM: scikit-learn's vectorizer, SVD and normalizer, then the nearest centre."""
    place = PUBLISHED.transform([text])[0]
    centres = CBTM_CENTRES
    expected = place @ centres.T - 0.5 * np.square(centres).sum(axis=1)
    assert CBTM_CLASSIFIER.scores(text) == pytest.approx(expected, abs=1e-5)


@settings(deadline=None)
@given(ANY)
def test_the_run_time_is_the_unfolded_projection(text: str) -> None:
    counts = counts_of([text], vocabulary=LEXICAL.vocabulary)
    row = feature_spaces.rows_of(counts, LEXICAL.idf).toarray()[0] / np.where(LEXICAL.idf > 0, LEXICAL.idf, 1)
    expected = (row @ LEXICAL.components) @ LEXICAL_CENTRES.T
    assert LEXICAL_CLASSIFIER.scores(text) == pytest.approx(expected, abs=1e-5)


@settings(deadline=None)
@given(ANY)
def test_the_run_time_is_the_unfolded_student(text: str) -> None:
    """The sparse row, through the whole ridge regression to the encoder's dimensions, onto the centres."""
    row = feature_spaces.rows_of(counts_of([text], vocabulary=STUDENT.vocabulary), STUDENT.idf).toarray()[0]
    expected = (row @ STUDENT_REGRESSION) @ STUDENT_CENTRES.T
    assert STUDENT_CLASSIFIER.scores(text) == pytest.approx(expected, abs=1e-5)


def test_the_solver_finds_the_regression() -> None:
    """Against the normal equations solved at once in double precision, within the tolerance that training asks for."""
    rows = sparse.diags_array(STUDENT.weight) @ STUDENT.rows
    wanted = (STUDENT.taught * STUDENT.weight[:, None]).astype(np.float32)
    found = feature_spaces.ridge(rows, wanted, strength=feature_spaces.RIDGE)
    largest = np.abs(STUDENT_REGRESSION).max()
    assert np.abs(found - STUDENT_REGRESSION).max() < 10 * feature_spaces.SOLVER_TOLERANCE * largest


def test_few_texts_are_eked_out_by_variants_of_them() -> None:
    words = ["alpha", "beta", "gamma"]
    found = feature_spaces.variants(["one two three", "four"], words, count=50, seed=0)
    assert [number for number, _ in found] == [0, 1] * 25
    for number, text in found:
        own = [{"one", "two", "three"}, {"four"}][number]
        assert set(text.split()) <= own | set(words)
        assert set(text.split()) & own
    assert found == feature_spaces.variants(["one two three", "four"], words, count=50, seed=0)
    assert found != feature_spaces.variants(["one two three", "four"], words, count=50, seed=1)


def test_what_is_held_out_teaches_nothing() -> None:
    """Neither a prompt nor what was made of it."""
    out = np.arange(len(TEXTS)) == 3
    of_it = STUDENT.source == 3
    assert of_it.sum() > 1
    other = replace(STUDENT, taught=np.where(of_it[:, None], 1.0, STUDENT.taught).astype(np.float32))
    assert np.array_equal(other.fold(STUDENT_CENTRES, without=out), STUDENT.fold(STUDENT_CENTRES, without=out))
    assert not np.array_equal(other.fold(STUDENT_CENTRES), STUDENT.fold(STUDENT_CENTRES))


def test_discriminants_point_from_the_others_to_their_own() -> None:
    rng = np.random.default_rng(0)
    held = np.repeat([0, 2], 30)
    vectors = (rng.normal(0, 0.1, (60, 4)) + np.eye(4)[held]).astype(np.float32)
    found = discriminants(vectors, held, clusters=3)
    scores = (vectors - vectors.mean(axis=0)) @ found.T
    assert (scores.argmax(axis=1) == held).mean() > 0.95
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 0, 1])


def test_no_cluster_holds_much_more_than_its_share() -> None:
    rng = np.random.default_rng(0)
    crowd, few = rng.normal([4, 0, 0], 0.3, (300, 3)), rng.normal([0, 4, 0], 0.3, (30, 3))
    vectors = np.vstack([crowd, few]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    centres, held = balanced_centres(vectors, clusters=6, seed=0)
    assert np.bincount(held, minlength=6).max() <= MAX_OF_SHARE * len(vectors) / 6
    assert np.array_equal(centres, balanced_centres(vectors, clusters=6, seed=0)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ""}, "data=... is missing"),
        ({"method": "discover"}, "did you mean 'discovered'"),
        ({"features": "tfidf"}, "features=tfidf: unknown"),
        ({"features": "distilled"}, "needs encoder=PATH"),
        ({"clusters": 1}, "needs two or more"),
        ({"clusters": 80}, "90 different prompts are too few for clusters=80"),
        ({"method": "measured"}, r'data.jsonl:1: no "correct"'),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_said(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path, **{"features": "lexical", **options})


def test_one_expert_alone_is_refused(tmp_path: Path) -> None:
    data = written(tmp_path / "one.jsonl", [{"prompt": f"p{n}", "expert": "only"} for n in range(4)])
    with pytest.raises(ConfigError, match=r"at least two experts.*'only'"):
        trained(tmp_path, data=str(data), features="lexical", method="exemplars")


def _solved(rows: Any, wanted: NDArray[np.floating[Any]], *, strength: float) -> NDArray[np.float64]:
    """The regression without steps, in double precision."""
    dense = rows.toarray().astype(np.float64)
    found: NDArray[np.float64] = np.linalg.solve(
        dense.T @ dense + strength * np.eye(dense.shape[1]), dense.T @ wanted.astype(np.float64)
    )
    return found


def _classifier(space: feature_spaces.Space, centres: Floats) -> Classifier:
    from hpc_router.routing.training.train import _artefact

    names = ("a", "b", "c")
    return Classifier(_artefact(TrainConfig(), space, names, names, centres, None))


CBTM_CENTRES = balanced_centres(CBTM.vectors, clusters=3, seed=0, spherical=False)[0]
LEXICAL_CENTRES = balanced_centres(LEXICAL.vectors, clusters=3, seed=0)[0]
CBTM_CLASSIFIER = _classifier(CBTM, CBTM_CENTRES)
LEXICAL_CLASSIFIER = _classifier(LEXICAL, LEXICAL_CENTRES)
STUDENT_CENTRES = balanced_centres(STUDENT.vectors, clusters=3, seed=0)[0]
STUDENT_REGRESSION = _solved(
    sparse.diags_array(STUDENT.weight) @ STUDENT.rows,
    STUDENT.taught * STUDENT.weight[:, None],
    strength=feature_spaces.RIDGE,
)
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(feature_spaces, "ridge", _solved)  # how near the solver comes is another question
    STUDENT_CLASSIFIER = _classifier(STUDENT, STUDENT_CENTRES)
