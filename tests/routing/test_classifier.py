"""The combined table gives the same scores as the computation it replaces; content of a classification."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_router.routing.artefact import read
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.features import Features
from tests.routing.samples import EXEMPLARS, artefact, topic_artefact

VARIANTS = [Features(), Features(ngrams=2, prefix=0), Features(ngrams=2, prefix=3, fold_numbers=False)]
CLASSIFIERS = {features: Classifier(artefact(features)) for features in VARIANTS}
WORDS = sorted({word for prompts in EXEMPLARS.values() for prompt in prompts for word in prompt.split()})
TEXTS = st.text(st.characters(), max_size=200) | st.lists(
    st.sampled_from(WORDS) | st.text(st.characters(), max_size=5), max_size=60
).map(" ".join)


def unfolded(text: str, *, features: Features) -> dict[str, float]:
    """Compute the scores in plain Python: unit TF-IDF rows, centroids, cosines."""
    documents = [(name, Counter(features.terms(prompt))) for name, prompts in EXEMPLARS.items() for prompt in prompts]
    holders = Counter(term for _, counts in documents for term in counts)
    idf = {term: math.log((len(documents) + 1) / n) for term, n in holders.items()}

    def unit(row: dict[str, float]) -> dict[str, float]:
        length = math.sqrt(sum(value**2 for value in row.values()))
        return {term: value / length for term, value in row.items()} if length else {}

    def tfidf(counts: Counter[str]) -> dict[str, float]:
        """Words that share a prefix each count it, in the row and in its length."""
        length = math.sqrt(sum(n * idf[term] ** 2 for term, n in counts.items() if term in idf)) or 1.0
        return {term: n * idf[term] / length for term, n in counts.items() if term in idf}

    scores = {}
    prompt = tfidf(Counter(features.terms(text)))
    for name in EXEMPLARS:
        centroid: Counter[str] = Counter()
        for label, counts in documents:
            if label == name:
                centroid.update(tfidf(counts))
        direction = unit(dict(centroid))
        scores[name] = sum(value * direction.get(term, 0.0) for term, value in prompt.items())
    return scores


@settings(deadline=None)
@given(TEXTS, st.sampled_from(VARIANTS))
def test_the_folded_table_gives_the_unfolded_scores(text: str, features: Features) -> None:
    classifier = CLASSIFIERS[features]
    scores = unfolded(text, features=features)
    result = classifier.classify(text)
    ranked = sorted(scores.values(), reverse=True)
    assert result.score == pytest.approx(min(1, ranked[0]), abs=1e-5)
    assert result.score == pytest.approx(min(1, scores[result.cluster]), abs=1e-5)
    assert result.margin == pytest.approx(ranked[0] - ranked[1], abs=1e-5)
    assert result.runner_up is not None
    assert scores[result.runner_up] == pytest.approx(ranked[1], abs=1e-5)


@settings(deadline=None)
@given(TEXTS)
def test_no_text_raises_and_decisions_are_repeatable(text: str) -> None:
    one, other = CLASSIFIERS[VARIANTS[0]], Classifier(artefact())
    assert one.classify(text) == other.classify(text)
    assert one.explain(text) == other.explain(text)
    assert -1 <= one.classify(text).score <= 1


@settings(deadline=None)
@given(TEXTS, st.sampled_from(VARIANTS))
def test_the_terms_add_up_to_the_margin(text: str, features: Features) -> None:
    classifier = CLASSIFIERS[features]
    terms = classifier.explain(text, limit=100_000)
    assert sum(term.weight for term in terms) == pytest.approx(classifier.classify(text).margin, abs=1e-5)
    assert sorted(terms, key=lambda term: -abs(term.weight)) == list(terms)
    assert classifier.explain(text, limit=2) == terms[:2]


@pytest.mark.parametrize("text", ["", " \n", "\ud800\udfff", "Привет", "qwertyuiop", "the"])
def test_a_text_without_discriminative_terms_has_no_known_terms(text: str) -> None:
    assert Classifier(artefact()).classify(text).known_terms == 0


def test_a_text_without_known_terms_scores_zero() -> None:
    result = Classifier(artefact()).classify("Привет")
    assert (result.score, result.margin) == (0.0, 0.0)
    assert Classifier(artefact()).explain("Привет") == ()


@pytest.mark.parametrize(
    ("text", "expert"),
    [
        ("Fix the function that sorts integers in Python", "code"),
        ("Solve 3x + 4 = 10", "math"),
        ("symptoms of asthma in a patient", "medicine"),
        ("发烧", "medicine"),
    ],
)
def test_prompts_are_classified_by_their_words(text: str, expert: str) -> None:
    classifier = Classifier(artefact())
    assert classifier.classify(text).expert == expert
    assert classifier.explain(text)[0].weight > 0


def test_the_margin_is_the_distance_to_another_expert() -> None:
    """Two clusters of one expert do not compete."""
    trained = artefact()
    alone = Classifier(trained).classify("Solve the equation in Python")
    merged = dataclasses.replace(trained, experts=("stem", "stem", "medicine"))
    result = Classifier(merged).classify("Solve the equation in Python")
    assert result.expert == "stem"
    assert result.runner_up == "medicine"
    assert alone.margin is not None
    assert result.margin is not None
    assert result.margin > alone.margin


def test_score_and_margin_are_relative_to_the_nearest_topic() -> None:
    plain, with_topic = Classifier(artefact()), Classifier(topic_artefact())
    for text in ("Solve the equation 2x = 4", "symptoms of asthma in a patient", "Sort the patient list in Python"):
        before, after = plain.scores(text), with_topic.classify(text)
        best, second = sorted(before[:2], reverse=True)
        assert after.score == pytest.approx(best - before[2])
        assert after.margin == pytest.approx(best - max(second, before[2]))
        assert after.expert == plain.limited_to({"code", "math"}).classify(text).expert, "never a topic"
        terms = with_topic.explain(text, limit=1000)
        assert sum(term.weight for term in terms) == pytest.approx(after.margin, abs=1e-5)
        assert with_topic.nearest_topic(text) == ("medicine" if before[2] > best else None)
    assert with_topic.nearest_topic("symptoms of asthma in a patient") == "medicine"


def test_one_expert_has_a_margin_to_the_nearest_topic() -> None:
    classifier = Classifier(topic_artefact()).limited_to({"math"})
    for text, positive in (("Solve the equation 2x = 4", True), ("symptoms of asthma in a patient", False)):
        result = classifier.classify(text)
        assert (result.expert, result.runner_up) == ("math", None)
        assert result.margin is not None
        assert (result.margin > 0) == positive


def test_one_expert_for_all_has_no_margin() -> None:
    result = Classifier(dataclasses.replace(artefact(), experts=("all", "all", "all"))).classify("Solve x")
    assert (result.expert, result.margin, result.runner_up) == ("all", None, None)


def test_an_expert_outside_the_deployment_counts_as_none() -> None:
    result = Classifier(artefact(), experts={"code", "medicine"}).classify("Solve 3x + 4 = 10")
    assert (result.cluster, result.expert) == ("math", None)
    assert result.runner_up in {"code", "medicine"}


def test_a_stored_artefact_decides_like_the_trained_one(tmp_path: Path) -> None:
    trained = artefact()
    trained.write(tmp_path / "a")
    stored = Classifier(read(tmp_path / "a"))
    for prompts in EXEMPLARS.values():
        for prompt in prompts:
            assert stored.classify(prompt) == Classifier(trained).classify(prompt)
    assert stored.version == trained.version
    assert stored.margin_threshold == trained.margin_threshold


def test_the_memory_layout_of_the_weights_does_not_matter() -> None:
    trained = artefact()
    turned = dataclasses.replace(trained, weights=np.asfortranarray(trained.weights))
    assert turned.version == trained.version
    assert Classifier(turned).classify("Solve x^2") == Classifier(trained).classify("Solve x^2")
